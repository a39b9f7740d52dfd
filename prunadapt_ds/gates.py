"""Gates: a trained scale and a pruning mask per unit, applied to the input of each output projection.

Legend: B samples, T tokens, U units of a sub-layer, W width of a unit.

    y[b,t,u,:] = x[b,t,u,:] * g[u] * m[u]          g = 1 + delta (trained), m in {0, 1} (decided)

Besides the gradients, the backward pass of this product yields the exact gradient of every sample's own loss with respect
to every mask entry (for heads: Michel et al., arXiv 1905.10650), times the coefficient of that loss in L:

    d[b,u] = sum_{t,w} x[b,t,u,w] * g[u] * dL/dy[b,t,u,w]

For m = 1 this equals r[b,u] = sum_{t,w} y * dL/dy, and the gradient of delta is sum_b r[b,u] / g[u]. So a single reduction
over y, which autograd saves anyway for the LoRA matrix behind the gate, serves both. The columns of x are saved as well only
for units that are cut, where y is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunadapt_ds.models.modeling_prunadapt import Layout, select
from prunadapt_ds.models.structure import Structure, layers_of

GATE_NAME = "prune_gate"
FP32_ELEMENTS = 2**26  # of one fp32 copy on an accelerator
_SMALLEST_GATE = 1e-6  # below this |g| the quotient r / g is meaningless, and delta gets a gradient of zero


class SampleStatistics(Protocol):
    """Receives a gate's statistics of the samples it sees; `importance.Recorder` implements it."""

    active: bool

    @property
    def batch_size(self) -> int: ...

    @property
    def wants_activations(self) -> bool: ...

    def add(self, start: int, d: Tensor) -> None: ...

    def add_activations(self, start: int, x: Tensor) -> None: ...


class _Gating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, gate: Gate) -> Tensor:
        g = 1 + delta.float()  # [U]
        change = torch.where(gate.mask.bool(), delta, -1)[:, None]  # [U, 1], g * m - 1
        units = x.unflatten(-1, (gate.num_units, gate.width))  # [B, T, U, W]
        y = scaled(units, change)
        ctx.recorder = gate.recorder if gate.recorder is not None and gate.recorder.active else None
        cut = gate.cut if ctx.recorder is not None else None
        ctx.save_for_backward(y, g, change, cut, None if cut is None else units.index_select(2, cut))
        ctx.start = gate.start
        return y.flatten(2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, g, change, cut, x_cut = ctx.saved_tensors
        dy = grad_outputs[0].view_as(y)  # [B, T, U, W]
        dx = scaled(dy, change).flatten(2) if ctx.needs_input_grad[0] else None
        r = sum_products(y, dy)  # [B, U]
        if ctx.recorder is not None:
            d = r
            if cut is not None:
                d = r.clone()
                d[:, cut] = sum_products(x_cut, dy.index_select(2, cut)) * g[cut]
            ctx.recorder.add(ctx.start, d)
        d_delta = None
        if ctx.needs_input_grad[1]:
            safe = torch.where(g.abs() < _SMALLEST_GATE, torch.inf, g)
            d_delta = r.sum(0) / safe
        return dx, d_delta, None


def scaled(x: Tensor, change: Tensor) -> Tensor:
    """x * (1 + change), rounded once: [B, T, U, W] and [U, 1] -> [B, T, U, W].

    One fused pass that computes in fp32, so that a change too small for a bf16 `1 + change` still counts, and a change of
    -1 gives exactly zero. On a CPU it is five times as fast as multiplying by an fp32 factor.
    """
    return torch.addcmul(x, x, change)


def sum_products(a: Tensor, b: Tensor) -> Tensor:
    """Per sample and unit, the fp32 sum of a * b over tokens and width: [B, T, U, W] twice -> float32 [B, U]."""
    if a.device.type != "cpu":
        rows = max(1, FP32_ELEMENTS // a[0].numel())  # at a time: fp32 copies of all would be the peak of a step
        pairs = zip(a.split(rows), b.split(rows), strict=True)
        return torch.cat([(x.float() * y).sum(dim=(1, 3)) for x, y in pairs])
    product = torch.empty(a.shape[1:], dtype=torch.float32)  # of one sample, so that it stays in the cache
    sums = torch.empty(a.shape[0], *a.shape[2:])
    for x, y, out in zip(a, b, sums, strict=True):
        torch.sum(product.copy_(x).mul_(y), 0, out=out)
    return sums.sum(-1)


class Gate(nn.Module):
    """Scale and mask of one sub-layer's units.

    It is a module of its own, so that ZeRO-3 gathers `delta` for it like any other parameter. `start`: position of its
    first unit in the model's flat order, where its statistics begin in the recorder.
    """

    mask: Tensor

    def __init__(self, num_units: int, width: int, start: int, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.num_units, self.width, self.start = num_units, width, start
        self.delta = nn.Parameter(torch.zeros(num_units, dtype=dtype, device=device))
        self.register_buffer("mask", torch.ones(num_units, dtype=dtype, device=device), persistent=False)
        self.cut: Tensor | None = None  # indices of masked units; None: none, known without a device sync
        self.recorder: SampleStatistics | None = None
        self.hooks: list[RemovableHandle] = []

    def forward(self, x: Tensor) -> Tensor:
        """Scale and mask x: [B, T, U * W] -> the same shape. Or [B * T, U * W], as some models flatten before the feed-forward."""
        if x.dim() == 2:
            rows = self.recorder.batch_size if self.recorder is not None and self.recorder.active else 1
            return self(x.unflatten(0, (rows, -1))).flatten(0, 1)
        if self.recorder is not None and self.recorder.wants_activations:
            self.recorder.add_activations(self.start, x.detach().unflatten(-1, (self.num_units, self.width)))
        return _Gating.apply(x, self.delta, self)

    @property
    def is_open(self) -> bool:
        """Whether any unit is kept."""
        return self.cut is None or len(self.cut) < self.num_units

    def set_mask(self, keep: Tensor) -> None:
        """Keep the units for which `keep`, bool [U], is True, and mask the others."""
        self.mask.copy_(keep)
        cut = (~keep).nonzero().flatten()
        self.cut = cut.to(self.mask.device) if len(cut) else None

    def release(self) -> None:
        """Remove the hooks by which other modules call this gate."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def extra_repr(self) -> str:
        return f"num_units={self.num_units}, width={self.width}"


def attach(model: nn.Module, layout: Layout, structure: Structure, recorder: SampleStatistics | None = None) -> None:
    """Put a gate in front of every output projection, in place. If the model gets LoRA, attach that first.

    The gate becomes a sibling of the projection, not a child, so the projection stays what PEFT made of it. `recorder`:
    receives the gates' statistics.
    """
    dtype, device = next((p.dtype, p.device) for p in model.parameters())
    widths = {s.kind: (s.output.path, s.width) for s in layout.sublayers}
    for index, layer in layers_of(model, layout):
        for sublayer in (s for s in structure.sublayers if s.layer == index):
            path, width = widths[sublayer.kind]
            gate = Gate(sublayer.num_units, width, sublayer.start, dtype=dtype, device=device)
            gate.recorder = recorder
            parent = _parent(layer, path)
            assert not hasattr(parent, GATE_NAME)
            parent.add_module(GATE_NAME, gate)
            gate.hooks.append(layer.get_submodule(path).register_forward_pre_hook(_applying(gate)))
        if layout.skips:
            whole = list(gates_of(layer))
            whole[0].hooks.append(layer.register_forward_hook(_skipping(whole), with_kwargs=True))


def _applying(gate: Gate) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda projection, args: (gate(args[0]), *args[1:])


def _skipping(gates: list[Gate]) -> Callable[..., Tensor | None]:
    """A forward hook that makes a layer return its input while all its units are masked.

    The layer stays in the graph and gets gradients of zero; without any, ZeRO-3 would reuse those of the step before.
    """

    def skip(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if any(gate.is_open for gate in gates):
            return None
        return (args[0] if args else kwargs["hidden_states"]) + 0 * output

    return skip


def _parent(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path.rpartition(".")[0])


def gate_before(module: nn.Module, path: str) -> Gate | None:
    """The gate in front of the output projection at `path` below `module`, or None."""
    gate = getattr(_parent(module, path), GATE_NAME, None)
    return gate if isinstance(gate, Gate) else None


def gate_path(path: str) -> str:
    """The path of the gate in front of the projection at `path`."""
    return ".".join([*path.split(".")[:-1], GATE_NAME])


def remove_gate(module: nn.Module, path: str) -> None:
    """Remove the gate in front of the projection at `path` below `module`, if there is one."""
    _drop(_parent(module, path))


def detach(model: nn.Module) -> None:
    """Remove every gate, undoing `attach`. Their scales and masks are lost unless they were folded into the weights before."""
    for module in list(model.modules()):
        _drop(module)


def _drop(parent: nn.Module) -> None:
    gate = getattr(parent, GATE_NAME, None)
    if isinstance(gate, Gate):
        gate.release()
        delattr(parent, GATE_NAME)


def gates_of(model: nn.Module) -> Iterator[Gate]:
    """Every gate of a model, in flat order."""
    yield from (module for module in model.modules() if isinstance(module, Gate))


def apply_mask(model: nn.Module, keep: Tensor) -> None:
    """Set the masks of all gates. keep: bool [units of the whole model], in flat order."""
    for gate in gates_of(model):
        gate.set_mask(keep[gate.start : gate.start + gate.num_units])


def resize_gate(gate: Gate, units: Tensor) -> None:
    """Keep the gate's entries `units`, int64 [K], with the masks they have."""
    keep = gate.mask.index_select(0, units.to(gate.mask.device))
    gate.delta = select(gate.delta, units, 0)
    gate.register_buffer("mask", keep, persistent=False)
    gate.num_units = len(units)
    gate.set_mask(keep.bool().cpu())


def renumber_gates(model: nn.Module) -> None:
    """Renumber the remaining gates in the flat order of the remaining units."""
    start = 0
    for gate in gates_of(model):
        gate.start = start
        start += gate.num_units
