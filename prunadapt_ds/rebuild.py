"""Decide whether to rebuild the engine of a running session around the units its plan keeps, and do so."""

from __future__ import annotations

from prunadapt_ds import distributed, resume, watchdog
from prunadapt_ds.clocks import StepTimes
from prunadapt_ds.faults import fault_point
from prunadapt_ds.schedule import PruningSchedule
from prunadapt_ds.session import Session, build_engine
from prunadapt_ds.shrink import pays_now, shrink


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
