"""Decide whether to rebuild the engine of a running session around the units its plan keeps, and do so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prunadapt_ds import distributed, resume, watchdog
from prunadapt_ds.clocks import StepTimes
from prunadapt_ds.faults import fault_point
from prunadapt_ds.schedule import PruningSchedule
from prunadapt_ds.session import Session, build_engine
from prunadapt_ds.shrink import shrink


def pays_to_shrink(session: Session, pruning: PruningSchedule, step: int) -> bool:
    """Whether a smaller engine saves more time than rebuilding takes, by the times measured in this run. Collective."""
    structure, steps = session.backbone.structure, pruning.decision_steps
    when = session.config.prune.shrink
    if session.plan.hash == session.present.hash or when == "never":
        return False
    times = session.clocks.weighed_steps
    if when == "always" or times == StepTimes():
        return when == "always"
    if step in session.rebuilt:  # already decided, before the run was interrupted
        return session.rebuilt[step]
    dense = structure.dense_cost("macs")
    later = [s for s in steps if s > step]
    ends = [*later, session.total_steps]
    sizes = [session.plan.cost("macs"), *(round(dense * (1 - pruning.sparsity(s))) for s in later)]
    decisions = [(size, end - start) for size, start, end in zip(sizes, [step, *later], ends, strict=True)]
    cost = session.clocks.rebuild or session.clocks.build
    pays = pays_now(session.present.cost("macs"), decisions, times.predict, cost)
    pays = bool(distributed.broadcast_object(pays))  # clocks differ between ranks, the decision must not
    session.rebuilt[step] = pays
    resume.note_rebuilds(session)
    return pays


def pays_now(
    present: int, decisions: Sequence[tuple[int, int]], step_seconds: Callable[[int], float], rebuild_seconds: float
) -> bool:
    """Whether the fastest way through the rest of the run begins with a rebuild at the present decision.

    present: size of the model as it physically is. decisions: for the present and all later decisions, the size after it and
    the steps until the next one or the end. Dynamic programming compares all subsets of decisions at which to rebuild.
    """
    if not decisions:
        return False
    sizes = [present, *(size for size, _ in decisions)]  # that the model can physically have
    best = dict.fromkeys(range(len(sizes)), 0.0)  # seconds to the end, by index of the model's size in `sizes`
    rebuild = keep = 0.0
    for i in reversed(range(len(decisions))):
        size, steps = decisions[i]
        smaller = i + 1
        rebuild = rebuild_seconds + steps * step_seconds(size) + best[smaller]
        keep = steps * step_seconds(sizes[0]) + best[0]
        best = {j: min(rebuild, steps * step_seconds(sizes[j]) + best[j]) for j in range(i + 1)}
    return rebuild < keep


def shrink_model(session: Session) -> None:
    """Cut the model to `session.plan`, and rebuild the engine around it. Collective."""
    start = session.clocks.now()
    fault_point(f"shrink-{session.step}/begin")
    session.note_peak()
    layout, plan = session.backbone.layout, session.plan
    with watchdog.resting():
        session.engine = shrink(session.release_engine(), layout, plan, session.present, lambda: build_engine(session))
    session.present = plan
    fault_point(f"shrink-{session.step}/end")
    if session.recorder is not None:
        session.recorder.narrow(plan.mask())
    session.memory.watched_length = 0
    session.clocks.rebuild = distributed.dist_max(session.clocks.now() - start)
