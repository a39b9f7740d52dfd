"""The whole run, top to bottom: set up, adapt, prune while training, finish.

The only module that calls all the others. Nothing imports it but the launchers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunadapt_ds import board, distributed, files, gates, memory, outline, resume, snapshot, token_teacher, watchdog
from prunadapt_ds import engine as engines
from prunadapt_ds import report as reports
from prunadapt_ds.budget import decide
from prunadapt_ds.clocks import StepTimes
from prunadapt_ds.config import Config, parse
from prunadapt_ds.entry import guarded
from prunadapt_ds.errors import PrunadaptError, UserError
from prunadapt_ds.faults import fault_point
from prunadapt_ds.finish import finish, report_unfinished
from prunadapt_ds.importance import CRITERIA, save_sums
from prunadapt_ds.keeper import Keeper
from prunadapt_ds.logits import predict
from prunadapt_ds.objective import explained
from prunadapt_ds.one_shot import prune_once, score_only
from prunadapt_ds.pulse import StopSignals
from prunadapt_ds.schedule import LearningRateSchedule, PruningSchedule
from prunadapt_ds.session import Session, add_trainables, build_engine, eval_batch, evaluate
from prunadapt_ds.setup import read_inputs, setup
from prunadapt_ds.shrink import pays_now, shrink
from prunadapt_ds.step import watched_step
from prunadapt_ds.teacher import WeightAverage, averaged
from prunadapt_ds.token_teacher import TokenTeacher, num_bytes

TEACHER_TRIAL = 256  # training examples that tell whether the teacher knows enough


def main(argv: Sequence[str] | None = None) -> int:
    """Run what `argv` asks for; returns the process's exit code (see errors.py)."""
    return guarded(lambda: run(parse(argv)))


def run(config: Config) -> dict[str, Any]:
    """One training run on the calling rank; returns the report, which rank 0 has written to `output_dir`."""
    distributed.init()
    with owned(config) as signals:
        try:
            start = resume.find(config)
        except UserError as error:
            raise error.beside(lambda: read_inputs(config)) from error
        if start.finished is not None:
            say_finished(config, start.finished)
            return start.finished
        session = setup(config, start.saved)
        session.options = start.options
        if start.checkpoint is not None:
            go_on(session, start)
        else:
            begin(session)
        if config.prune.score_only:
            score_only(session)
            return session.report
        keeper = Keeper(session, signals, start.checkpoint)
        try:
            fit(session, keeper)
            finish(session, keeper.stop_if_asked)
            token_teacher.remove(session.output_dir / token_teacher.FOLDER)
        except PrunadaptError as error:
            report_unfinished(session, error)
            raise
    return session.report


def begin(session: Session) -> None:
    """A new run: nothing learnt yet."""
    if not session.config.prune.score_only:
        resume.begin(session)
    if session.config.prune.method == "tmp":
        prune_once(session)
    add_trainables(session)
    snapshot.seed_this_rank(session.config.train.seed, step=0)


def go_on(session: Session, start: resume.Start) -> None:
    """A run that was interrupted: the same shape as then, and what it had learnt."""
    assert start.checkpoint is not None
    resume.rebuild(session, start.checkpoint)
    resume.keep_options(session)
    for note in start.notes:
        session.tracker.say(note)
    session.tracker.say(f"goes on after step {session.step} of {session.total_steps}, from {start.checkpoint.folder}")


@contextlib.contextmanager
def owned(config: Config) -> Iterator[StopSignals]:
    """Nobody else may write to the output folder meanwhile, and signals do not end the process but stop the run."""
    folder = Path(config.output.output_dir)
    lock = distributed.together(lambda: files.OwnedFolder(folder) if distributed.rank() == 0 else None)
    signals = StopSignals(speaks=distributed.rank() == 0)
    signals.listen()
    watchdog.start(folder, distributed.rank())
    try:
        yield signals
    finally:
        watchdog.stop()
        if not signals.name:  # one that stops the run may come twice, from the launcher, while the process ends
            signals.forget()
        if lock is not None:
            lock.release()


def say_finished(config: Config, report: dict[str, Any]) -> None:
    if distributed.rank() == 0:
        print(f"{config.output.output_dir}: this run is complete already; to run it anew, say --resume never")
        print(reports.table(report))


def fit(session: Session, keeper: Keeper | None = None) -> None:
    """Train from `session.step` on; where the schedule decides, score, decide and cut."""
    config, keeper = session.config, keeper or Keeper(session, StopSignals())
    pruning = pruning_schedule(session)
    rates = learning_rate_schedule(session, pruning)
    interval = _Interval(session.sampler.samples_before(session.step))
    say_what_will_happen(session, pruning)
    for step in range(session.step, session.total_steps):
        phase = pruning.phase(step) if pruning else "dense"
        learning_rates = engines.set_learning_rates(session.engine, rates.factor(step))
        record = pruning is not None and pruning.records_after(step)
        teaching = distill_weight(session, pruning, step)
        with session.clocks.timed(f"{phase}_phase"):
            losses = watched_step(session, step, record=record, distill_weight=teaching)
        session.step = done = step + 1
        decides = pruning is not None and pruning.decides_at(done)
        keeper.step_done(losses, settle=decides)
        fault_point(f"step-{done}")
        if pruning and config.prune.distill_weight and pruning.averages_at(done, config.prune.teacher_window):
            with session.clocks.timed("teacher"):
                session.average.add(session.engine)
        if pruning and decides:
            decide_and_cut(session, pruning, done)
        if config.train.eval_steps and done % config.train.eval_steps == 0:
            score = evaluate(session)[0]["score"]
            session.tracker.log(done, phase, {"eval/score": score, "time/train(s)": session.clocks.train_seconds()})
        if done % config.train.logging_steps == 0 or done == session.total_steps:
            log_interval(session, phase, pruning, interval, learning_rates)
        session.tracker.advance(done, phase)
        keeper.save_if_due()


def say_what_will_happen(session: Session, pruning: PruningSchedule | None) -> None:
    total, structure, stage = session.total_steps, session.backbone.structure, session.ds.stage
    start, end = (pruning.start_step, pruning.end_step) if pruning else (total, total)
    phases = outline.phases(session.step, start, end, total)
    counts = engines.trainable_counts(session.model, session.backbone.task_head_names)
    sharding = outline.sharding(stage, distributed.world_size(), session.ds.values["zero_optimization"])
    numbers = structure.dense_cost("params") + structure.other_params
    rate = None if session.ds.adam.get("lr") else session.learning_rate
    session.tracker.say(outline.header(session.config, phases, counts, numbers, sharding, rate))


def log_interval(
    session: Session,
    phase: str,
    pruning: PruningSchedule | None,
    interval: _Interval,
    learning_rates: dict[str, float],
) -> None:
    """What an interval looked like: to the tracker, and as a row of the report."""
    step, rate = session.step, interval.rate(session.sampler.samples_before(session.step))
    achieved, live, seconds = (
        session.plan.sparsity(session.config.prune.budget),
        session.live(),
        session.clocks.train_seconds(),
    )
    means = distributed.dist_sum(torch.stack(session.losses).mean(0)) / distributed.world_size()
    loss, distillation, taught = means.tolist()  # taught: the share of these steps that had a teacher
    session.losses.clear()
    session.tracker.log(
        step,
        phase,
        {
            "train/loss": loss,
            "sparsity/target": pruning.sparsity(step) if pruning else 0.0,
            "sparsity/achieved": achieved,
            "samples/s": rate,
            "memory/parameters(bytes)": memory.parameter_bytes(session.model),
            "memory/live(bytes)": live,
            "communication/sent(bytes)": session.sent_in_a_step(),
            "distillation/weight": distill_weight(session, pruning, step - 1),
            **({"distillation/loss": distillation / taught} if taught else {}),
            "time/train(s)": seconds,
            **{f"learning_rate/{name}": value for name, value in learning_rates.items()},
        },
    )
    session.report["progress"].append(
        {"step": step, "phase": phase, "loss": loss, "sparsity": achieved, "samples_per_s": rate}
        | {"live_tensor_bytes": live, "train_s": seconds}
    )


def pruning_schedule(session: Session) -> PruningSchedule | None:
    prune = session.config.prune
    if prune.method != "prunadapt" or not prune.target_sparsity:
        return None
    return PruningSchedule.from_fractions(
        session.total_steps, prune.prune_start, prune.prune_end, prune.num_decisions, prune.target_sparsity
    )


def learning_rate_schedule(session: Session, pruning: PruningSchedule | None) -> LearningRateSchedule:
    train, total = session.config.train, session.total_steps
    level = pruning.end_step if pruning and train.lr_scheduler_type == "warmup_stable_decay" else 0
    return LearningRateSchedule(round(train.warmup_ratio * total), total, level)


def distill_weight(session: Session, pruning: PruningSchedule | None, step: int) -> float:
    """Weight of the teacher in the loss of the step after `step`; 0 as long as there is none."""
    prune = session.config.prune
    if pruning is None or session.teacher is None:
        return 0.0
    return prune.distill_weight * (pruning.teacher_factor(step, session.total_steps) if prune.distill_fades else 1.0)


def decide_and_cut(session: Session, pruning: PruningSchedule, step: int) -> None:
    """One all-reduce, one global decision, the same on every rank; the masks follow."""
    prune = session.config.prune
    if step == pruning.decision_steps[0]:
        keep_teacher(session, step)
    assert session.recorder is not None and session.scores is not None
    with session.clocks.timed("importance"):
        window = session.recorder.all_reduce()
        fault_point(f"decide-{step}")
        scores = session.scores.update(CRITERIA[prune.criterion].score(window), seen=session.plan.passed())
        plan = decide(
            scores,
            session.backbone.structure,
            pruning.sparsity(step),
            budget=prune.budget,
            neuron_multiple=prune.neuron_multiple,
            gone=~session.present.mask(),
            uniform=prune.uniform,
        )
        distributed.same_on_all_ranks(f"the pruning plan of step {step}", plan.hash)
        gates.apply_mask(session.model, plan.mask()[session.present.mask()])
    session.plan = plan
    scales = engines.gate_values(session.model)
    session.tracker.show(lambda writer: board.decision(writer, step=step, plan=plan, scores=scores, gates=scales))
    if pays_to_shrink(session, pruning, step):
        start = time.perf_counter()
        with session.clocks.timed("shrink"):
            shrink_model(session)
        seconds = time.perf_counter() - start
        session.tracker.say(f"step {step}: shrunk to {1 - plan.sparsity(prune.budget):.1%} in {seconds:.1f} s")
    if prune.save_scores:
        seen = (i for s in range(pruning.window_start(step), step) for i in session.sampler.step_samples(s))
        save_sums(window, session.output_dir / "scores", step, [session.train_rows.places[i] for i in seen])


def pays_to_shrink(session: Session, pruning: PruningSchedule, step: int) -> bool:
    """Whether a smaller engine earns back what rebuilding it costs, from the seconds measured in this run."""
    structure, steps = session.backbone.structure, pruning.decision_steps
    when = session.config.prune.shrink
    if session.plan.hash == session.present.hash or when == "never":
        return False
    times = session.clocks.weighed_steps
    if when == "always" or times == StepTimes():
        return when == "always"
    if step in session.rebuilt:  # decided already, before the run was interrupted
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
    """Rebuild the engine around the model that `session.plan` leaves."""
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


def keep_teacher(session: Session, step: int) -> None:
    """The dense model, at its mean weights so far: its score, and its logits on the training set for distillation."""
    with averaged(session.engine, session.average):
        metrics, _ = evaluate(session)
        if session.config.prune.distill_weight > 0:
            with session.clocks.timed("teacher"):
                session.teacher = taught(session) if knows_enough(session, step) else None
    session.average = WeightAverage()
    session.report["metric"]["teacher"] = metrics
    session.tracker.log(step, "teacher", {"eval/score": metrics["score"]})


def knows_enough(session: Session, step: int) -> bool:
    """Whether the teacher explains enough of a few hundred training labels to be worth a pass over all of them."""
    if session.data.is_language:
        return True
    some, least = session.train_rows.sample(TEACHER_TRIAL), session.config.prune.distill_min_r2
    logits = predict(session.engine, some, eval_batch(session), session.device)
    r2 = explained(logits, some.labels, session.data.is_regression)
    followed = bool(distributed.broadcast_object(r2 >= least))
    session.report["distillation"] = {"r2": r2, "followed": followed}
    if not followed:
        share = f"it explains {r2:.1%} of the training labels, --distill_min_r2 asks for {least:.1%}"
        session.tracker.say(f"step {step}: the dense model is no teacher yet: {share}")
    return followed


def taught(session: Session) -> Tensor | TokenTeacher:
    """What the engine's model answers to the training set: logits, or of language the likeliest words, on disk."""
    rows, batch_size, top_k = session.train_rows, eval_batch(session), session.config.prune.distill_top_k
    if not session.data.is_language:
        return predict(session.engine, rows, batch_size, session.device)
    folder = session.output_dir / token_teacher.FOLDER
    watchdog.rest()  # every token is counted first
    session.tracker.say(f"the teacher's {top_k} likeliest words: {num_bytes(rows, top_k) / 2**20:.1f} MiB in {folder}")
    return token_teacher.write(session.engine, rows, top_k, batch_size, session.device, folder)


class _Interval:
    """Samples per second since the last call."""

    def __init__(self, samples: int) -> None:
        self.samples, self.time = samples, time.perf_counter()

    def rate(self, samples: int) -> float:
        now = time.perf_counter()
        rate = (samples - self.samples) / (now - self.time)
        self.samples, self.time = samples, now
        return rate
