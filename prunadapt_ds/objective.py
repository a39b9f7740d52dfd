"""The loss of each sample: the task's own, and distillation from the run's own dense model once there is one.

Legend: B samples, C classes (1 for regression), T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prunadapt_ds.reload import token_losses


def task_loss(logits: Tensor, labels: Tensor, is_regression: bool) -> Tensor:
    """Cross entropy, or squared error: logits [B, C], labels [B] -> float32 [B]; [B, T, V] and [B, T] for language."""
    if logits.dim() == 3:
        sums, counts = token_losses(logits, labels)
        return sums / counts.clamp(min=1)  # each sequence's own mean, so that no other one of its batch matters
    if is_regression:
        return (logits.float().squeeze(-1) - labels.float()).square()
    return F.cross_entropy(logits.float(), labels, reduction="none")


def distillation_loss(logits: Tensor, teacher_logits: Tensor, is_regression: bool) -> Tensor:
    """KL(teacher || student), or squared error: [B, C] twice -> float32 [B]."""
    if is_regression:
        return (logits.float() - teacher_logits.float()).square().squeeze(-1)
    teacher, student = teacher_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def trust(teacher_logits: Tensor, labels: Tensor, is_regression: bool) -> Tensor:
    """How far to follow the teacher on each sample: its logits [B, C], labels [B] -> float32 [B] in [0, 1]."""
    if is_regression:
        return torch.ones(len(teacher_logits), device=teacher_logits.device)
    return teacher_logits.float().softmax(-1).gather(1, labels[:, None]).squeeze(1)


def sample_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    is_regression: bool,
    teacher_logits: Tensor | None = None,
    distill_weight: float = 0.0,
) -> Tensor:
    """float32 [B]: (1 - w) * task + w * distillation, w = distill_weight * trust; the task's loss alone without a teacher.

    The teacher is taken after a part of the training and may be poor. It is followed on a sample as far as it got that
    sample right: `trust` is the probability that it gives the true class (1 for regression). It depends on the sample
    alone, so that a step's loss stays the same for every split of its samples.
    """
    loss = task_loss(logits, labels, is_regression)
    if teacher_logits is None or distill_weight == 0:
        return loss
    distillation = distillation_loss(logits, teacher_logits, is_regression)
    return torch.lerp(loss, distillation, distill_weight * trust(teacher_logits, labels, is_regression))
