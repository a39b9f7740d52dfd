"""The loss of each sample: the task's, mixed with distillation from the run's own dense model once that is its teacher.

Legend: B samples, C classes (1 for regression), T tokens, V vocabulary, M target tokens of all B samples, k most likely tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prunadapt_ds.reload import token_losses


def task_loss(logits: Tensor, labels: Tensor, is_regression: bool) -> Tensor:
    """Cross entropy, or squared error: logits [B, C], labels [B] -> float32 [B]. For language models [B, T, V] and [B, T]."""
    if logits.dim() == 3:
        sums, counts = token_losses(logits, labels)
        return sums / counts.clamp(min=1)  # each sequence's own mean, independent of the rest of its batch
    if is_regression:
        return (logits.float().squeeze(-1) - labels.float()).square()
    return F.cross_entropy(logits.float(), labels, reduction="none")


def distillation_loss(logits: Tensor, teacher_logits: Tensor, is_regression: bool) -> Tensor:
    """KL(teacher || student), or squared error for regression: logits [B, C] twice -> float32 [B]."""
    if is_regression:
        return (logits.float() - teacher_logits.float()).square().squeeze(-1)
    teacher, student = teacher_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def trust(teacher_logits: Tensor, labels: Tensor, is_regression: bool) -> Tensor:
    """How far to follow the teacher on each sample: its logits [B, C], labels [B] -> float32 [B] in [0, 1].

    That is the probability it assigns to the true class, or 1 for regression.
    """
    if is_regression:
        return torch.ones(len(teacher_logits), device=teacher_logits.device)
    return teacher_logits.float().softmax(-1).gather(1, labels[:, None]).squeeze(1)


def pseudo_r2(logits: Tensor, labels: Tensor, is_regression: bool) -> float:
    """The share of the best constant prediction's loss on labels [N] that logits [N, C] remove.

    That is R2 for regression and McFadden's R2 for classification: at most 1, 0 for a model that knows only the class
    frequencies, negative for a worse one. If all labels are the same there is nothing to explain, and it is 0.
    """
    if is_regression:
        constant = labels.float().var(correction=0)
    else:
        shares = labels.unique(return_counts=True)[1] / len(labels)
        constant = -torch.xlogy(shares, shares).sum()
    return float(1 - task_loss(logits, labels, is_regression).mean() / constant) if constant > 0 else 0.0


@dataclass(frozen=True)
class TopTokens:
    """A teacher's k most likely tokens for each target token: token ids int64 and log-probabilities float32, [M, k] each."""

    words: Tensor
    log_probs: Tensor

    def to(self, device: torch.device) -> TopTokens:
        return TopTokens(self.words.to(device), self.log_probs.to(device))


def language_losses(logits: Tensor, labels: Tensor, teacher: TopTokens, distill_weight: float) -> tuple[Tensor, Tensor]:
    """`losses_and_distillation` per token, then averaged over each sequence: [B, T, V], [B, T] -> float32 [B] twice.

    The KL divergence is over k + 1 outcomes: the teacher's k tokens, and any other token. Trust is the probability that the
    teacher assigns to the target token, 0 if that is none of the k.
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
    """Append the log-probability of all other tokens together, at least log(1e-6): [M, k] -> [M, k + 1]."""
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
    """The loss of each sample, float32 [B]: (1 - w) * task + w * distillation with w = distill_weight * trust.

    `teacher`: its logits [B, C], or its `TopTokens` for a language model; None for the task's loss alone. It is taken partway
    through training and may be poor, so each sample follows it only as far as it got that sample right (see `trust`). Trust
    depends on the sample alone, so a step's loss is the same for every split of its samples.
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
    """`sample_losses`, and each sample's distance from the teacher, float32 [B], unweighted and without gradient.

    The distance is None if no teacher is followed.
    """
    if teacher is None or distill_weight == 0:
        return task_loss(logits, labels, is_regression), None
    if isinstance(teacher, TopTokens):
        return language_losses(logits, labels, teacher, distill_weight)
    loss, distillation = task_loss(logits, labels, is_regression), distillation_loss(logits, teacher, is_regression)
    trusted = trust(teacher, labels, is_regression)
    return torch.lerp(loss, distillation, distill_weight * trusted), distillation.detach()
