"""The loss of each sample: the task's own, and distillation from the run's own dense model once there is one.

Legend: B samples, C classes (1 for regression).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def task_loss(logits: Tensor, labels: Tensor, is_regression: bool) -> Tensor:
    """Cross entropy, or squared error: logits [B, C], labels [B] -> float32 [B]."""
    if is_regression:
        return (logits.float().squeeze(-1) - labels.float()).square()
    return F.cross_entropy(logits.float(), labels, reduction="none")


def distillation_loss(logits: Tensor, teacher_logits: Tensor, is_regression: bool) -> Tensor:
    """KL(teacher || student), or squared error: [B, C] twice -> float32 [B]."""
    if is_regression:
        return (logits.float() - teacher_logits.float()).square().squeeze(-1)
    teacher, student = teacher_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def sample_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    is_regression: bool,
    teacher_logits: Tensor | None = None,
    distill_weight: float = 0.0,
) -> Tensor:
    """float32 [B]: (1 - distill_weight) * task + distill_weight * distillation, or the task's alone without a teacher."""
    loss = task_loss(logits, labels, is_regression)
    if teacher_logits is None or distill_weight == 0:
        return loss
    distillation = distillation_loss(logits, teacher_logits, is_regression)
    return torch.lerp(loss, distillation, distill_weight)
