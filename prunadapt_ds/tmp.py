"""The selection rule of "Task-oriented Memory-efficient Pruning-Adapter" (arXiv 2303.14704).

Heads are ranked once, before training, by the absolute gradient of their mask. The least important ones are cut in one shot;
LoRA on q, k, v gets a higher rank in the layers whose heads rank highest.

Legend: L layers, N heads per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CUT_FRACTION = 43 / 144  # the paper's 43 of BERT-base's 144 heads
IMPORTANT_FRACTION = 1 / 3  # the paper's 4 of 12 layers
IMPORTANT_RANK, OTHER_RANK = 8, 4


@dataclass(frozen=True)
class Selection:
    """What to keep and how to adapt it. keep: bool [L, N].  rank_per_layer: LoRA rank of each layer."""

    keep: Tensor
    rank_per_layer: dict[int, int]


def head_ranks(scores: Tensor) -> Tensor:
    """Global ranks of heads: float [L, N] -> int64 [L, N], 0 for the least important. Equal scores rank by index.

    scores: sums over samples of |dL/dm|. Each layer is normalised to length 1 (L2), then all heads together to [0, 1].
    """
    normal = scores.double() / scores.double().norm(dim=1, keepdim=True).clamp(min=1e-20)
    spread = (normal - normal.min()) / (normal.max() - normal.min()).clamp(min=1e-20)
    order = torch.argsort(spread.flatten(), stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return ranks.view_as(scores)


def important_layers(ranks: Tensor) -> list[int]:
    """The round(L / 3) layers with the largest sum of head ranks, int64 [L, N], largest first."""
    count = round(ranks.shape[0] * IMPORTANT_FRACTION)
    return torch.argsort(ranks.sum(1), descending=True, stable=True)[:count].tolist()


def select_from_ranks(ranks: Tensor, floors: Sequence[int] = ()) -> Selection:
    """Cut the round(43/144 * L * N) heads with the lowest ranks; LoRA rank 8 in the most important third of layers, else 4.

    ranks: int64 [L, N]. `floors`: how many heads must stay in each layer (decoders only; the paper has no such limit). Those
    are the layer's best heads, and the next in rank are cut instead.
    """
    num_cut = round(CUT_FRACTION * ranks.numel())
    important = important_layers(ranks)
    protected = torch.zeros_like(ranks, dtype=torch.bool)
    for row, floor, layer in zip(protected, floors, ranks, strict=False):
        row[layer.topk(floor).indices] = True
    order = torch.where(protected, ranks.numel(), ranks).flatten().argsort(stable=True)
    keep = torch.ones(ranks.numel(), dtype=torch.bool)
    keep[order[: min(num_cut, int((~protected).sum()))]] = False
    layers = range(ranks.shape[0])
    return Selection(keep.view_as(ranks), {i: IMPORTANT_RANK if i in important else OTHER_RANK for i in layers})


def select(scores: Tensor, floors: Sequence[int] = ()) -> Selection:
    """Choose the heads to keep and each layer's LoRA rank from the scores of all heads, float [L, N]."""
    return select_from_ranks(head_ranks(scores), floors)
