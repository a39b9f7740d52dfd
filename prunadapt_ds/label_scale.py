"""Regression labels in units of their spread: learning rates suit labels of size 1 around 0, others are percent, years, prices.

A regression trains its head on (label - mean) / std. Predictions are turned back wherever they leave the training,
and exports have both numbers folded into the head, so that whoever loads them reads the labels' own unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds.backbone import Backbone
from prunadapt_ds.data import TaskData
from prunadapt_ds.engine import gathered
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.labels import task_head_linears

MOST_ROUNDED = 1 / 16  # of a standard deviation
SMALLEST_WEIGHT = 2**-8  # of a head that answers with numbers around 1, of those that matter
MOST_STDS = 16.0  # from the mean, that answers stay within
FAR = 3.0  # standard deviations from 0 beyond which a mean that the head cannot learn by itself is worth a word


@dataclass(frozen=True)
class LabelScale:
    """Mean and standard deviation of the training labels; as it is by default, labels are learnt in their own unit."""

    mean: float = 0.0
    std: float = 1.0

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether answers in the labels' own unit keep their spread in `dtype`: within its range, and finer than its steps."""
        limits = torch.finfo(dtype)
        is_fine = limits.eps * abs(self.mean) <= self.std * MOST_ROUNDED
        smallest = limits.smallest_normal / SMALLEST_WEIGHT  # below it, the head's weights lose digits
        return is_fine and self.std >= smallest and abs(self.mean) + MOST_STDS * self.std < limits.max

    def standardised(self, labels: Tensor) -> Tensor:
        """Labels (or answers) as the head learns them, float32 of the same shape; what has no scale as it is, class numbers too."""
        return labels if self == OWN_UNIT else ((labels.double() - self.mean) / self.std).float()

    def restored(self, logits: Tensor) -> Tensor:
        """What the training model answers, float32 [N, C], in the labels' own unit."""
        return logits if self == OWN_UNIT else (logits.double() * self.std + self.mean).float()


OWN_UNIT = LabelScale()


def refuse_dtype(scale: LabelScale, dtype: str | None) -> None:
    """Raise UserError if exports were asked for in a dtype that cannot hold the labels' own unit. `dtype`: None if it was not."""
    if dtype is not None and not scale.fits(getattr(torch, dtype)):
        remedy = f"cannot hold labels around {scale.mean:.4g} that differ by about {scale.std:.2g}; take float32"
        raise UserError(Problem("export_dtype", dtype, remedy))


def of_training(data: TaskData, backbone: Backbone, saved: Mapping[str, Any] | None) -> LabelScale:
    """The scale of a run on `data`; a resumed run keeps the one in the checkpoint `saved` (none in older ones).

    A head without a bias cannot hold a mean, which stays 0 then.
    """
    if saved is not None:
        return LabelScale(*saved.get("label_scale", ()))
    if not data.task.is_regression:
        return OWN_UNIT
    labels = torch.tensor(data.train["label"], dtype=torch.float64)
    mean, std = float(labels.mean()), float(labels.std(correction=0))
    if not 0 < std < float("inf"):
        return OWN_UNIT
    if _output(backbone)[1].bias is not None:
        return LabelScale(mean, std)
    if abs(mean) > FAR * std:
        backbone.notes.append(
            f"the labels lie around {mean:.4g}, {abs(mean) / std:.0f} standard deviations from 0, and the head of this model "
            "has no bias that could learn that: subtract it from your labels"
        )
    return LabelScale(0.0, std)


def fold(scale: LabelScale, backbone: Backbone) -> dict[str, tuple[float, float]]:
    """By name of a head's parameter, (factor, shift) that make it answer in the labels' own unit; {} if it does already."""
    if scale == OWN_UNIT:
        return {}
    name, _ = _output(backbone)
    return {f"{name}.weight": (scale.std, 0.0), f"{name}.bias": (scale.std, scale.mean)}


def unfold(scale: LabelScale, backbone: Backbone) -> None:
    """Make a head that came with the model, and answers in the labels' own unit, answer in that of training. Collective."""
    parameters: dict[str, Any] = dict(backbone.model.named_parameters())
    inside = {parameters[name]: pair for name, pair in fold(scale, backbone).items() if name in parameters}
    with torch.no_grad(), gathered(inside, write_from=0):
        for parameter, (factor, shift) in inside.items():
            parameter.copy_((parameter.double() - shift) / factor)


def _output(backbone: Backbone) -> tuple[str, nn.Linear]:
    """The last linear module of the task head, and its name in the model."""
    module = task_head_linears(backbone)[-1]
    return next(name for name, other in backbone.model.named_modules() if other is module), module
