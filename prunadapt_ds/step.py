"""One optimizer step: losses and gradients of its micro-batches, their statistics, and its time or memory."""

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

StepLosses = list[tuple[list[int], Tensor]]  # by micro-batch: the samples, and their losses [B]


def watched_step(session: Session, step: int, *, record: bool, distill_weight: float = 0.0) -> StepLosses:
    """Run `train_step` and time it. Collective.

    An engine's first step, and any step with longer samples than all before it, counts what autograd saves and is not timed.
    """
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
    """Run one optimizer step over all micro-batches; returns the samples of each and their losses. Collective.

    `saved` counts what autograd saves in each micro-batch. This rank's share of the step's means is appended to
    `session.losses`: float [3], the loss, the distance from the teacher, and 1 if there was one. They stay on the device, so
    that nothing waits for them until they are logged.
    """
    engine, recorder = session.engine, session.recorder if record else None
    means = torch.zeros(3, device=session.device)
    seen: StepLosses = []
    for positions, weight in session.sampler.micro_batches(step):
        batch = session.train_rows.batch(positions, weight).to(session.device)
        # Before the forward pass: copied behind it, they would keep the host from launching the backward pass.
        teacher = teacher_answers(session, batch) if distill_weight else None
        with saved.watch() if saved else contextlib.nullcontext():
            losses, distillation = forward_backward(session, batch, recorder, teacher, distill_weight)
        parts = (losses, distillation) if distillation is not None else (losses,)
        for place, values in enumerate(parts):
            means[place] += (values * batch.weights).sum() / session.sampler.accumulation_steps
        seen.append((positions, losses))
        engine.step()
    means[2] = float(distill_weight > 0)
    session.losses.append(means)
    return seen


def forward_backward(
    session: Session,
    batch: Batch,
    recorder: Recorder | None,
    teacher: Tensor | TopTokens | None = None,
    distill_weight: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Run forward and backward pass of one micro-batch; returns each sample's loss and distance from the teacher.

    Both are float32 [B]; the distance is None without a teacher. The recorder receives the factor with which each sample's
    loss enters the gradients.
    """
    engine = session.engine
    if recorder is not None:
        # On top of our weights, DeepSpeed divides the loss by the number of accumulation steps.
        coefficients = batch.weights / session.sampler.accumulation_steps
        recorder.begin(coefficients, batch.inputs["attention_mask"])
    logits = engine(**batch.inputs).logits
    losses, distillation = losses_and_distillation(
        logits,
        batch.labels,
        teacher,
        is_regression=session.data.task.is_regression,
        distill_weight=distill_weight,
    )
    engine.backward((losses * batch.weights).sum())
    if recorder is not None:
        recorder.end()
    return losses.detach(), distillation


def teacher_answers(session: Session, batch: Batch) -> Tensor | TopTokens:
    """The teacher's logits [B, C] on a batch, or a language model's `TopTokens`, on the device."""
    assert session.teacher is not None
    if isinstance(session.teacher, TokenTeacher):
        return session.teacher.answers(batch.index.tolist()).to(session.device)
    return session.teacher[batch.index].to(session.device)
