"""Norms that keep their output for the backward pass, and not their input.

The projections behind a norm keep its output in any case, as the input of their LoRA; its input, the sum in the residual
stream, nobody else keeps. So a block keeps two tensors [B, T, H] less. What the backward pass needs of the input, the
normalised values, is in the output (as in-place batch normalisation has it: Rota Bulo et al., arXiv 1712.02616):

    xhat = (y - b) / s                                   s = w, or 1 + w in the Gemma family; b = 0 in RMS norms
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))    g = dy * s; RMS norms have no mean(g)
    dw = sum(dy * xhat), db = sum(dy)

An entry whose shift is large beside its scale is faint in the output: most of what is found there is what `y` was rounded
by. Of the faintest few `xhat` itself is kept. Legend: B samples, T tokens, H width of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

LEAST_SCALE = 2.0**-10
FAINT = 64  # one entry in so many, and at least four
FP32_ELEMENTS = {"cpu": 2**18}  # of the copies that an RMS norm's backward pass works with; they stay in a CPU's cache
_ELSEWHERE = 2**26


class _FromOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, norm: _KeepsOutput) -> Tensor:
        y, mean, rstd = norm.normalised(x)
        faint = norm.faint_entries()
        few = x.index_select(-1, faint)
        kept = ((few if mean is None else few - mean) * rstd).to(y.dtype)
        ctx.norm = norm
        ctx.save_for_backward(y, rstd, faint, kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        dx, dw, db = ctx.norm.gradients(grad_outputs[0], *ctx.saved_tensors, ctx.needs_input_grad[:3])
        return dx, dw, db, None


class _KeepsOutput(nn.Module):
    """Mixed into the class of a norm. Weights are read when they are needed: ZeRO-3 has them whole only then."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        wants = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not wants or not self.is_known(x):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return _FromOutput.apply(x, self.weight, getattr(self, "bias", None), self)  # type: ignore[no-any-return]

    def is_known(self, x: Tensor) -> bool:
        """Whether it computes what stands above."""
        return True

    def scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        """Float [H] each."""
        raise NotImplementedError

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The output [..., H], and of each row the mean, where it is taken away, and one over the deviation: [..., 1]."""
        raise NotImplementedError

    def gradients(
        self, dy: Tensor, y: Tensor, rstd: Tensor, faint: Tensor, kept: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the input, the weight and the bias, as far as they are wanted."""
        raise NotImplementedError

    def faint_entries(self) -> Tensor:
        """int64 [few]: the faintest. They hang on the weights alone: nothing to remember, nothing for the host to wait for."""
        scale, shift = self.scale_and_shift()
        beside = LEAST_SCALE if shift is None else shift.abs() + LEAST_SCALE
        few = min(len(scale), max(4, len(scale) // FAINT))
        return (beside / scale.abs().clamp(min=LEAST_SCALE**2)).topk(few).indices

    def xhat(self, y: Tensor, faint: Tensor, kept: Tensor) -> Tensor:
        """The normalised values again, [..., H]."""
        scale, shift = self.scale_and_shift()
        scale = torch.where(scale.abs() < LEAST_SCALE, LEAST_SCALE, scale)
        inverse = scale.reciprocal().to(y.dtype)
        found = y * inverse if shift is None else torch.addcmul((-shift / scale).to(y.dtype), y, inverse)
        return found.index_copy_(-1, faint, kept)


class _LayerNorm(_KeepsOutput):
    normalized_shape: tuple[int, ...]
    eps: float

    def scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.float(), None if self.bias is None else self.bias.float()

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return torch.native_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def gradients(
        self, dy: Tensor, y: Tensor, rstd: Tensor, faint: Tensor, kept: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Torch's own, of values that are normalised already."""
        backward = torch.ops.aten.native_layer_norm_backward
        zero, one, xhat = torch.zeros_like(rstd), torch.ones_like(rstd), self.xhat(y, faint, kept)
        dx, dw, db = backward(dy, xhat, self.normalized_shape, zero, one, self.weight, self.bias, wanted)
        return dx.mul_(rstd) if wanted[0] else None, dw, db


class _RMSNorm(_KeepsOutput):
    """`_offset`: 1 where the scale is 1 + weight. Families differ in it and do not say so: what a few made-up rows become
    tells, on every rank the same, and a norm that neither explains is left alone."""

    _offset: float | None = None

    def is_known(self, x: Tensor) -> bool:
        if self._offset is None:
            self._offset = 0.0 if x.is_meta else self._explained(x)
        return self._offset >= 0

    @torch.no_grad()
    def _explained(self, like: Tensor) -> float:
        if self._eps is None:
            return -1.0
        width = like.shape[-1]
        x = torch.linspace(-3, 5, 4 * width, device=like.device).view(4, width).to(like.dtype)
        y, _, rstd = self.normalised(x)
        for offset in (0.0, 1.0):
            expected = x.float() * rstd * (self.weight.float() + offset)
            if torch.allclose(y.float(), expected, rtol=2e-2, atol=1e-3 * float(expected.abs().max())):
                return offset
        return -1.0

    @property
    def _eps(self) -> float | None:
        """By whichever name; None where it has none, as torch's own may."""
        found = (vars(self).get(name) for name in ("variance_epsilon", "eps"))
        return next((float(eps) for eps in found if eps is not None), None)

    def scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.float() + (self._offset or 0.0), None

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + (self._eps or 0.0))
        return super().forward(x), None, rstd  # type: ignore[misc]

    def gradients(
        self, dy: Tensor, y: Tensor, rstd: Tensor, faint: Tensor, kept: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        scale, _ = self.scale_and_shift()
        dx, dw = torch.empty_like(dy), torch.zeros_like(scale)
        for rows in _runs(y):
            xhat, g = self.xhat(y[rows].float(), faint, kept[rows].float()), dy[rows].float()
            if wanted[1]:
                dw += (g * xhat).flatten(0, -2).sum(0)
            g = g * scale
            dx[rows] = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[rows]
        return dx, dw.to(dy.dtype) if wanted[1] else None, None


def _runs(x: Tensor) -> Iterator[slice]:
    """Runs of samples that are worked on at a time."""
    size = max(1, FP32_ELEMENTS.get(x.device.type, _ELSEWHERE) // max(1, x[0].numel()))
    return (slice(start, start + size) for start in range(0, len(x), size))


@functools.cache
def _keeping(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with the same name, in which others look for it."""
    how = _LayerNorm if issubclass(kind, nn.LayerNorm) else _RMSNorm
    return type(kind.__name__, (how, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def keep_outputs(model: nn.Module) -> None:
    """Let every norm of a model keep its output instead of its input. In place; its numbers stay what they were."""
    for module in filter(is_norm, model.modules()):
        own = isinstance(module, nn.LayerNorm) and type(module).forward is not nn.LayerNorm.forward  # or ours already
        if isinstance(getattr(module, "weight", None), nn.Parameter) and not (own or isinstance(module, _KeepsOutput)):
            module.__class__ = _keeping(type(module))  # type: ignore[arg-type, assignment]
