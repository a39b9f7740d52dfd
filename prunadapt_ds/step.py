"""One optimizer step: losses and gradients of its micro-batches, their statistics, and what it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from prunadapt_ds import memory
from prunadapt_ds.batches import Batch
from prunadapt_ds.importance import Recorder
from prunadapt_ds.objective import TopWords, sample_losses
from prunadapt_ds.session import Session
from prunadapt_ds.token_teacher import TokenTeacher

StepLosses = list[tuple[list[int], Tensor]]  # by micro-batch: the samples, and the loss of each


def train_step(session: Session, step: int, *, record: bool, distill_weight: float = 0.0) -> StepLosses:
    """One optimizer step over all micro-batches; returns the samples of each and their losses.

    The step's mean loss on this rank's share (scalar tensor) joins `session.losses`.
    """
    engine, recorder = session.engine, session.recorder if record else None
    total = torch.zeros((), device=session.device)
    seen: StepLosses = []
    for positions, weight in session.sampler.micro_batches(step):
        batch = session.train_rows.batch(positions, weight).to(session.device)
        losses = forward_backward(session, batch, recorder, distill_weight)
        total += (losses * batch.weights).sum() / session.sampler.accumulation_steps
        seen.append((positions, losses))
        engine.step()
    session.losses.append(total)
    return seen


def forward_backward(session: Session, batch: Batch, recorder: Recorder | None, distill_weight: float) -> Tensor:
    """Loss of each sample [B] and gradients of one micro-batch; the recorder learns with which factor autograd sees each."""
    engine = session.engine
    if recorder is not None:
        # DeepSpeed divides by the accumulation steps on top of our weights.
        coefficients = batch.weights / session.sampler.accumulation_steps
        recorder.begin(coefficients, batch.inputs["attention_mask"])
    logits = engine(**batch.inputs).logits
    losses = sample_losses(
        logits,
        batch.labels,
        is_regression=session.data.is_regression,
        teacher=teacher_answers(session, batch) if distill_weight else None,
        distill_weight=distill_weight,
    )
    engine.backward((losses * batch.weights).sum())
    if recorder is not None:
        recorder.end()
    return losses.detach()


def teacher_answers(session: Session, batch: Batch) -> Tensor | TopWords:
    assert session.teacher is not None
    if isinstance(session.teacher, TokenTeacher):
        return session.teacher.answers(batch.index.tolist()).to(session.device)
    return session.teacher[batch.index].to(session.device)


@contextlib.contextmanager
def watched(session: Session, step: int) -> Iterator[None]:
    """Time a step; on the first with an engine, and on those with longer samples than before, count what autograd saves."""
    length = max(session.train_rows.lengths[i] for i in session.sampler.step_samples(step))
    if length <= session.watched_length:
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        size = session.present.cost("macs")
        session.step_times.add(size, time.perf_counter() - start)
        session.step_cpu_times.add(size, time.process_time() - cpu_start)
        return
    saved = memory.SavedActivations()
    with saved.watch():
        yield
    session.activation_bytes = saved.bytes // session.sampler.accumulation_steps
    session.note_live()
    session.watched_length = length
