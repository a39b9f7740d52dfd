"""Frozen norms that keep their output for the backward pass, and not their input.

LoRA on the projections behind a norm keeps its output alive in any case; its input, the sum in the residual stream, nobody
else keeps. So a block saves two tensors [B, T, H] less. What the backward pass needs of the input, the normalised values, is
in the output (as in-place batch normalisation has it: Rota Bulo et al., arXiv 1712.02616):

    xhat = (y - b) / s                                   s = w, or 1 + w in the Gemma family; b = 0 in RMS norms
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))    g = dy * s; RMS norms have no mean(g)

Where the shift is larger than the scale, what `y` was rounded by would count for more than itself: `xhat` of these few
entries is kept. Legend: B samples, T tokens, H width of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

LEAST_SCALE = 2.0**-10
FP32_ELEMENTS = {"cpu": 2**18}  # of the copies that an RMS norm's backward pass works with; they stay in a CPU's cache
_ELSEWHERE = 2**26


class _FromOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: _KeepsOutput) -> Tensor:
        y, mean, rstd = norm.normalised(x)
        lost, kept = norm.lost(), None
        if lost is not None and len(lost):
            kept = ((x[..., lost] if mean is None else x[..., lost] - mean) * rstd).to(y.dtype)
        ctx.norm = norm
        ctx.save_for_backward(y, rstd, kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        y, rstd, kept = ctx.saved_tensors
        return ctx.norm.input_gradient(grad_outputs[0], y, rstd, kept), None


class _KeepsOutput(nn.Module):
    """Mixed into the class of a norm. `weight` (and `bias`) are read when they are needed: ZeRO-3 has them whole only then."""

    weight: nn.Parameter
    _lost: Tensor | None = None  # int64 [few]: entries whose values the output does not tell; None: not looked for yet

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad or not (x.requires_grad and torch.is_grad_enabled()) or not self.is_known(x):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return _FromOutput.apply(x, self)  # type: ignore[no-any-return]

    def is_known(self, x: Tensor) -> bool:
        """Whether it computes what stands above."""
        return True

    def lost(self) -> Tensor | None:
        if self._lost is None and not self.weight.is_meta:
            scale, shift = self.scale_and_shift()
            least = LEAST_SCALE if shift is None else shift.abs().clamp(min=LEAST_SCALE)
            self._lost = (scale.abs() < least).nonzero().flatten()
        return self._lost

    def scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        """Float [H] each."""
        raise NotImplementedError

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The output [..., H], and of each row the mean, where it is taken away, and one over the deviation: [..., 1]."""
        raise NotImplementedError

    def input_gradient(self, dy: Tensor, y: Tensor, rstd: Tensor, kept: Tensor | None) -> Tensor:
        raise NotImplementedError

    def xhat(self, y: Tensor, kept: Tensor | None) -> Tensor:
        """The normalised values again, [..., H]."""
        scale, shift = self.scale_and_shift()
        if kept is not None:
            scale = scale.index_fill(0, self._lost, 1.0)  # type: ignore[arg-type]
        inverse = scale.reciprocal().to(y.dtype)
        found = y * inverse if shift is None else torch.addcmul((-shift / scale).to(y.dtype), y, inverse)
        return found if kept is None else found.index_copy_(-1, self._lost, kept)  # type: ignore[arg-type]


class _LayerNorm(_KeepsOutput):
    normalized_shape: tuple[int, ...]
    bias: nn.Parameter | None
    eps: float

    def scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.float(), None if self.bias is None else self.bias.float()

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return torch.native_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def input_gradient(self, dy: Tensor, y: Tensor, rstd: Tensor, kept: Tensor | None) -> Tensor:
        """Torch's own, of values that are normalised already."""
        backward = torch.ops.aten.native_layer_norm_backward
        zero, one, wanted = torch.zeros_like(rstd), torch.ones_like(rstd), [True, False, False]
        xhat = self.xhat(y, kept)
        dx: Tensor = backward(dy, xhat, self.normalized_shape, zero, one, self.weight, self.bias, wanted)[0]
        return dx.mul_(rstd)


class _RMSNorm(_KeepsOutput):
    """`_offset`: 1 where the scale is 1 + weight. Families differ in it and do not say so: what explains the first output
    tells, and a norm that neither does is left alone."""

    _offset: float | None = None

    def is_known(self, x: Tensor) -> bool:
        if self._offset is None:
            self._offset = 0.0 if x.is_meta else self._explains(x.detach().flatten(0, -2)[:16])
        return self._offset >= 0

    def _explains(self, x: Tensor) -> float:
        y, _, rstd = self.normalised(x)
        for offset in (0.0, 1.0):
            expected = x.float() * rstd * (self.weight.float() + offset)
            if torch.allclose(y.float(), expected, rtol=2e-2, atol=1e-3 * float(expected.abs().max())):
                return offset
        return -1.0

    def scale_and_shift(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.float() + (self._offset or 0.0), None

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        eps: float = vars(self).get("variance_epsilon") or vars(self)["eps"]
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return super().forward(x), None, rstd  # type: ignore[misc]

    def input_gradient(self, dy: Tensor, y: Tensor, rstd: Tensor, kept: Tensor | None) -> Tensor:
        scale, _ = self.scale_and_shift()
        dx = torch.empty_like(dy)
        for rows in _runs(y):
            xhat = self.xhat(y[rows].float(), None if kept is None else kept[rows].float())
            g = dy[rows].float() * scale
            dx[rows] = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[rows]
        return dx


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
    """Let every frozen norm of a model keep its output instead of its input. In place; its numbers stay what they were."""
    for module in filter(is_norm, model.modules()):
        weight = getattr(module, "weight", None)
        own = isinstance(module, nn.LayerNorm) and type(module).forward is not nn.LayerNorm.forward  # or ours already
        if isinstance(weight, nn.Parameter) and not (weight.requires_grad or own or isinstance(module, _KeepsOutput)):
            module.__class__ = _keeping(type(module))  # type: ignore[arg-type, assignment]
