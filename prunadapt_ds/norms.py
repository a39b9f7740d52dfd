"""Norms that save their output for the backward pass instead of their input.

The output is saved in any case, as the input of LoRA in the projections behind the norm; the input, a sum in the residual
stream, is saved by nothing else. So a block saves two tensors [B, T, D] less. The backward pass needs only the normalised
values, which follow from the output (as in in-place batch normalisation: Rota Bulo et al., arXiv 1712.02616):

    xhat = (y - b) / s                                   s = w, or 1 + w in the Gemma family; b = 0 in RMS norms
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))    g = dy * s; RMS norms have no mean(g)
    dw = sum(dy * xhat), db = sum(dy)

A feature whose scale is small, by itself or compared with its shift, is faint in the output: what is recovered of it is
mostly the rounding error of `y`. For the faintest few features, `xhat` itself is saved.

Legend: B samples, T tokens, D width of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

LEAST_SCALE = 2.0**-10
FAINT = 64  # one feature in so many is saved as `xhat`, but at least four
FP32_COPY_ELEMENTS = {"cpu": 2**18}  # of an fp32 copy in an RMS norm's backward pass: small enough for a CPU's cache
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
    """Mixin for the class of a norm. It reads weights only when they are needed, because ZeRO-3 gathers them only then."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        wants = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not wants or not self.is_known(x):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return _FromOutput.apply(x, self.weight, getattr(self, "bias", None), self)  # type: ignore[no-any-return]

    def is_known(self, x: Tensor) -> bool:
        """Whether the norm computes the formulas at the top of this file."""
        return True

    def scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        """s and b of the formulas, float32 [D] each; None for b if there is no shift."""
        raise NotImplementedError

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The output [..., D], and the mean (None if it is not subtracted) and rstd of each row, [..., 1]."""
        raise NotImplementedError

    def gradients(
        self, dy: Tensor, y: Tensor, rstd: Tensor, faint: Tensor, kept: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias; None for those not `wanted`. dy, y: [..., D]; kept: [..., few], `xhat` of `faint`."""
        raise NotImplementedError

    def faint_entries(self) -> Tensor:
        """The faintest features, int64 [few]. They depend on the weights alone: there is no state, and no wait for the device."""
        scale, shift = self.scale_and_shift()
        beside = LEAST_SCALE if shift is None else shift.abs() + LEAST_SCALE
        few = min(len(scale), max(4, len(scale) // FAINT))
        return (beside / scale.abs().clamp(min=LEAST_SCALE**2)).topk(few).indices

    def xhat(self, y: Tensor, faint: Tensor, kept: Tensor) -> Tensor:
        """The normalised values [..., D], recovered from the output."""
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
        """PyTorch's own backward pass, given values that are normalised already."""
        backward = torch.ops.aten.native_layer_norm_backward
        zero, one, xhat = torch.zeros_like(rstd), torch.ones_like(rstd), self.xhat(y, faint, kept)
        dx, dw, db = backward(dy, xhat, self.normalized_shape, zero, one, self.weight, self.bias, wanted)
        return dx.mul_(rstd) if wanted[0] else None, dw, db


class _RMSNorm(_KeepsOutput):
    """`_offset`: 1 if the scale is 1 + weight, 0 if it is the weight, -1 if neither explains what the norm computes.

    Families differ and do not declare it, so it is found from a few synthetic rows, with the same result on every rank. A norm
    that neither explains keeps its own forward pass.
    """

    _offset: float | None = None

    def is_known(self, x: Tensor) -> bool:
        if self._offset is None:
            self._offset = 0.0 if x.is_meta else self._detect_offset(x)
        return self._offset >= 0

    @torch.no_grad()
    def _detect_offset(self, like: Tensor) -> float:
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
        """Epsilon, whatever its name; None if the norm has none, as `nn.RMSNorm` may."""
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
    """Slices of the first axis that are processed at a time."""
    size = max(1, FP32_COPY_ELEMENTS.get(x.device.type, _ELSEWHERE) // max(1, x[0].numel()))
    return (slice(start, start + size) for start in range(0, len(x), size))


@functools.cache
def _keeping(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with the mixin, under the same name because others look for that."""
    how = _LayerNorm if issubclass(kind, nn.LayerNorm) else _RMSNorm
    return type(kind.__name__, (how, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def keep_outputs(model: nn.Module) -> None:
    """Let every norm of a model save its output instead of its input, in place.

    Outputs stay exactly the same; gradients differ by rounding.
    """
    for module in filter(is_norm, model.modules()):
        own = isinstance(module, nn.LayerNorm) and type(module).forward is not nn.LayerNorm.forward  # or already ours
        if isinstance(getattr(module, "weight", None), nn.Parameter) and not (own or isinstance(module, _KeepsOutput)):
            module.__class__ = _keeping(type(module))  # type: ignore[arg-type, assignment]
