"""The loss of each sample: the task's own, and distillation from the run's own dense model once there is one.

Legend: B samples, C classes (1 for regression), T tokens, V vocabulary, M target tokens of all B samples, k words.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def explained(logits: Tensor, labels: Tensor, is_regression: bool) -> float:
    """Share of the loss that goes where [N, C] logits take the place of the best constant answer to these labels [N].

    R2 for regression, McFadden's R2 for classification: at most 1, 0 for what knows only how frequent the classes are, and
    less for worse. Where all labels are the same there is nothing to explain: 0.
    """
    if is_regression:
        constant = labels.float().var(correction=0)
    else:
        shares = labels.unique(return_counts=True)[1] / len(labels)
        constant = -torch.xlogy(shares, shares).sum()
    return float(1 - task_loss(logits, labels, is_regression).mean() / constant) if constant > 0 else 0.0


@dataclass(frozen=True)
class TopTokens:
    """What a language model's teacher thinks of each target token: words int64 and their log-probabilities float32, [M, k]."""

    words: Tensor
    log_probs: Tensor

    def to(self, device: torch.device) -> TopTokens:
        return TopTokens(self.words.to(device), self.log_probs.to(device))


def language_losses(logits: Tensor, labels: Tensor, teacher: TopTokens, distill_weight: float) -> tuple[Tensor, Tensor]:
    """As `losses_and_distillation`, token by token, then each sequence's own means: [B, T, V], [B, T] -> float32 [B] twice.

    The KL divergence is that of k + 1 outcomes: the teacher's k words, and any other. Trust is the probability that it
    gives the token's word, 0 if that is none of the k.
    """
    targets = labels[:, 1:]
    real = targets >= 0
    student = logits[:, :-1][real].float().log_softmax(-1)  # [M, V]
    target = targets[real][:, None]  # [M, 1]
    theirs = with_others(teacher.log_probs)  # [M, k + 1]
    ours = with_others(student.gather(1, teacher.words))
    distillation = (theirs.exp() * (theirs - ours)).sum(-1)
    trusted = (teacher.log_probs.exp() * (teacher.words == target)).sum(-1)
    losses = torch.lerp(-student.gather(1, target).squeeze(1), distillation, distill_weight * trusted)  # [M]
    rows, counts = real.nonzero()[:, 0], real.sum(1).clamp(min=1)

    def means(values: Tensor) -> Tensor:
        return torch.zeros(len(labels), device=logits.device).index_add(0, rows, values) / counts

    return means(losses), means(distillation.detach())


def with_others(log_probs: Tensor) -> Tensor:
    """[M, k] -> [M, k + 1]: and the log-probability of all other words together, at least 1e-6."""
    others = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return torch.cat([log_probs, others.log()], 1)


def sample_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    is_regression: bool,
    teacher: Tensor | TopTokens | None = None,
    distill_weight: float = 0.0,
) -> Tensor:
    """float32 [B]: (1 - w) * task + w * distillation, w = distill_weight * trust; the task's loss alone without a teacher.

    `teacher`: its logits [B, C], of language its words. It is taken after a part of the training and may be poor, so it is
    followed on a sample as far as it got that sample right: `trust` is the probability that it gives the true class (1 for
    regression). It depends on the sample alone, so that a step's loss stays the same for every split of its samples.
    """
    return losses_and_distillation(logits, labels, teacher, is_regression=is_regression, distill_weight=distill_weight)[
        0
    ]


def losses_and_distillation(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | TopTokens | None,
    *,
    is_regression: bool,
    distill_weight: float,
) -> tuple[Tensor, Tensor | None]:
    """`sample_losses`, and beside it how far each sample is from the teacher, without weight or gradient: float32 [B].

    None instead where no teacher is followed.
    """
    if teacher is None or distill_weight == 0:
        return task_loss(logits, labels, is_regression), None
    if isinstance(teacher, TopTokens):
        return language_losses(logits, labels, teacher, distill_weight)
    loss, distillation = task_loss(logits, labels, is_regression), distillation_loss(logits, teacher, is_regression)
    trusted = trust(teacher, labels, is_regression)
    return torch.lerp(loss, distillation, distill_weight * trusted), distillation.detach()
