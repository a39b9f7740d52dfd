"""The whole run, top to bottom: set up, adapt, prune while training, finish.

This module ties the others together; only launchers import it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prunadapt_ds import board, distributed, earlier_run, gates, resume, snapshot, token_teacher, watchdog
from prunadapt_ds import engine as engines
from prunadapt_ds import report as reports
from prunadapt_ds.budget import decide
from prunadapt_ds.config import Config, parse
from prunadapt_ds.distillation import distill_weight, keep_teacher
from prunadapt_ds.entry import guarded, owned_folder
from prunadapt_ds.errors import PrunadaptError, UserError
from prunadapt_ds.faults import fault_point
from prunadapt_ds.finish import finish, report_unfinished
from prunadapt_ds.importance import CRITERIA, save_sums
from prunadapt_ds.inputs import read_inputs
from prunadapt_ds.keeper import Keeper
from prunadapt_ds.one_shot import prune_once, score_only
from prunadapt_ds.progress import Interval, log_interval, say_what_will_happen
from prunadapt_ds.rebuild import pays_to_shrink, shrink_model
from prunadapt_ds.schedule import LearningRateSchedule, PruningSchedule
from prunadapt_ds.session import Session, add_trainables, evaluate
from prunadapt_ds.setup import setup
from prunadapt_ds.signals import StopSignals
from prunadapt_ds.step import watched_step


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (None: the command line) and run; returns the process's exit code (see errors.py)."""
    return guarded(lambda: run(parse(argv), process_ends=True))


def run(config: Config, *, process_ends: bool = False) -> dict[str, Any]:
    """Do one training run on the calling rank; returns the report, which rank 0 writes to `output_dir`. Collective.

    With --score_only no report is written. Raises UserError for the user's mistakes, and other PrunadaptErrors if the run fails.
    `process_ends`: whether the process has nothing else to do. A run that was asked to stop then ignores all further signals.
    """
    distributed.init()
    with owned(config, process_ends) as signals:
        try:
            start = earlier_run.find(config)
        except UserError as error:
            raise error.beside(lambda: read_inputs(config)) from error
        if start.finished is not None:
            token_teacher.remove(Path(config.output.output_dir) / token_teacher.FOLDER)  # if it was killed in between
            say_finished(config, start.finished)
            return start.finished
        session = setup(config, start.saved)
        session.options = start.options
        if start.checkpoint is not None:
            go_on(session, start)
        else:
            begin(session)
        keeper = Keeper(session, signals, start.checkpoint)
        if config.prune.score_only:
            score_only(session, keeper.stop_if_asked)
            return session.report
        try:
            fit(session, keeper)
            finish(session, keeper.stop_if_asked)
        except PrunadaptError as error:
            report_unfinished(session, error)
            raise
        token_teacher.remove(session.output_dir / token_teacher.FOLDER)
    return session.report


def begin(session: Session) -> None:
    """Begin a new run: clear the output folder, make the one-shot cut of --method tmp, and build the engine."""
    if not session.config.prune.score_only:
        resume.begin(session)
    if session.config.prune.method == "tmp":
        prune_once(session)
    add_trainables(session)
    snapshot.seed_this_rank(session.config.train.seed, step=0)


def go_on(session: Session, start: earlier_run.Start) -> None:
    """Resume an interrupted run: restore the shape of its model and what it had learnt."""
    assert start.checkpoint is not None
    resume.restore(session, start.checkpoint)
    resume.keep_options(session)
    for note in start.notes:
        session.tracker.say(note)
    session.tracker.say(f"goes on after step {session.step} of {session.total_steps}, from {start.checkpoint.folder}")


@contextlib.contextmanager
def owned(config: Config, process_ends: bool) -> Iterator[StopSignals]:
    """Lock the output folder, start the watchdog, and let stop signals end the run in good order instead of the process."""
    folder = Path(config.output.output_dir)
    with owned_folder(folder):
        signals = StopSignals(speaks=distributed.rank() == 0)
        signals.listen()
        watchdog.start(folder, distributed.rank())
        try:
            yield signals
        finally:
            watchdog.stop()
            if not (process_ends and signals.name):  # the launcher may send a stop signal again while the process ends
                signals.forget()


def say_finished(config: Config, report: dict[str, Any]) -> None:
    if distributed.rank() == 0:
        print(f"{config.output.output_dir}: this run is complete already; to run it again, pass --resume never")
        print(reports.table(report))


def fit(session: Session, keeper: Keeper | None = None) -> None:
    """Train from `session.step` to the last step, and prune at the steps that the schedule names."""
    config, keeper = session.config, keeper or Keeper(session, StopSignals())
    pruning = pruning_schedule(session)
    rates = learning_rate_schedule(session, pruning)
    interval = Interval(session.sampler.samples_before(session.step))
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
            evaluates = config.train.eval_steps is not None and done % config.train.eval_steps == 0
            keeper.step_done(losses, settle=decides or evaluates)
        fault_point(f"step-{done}")
        if pruning and config.prune.distill_weight and pruning.averages_at(done, config.prune.teacher_window):
            with session.clocks.timed("teacher"):
                session.average.add(session.engine)
        if pruning and decides:
            if done == pruning.decision_steps[0]:
                keep_teacher(session, done)
            decide_and_cut(session, pruning, done)
        if evaluates:
            score = evaluate(session)[0]["score"]
            session.tracker.log(done, phase, {"eval/score": score, "time/train(s)": session.clocks.train_seconds()})
        if done % config.train.logging_steps == 0 or done == session.total_steps:
            with session.clocks.timed(f"{phase}_phase"):
                log_interval(session, phase, pruning, interval, learning_rates)
        session.tracker.advance(done, phase)
        keeper.save_if_due()


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


def decide_and_cut(session: Session, pruning: PruningSchedule, step: int) -> None:
    """Make one global decision from one all-reduce, the same on every rank; set the masks, and shrink the model if it pays."""
    prune = session.config.prune
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
        if prune.save_scores:
            seen = (i for s in range(pruning.window_start(step), step) for i in session.sampler.step_samples(s))
            save_sums(window, session.output_dir / "scores", step, [session.train_rows.places[i] for i in seen])
        pays = pays_to_shrink(session, pruning, step)
    if pays:
        start = time.perf_counter()
        with session.clocks.timed("shrink"):
            shrink_model(session)
        seconds = time.perf_counter() - start
        session.tracker.say(f"step {step}: shrunk to {1 - plan.sparsity(prune.budget):.1%} in {seconds:.1f} s")
