"""The run as its own teacher: when the dense model's answers are taken, and how far they are followed."""

from __future__ import annotations

from torch import Tensor

from prunadapt_ds import distributed, token_teacher, watchdog
from prunadapt_ds.logits import predict
from prunadapt_ds.objective import pseudo_r2
from prunadapt_ds.schedule import PruningSchedule
from prunadapt_ds.session import Session, evaluate
from prunadapt_ds.token_teacher import TokenTeacher, num_bytes
from prunadapt_ds.weight_average import WeightAverage, averaged

TEACHER_TRIAL = 256  # training examples that show whether the teacher knows enough


def distill_weight(session: Session, pruning: PruningSchedule | None, step: int) -> float:
    """Weight of the teacher in the loss of the step after `step`; 0 if there is no teacher."""
    prune = session.config.prune
    if pruning is None or session.teacher is None:
        return 0.0
    return prune.distill_weight * (pruning.teacher_factor(step, session.total_steps) if prune.distill_fades else 1.0)


def keep_teacher(session: Session, step: int) -> None:
    """Score the dense model at its mean weights, and keep its answers on the training set for distillation. Collective."""
    with averaged(session.engine, session.average):
        metrics, _ = evaluate(session)
        if session.config.prune.distill_weight > 0:
            with session.clocks.timed("teacher"):
                session.teacher = answers_of_teacher(session) if knows_enough(session, step) else None
    session.average = WeightAverage()
    session.report["metric"]["teacher"] = metrics
    session.tracker.log(step, "teacher", {"eval/score": metrics["score"]})


def knows_enough(session: Session, step: int) -> bool:
    """Whether the teacher explains enough of a few hundred training labels to be worth a pass over all of them.

    Always True for language models.
    """
    if session.data.task.is_language:
        return True
    some, least = session.train_rows.sample(TEACHER_TRIAL), session.config.prune.distill_min_r2
    logits = predict(session.engine, some, session.eval_batch_size, session.device)
    r2 = pseudo_r2(logits, some.labels, session.data.task.is_regression)
    followed = bool(distributed.broadcast_object(r2 >= least))
    session.report["distillation"] = {"r2": r2, "followed": followed}
    if not followed:
        share = f"it explains {r2:.1%} of the training labels, --distill_min_r2 requires {least:.1%}"
        session.tracker.say(f"step {step}: the dense model is not used as a teacher: {share}")
    return followed


def answers_of_teacher(session: Session) -> Tensor | TokenTeacher:
    """The engine's answers on the training set: logits [N, C], or a language model's most likely tokens, on disk. Collective."""
    rows, batch_size, top_k = session.train_rows, session.eval_batch_size, session.config.prune.distill_top_k
    if not session.data.task.is_language:
        return predict(session.engine, rows, batch_size, session.device)
    folder = session.output_dir / token_teacher.FOLDER
    watchdog.rest()  # first all tokens are counted, which may take a while
    session.tracker.say(
        f"the teacher's {top_k} most likely tokens: {num_bytes(rows, top_k) / 2**20:.1f} MiB in {folder}"
    )
    return token_teacher.write(session.engine, rows, top_k, batch_size, session.device, folder)
