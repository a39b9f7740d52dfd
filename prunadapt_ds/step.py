"""One optimizer step: losses and gradients of its micro-batches, their statistics, and what it took."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from prunadapt_ds import memory
from prunadapt_ds.batches import Batch
from prunadapt_ds.importance import Recorder
from prunadapt_ds.objective import TopTokens, losses_and_distillation
from prunadapt_ds.session import Session
from prunadapt_ds.token_teacher import TokenTeacher

StepLosses = list[tuple[list[int], Tensor]]  # by micro-batch: the samples, and the loss of each


def watched_step(session: Session, step: int, *, record: bool, distill_weight: float = 0.0) -> StepLosses:
    """`train_step`, timed; on the first with an engine, and on those with longer samples than before, what autograd saves is
    counted instead. Collective."""
    length = max(session.train_rows.lengths[i] for i in session.sampler.step_samples(step))
    if length <= session.memory.watched_length:
        with session.clocks.timed_step(session.present.cost("macs"), records=record):
            return train_step(session, step, record=record, distill_weight=distill_weight)
    saved = memory.SavedActivations()
    losses = train_step(session, step, record=record, distill_weight=distill_weight, saved=saved)
    session.memory.note_activations(saved.bytes, length)
    session.note_live()
    return losses


def train_step(
    session: Session,
    step: int,
    *,
    record: bool,
    distill_weight: float = 0.0,
    saved: memory.SavedActivations | None = None,
) -> StepLosses:
    """One optimizer step over all micro-batches; returns the samples of each and their losses. `saved` counts them one by one.

    The step's means on this rank's share join `session.losses`: float [3], the loss, the distance from the teacher, and 1 if
    there was one. They stay on the device: nobody waits for them before they are logged.
    """
    engine, recorder = session.engine, session.recorder if record else None
    means = torch.zeros(3, device=session.device)
    seen: StepLosses = []
    for positions, weight in session.sampler.micro_batches(step):
        batch = session.train_rows.batch(positions, weight).to(session.device)
        with saved.watch() if saved else contextlib.nullcontext():
            losses, distillation = forward_backward(session, batch, recorder, distill_weight)
        parts = (losses, distillation) if distillation is not None else (losses,)
        for place, values in enumerate(parts):
            means[place] += (values * batch.weights).sum() / session.sampler.accumulation_steps
        seen.append((positions, losses))
        engine.step()
    means[2] = float(distill_weight > 0)
    session.losses.append(means)
    return seen


def forward_backward(
    session: Session, batch: Batch, recorder: Recorder | None, distill_weight: float
) -> tuple[Tensor, Tensor | None]:
    """Loss of each sample [B] and its distance from the teacher, and gradients of one micro-batch.

    The recorder learns with which factor autograd sees each sample.
    """
    engine = session.engine
    if recorder is not None:
        # DeepSpeed divides by the accumulation steps on top of our weights.
        coefficients = batch.weights / session.sampler.accumulation_steps
        recorder.begin(coefficients, batch.inputs["attention_mask"])
    logits = engine(**batch.inputs).logits
    losses, distillation = losses_and_distillation(
        logits,
        batch.labels,
        teacher_answers(session, batch) if distill_weight else None,
        is_regression=session.data.is_regression,
        distill_weight=distill_weight,
    )
    engine.backward((losses * batch.weights).sum())
    if recorder is not None:
        recorder.end()
    return losses.detach(), distillation


def teacher_answers(session: Session, batch: Batch) -> Tensor | TopTokens:
    assert session.teacher is not None
    if isinstance(session.teacher, TokenTeacher):
        return session.teacher.answers(batch.index.tolist()).to(session.device)
    return session.teacher[batch.index].to(session.device)
