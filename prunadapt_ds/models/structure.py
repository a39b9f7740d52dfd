"""What every prunable unit of a model costs: parameters and multiply-accumulates in closed form, time as measured.

Legend: U number of units in the model, in one flat order: layer by layer, heads before neurons.  T sequence length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds.models.modeling_prunadapt import Layout, ProjectionLayout


@dataclass(frozen=True)
class SubLayer:
    """A run of units of equal cost in the flat order: the heads or the neurons of one layer."""

    layer: int
    kind: str  # "heads" or "neurons"
    start: int
    num_units: int
    params_per_unit: int
    macs_per_unit: int  # multiply-accumulates for one sequence of `Structure.seq_length` tokens
    floor: int = 0  # units that must stay
    counts: tuple[int, ...] = ()  # numbers of units that a uniform cut may leave, ascending; empty: any from `floor` up
    latency: tuple[int, ...] = ()  # ns by number of units kept, [num_units + 1], non-decreasing; empty: not measured

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.num_units)

    def costs(self, budget: str) -> Tensor:
        """The sub-layer's cost by number of units kept: int64 [num_units + 1]."""
        if budget == "latency":
            assert len(self.latency) == self.num_units + 1, "the time of this sub-layer was not measured"
            return torch.tensor(self.latency)
        return torch.arange(self.num_units + 1) * self.per_unit(budget)

    def cost(self, budget: str, count: int) -> int:
        """The sub-layer's cost with `count` units kept."""
        return self.latency[count] if budget == "latency" else count * self.per_unit(budget)

    def per_unit(self, budget: str) -> int:
        return {"params": self.params_per_unit, "macs": self.macs_per_unit}[budget]


@dataclass(frozen=True)
class Structure:
    """All prunable units of a model, and the cost of its blocks beyond those units.

    `fixed_params`: parameters of the blocks that belong to no unit (norms, output biases, the key and value of multi-query
    attention); `fixed_macs` and `fixed_latency` (ns) likewise.  `other_params`: embeddings and head, which sparsity does not
    count.  `skips`: a layer without units is skipped and costs nothing; this assumes that all layers have equal fixed costs.
    """

    sublayers: tuple[SubLayer, ...]
    fixed_params: int
    other_params: int
    seq_length: int
    fixed_macs: int = 0
    fixed_latency: int = 0
    skips: bool = False

    @property
    def num_units(self) -> int:
        return sum(s.num_units for s in self.sublayers)

    def fixed_cost(self, budget: str) -> int:
        return {"params": self.fixed_params, "macs": self.fixed_macs, "latency": self.fixed_latency}[budget]

    def cost(self, budget: str, counts: Iterable[int]) -> int:
        """Parameters ("params"), multiply-accumulates ("macs") or nanoseconds ("latency") of the blocks, where `counts` gives the
        number of units in each sub-layer."""
        pairs = list(zip(self.sublayers, counts, strict=True))
        layers = {s.layer for s in self.sublayers}
        left = {s.layer for s, count in pairs if count} if self.skips else layers
        fixed = self.fixed_cost(budget) * len(left) // max(1, len(layers))
        return fixed + sum(s.cost(budget, count) for s, count in pairs)

    def dense_cost(self, budget: str) -> int:
        return self.cost(budget, (s.num_units for s in self.sublayers))


def without_layers(structure: Structure, gone: Collection[int]) -> tuple[Structure, Tensor]:
    """The structure without the layers `gone`, in which no other layer is skipped, and a mask of its units: bool [U]."""
    sublayers: list[SubLayer] = []
    mine = torch.zeros(structure.num_units, dtype=torch.bool)
    for s in structure.sublayers:
        if s.layer not in gone:
            sublayers.append(replace(s, start=int(mine.sum())))
            mine[s.span] = True
    layers, left = ({s.layer for s in some} for some in (structure.sublayers, sublayers))

    def share(fixed: int) -> int:
        return fixed * len(left) // len(layers)

    rest = replace(
        structure,
        sublayers=tuple(sublayers),
        fixed_params=share(structure.fixed_params),
        fixed_macs=share(structure.fixed_macs),
        fixed_latency=share(structure.fixed_latency),
        skips=False,
    )
    return rest, mine


def with_outer_floor(structure: Structure, share: float, neuron_multiple: int) -> Structure:
    """The same structure, where the first and last layers keep at least `share` of their units (neurons in whole groups).

    The outermost layers are the hardest to prune: LLM-Pruner (Ma et al., arXiv 2305.11627) leaves them alone.
    """
    outer = {structure.sublayers[0].layer, structure.sublayers[-1].layer}

    def floor(s: SubLayer) -> int:
        group = neuron_multiple if s.kind == "neurons" else 1
        return max(s.floor, min(s.num_units, ceil(share * s.num_units / group) * group))

    return replace(
        structure,
        sublayers=tuple(replace(s, floor=floor(s)) if s.layer in outer else s for s in structure.sublayers),
    )


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 manages a parameter: it is whole only while it is gathered."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor, even where ZeRO-3 shows a partitioned parameter with shape (0,)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: Tensor) -> int:
    return prod(full_shape(parameter))


def projection_params(module: Any, projection: ProjectionLayout, side: str) -> int:
    """Parameters of one unit in a projection: its rows and their biases if `side` is "out", its columns if "in"."""
    other_features = full_shape(module.weight)[1 - projection.unit_axis(side)]
    bias = 1 if side == "out" and module.bias is not None else 0
    return sum(projection.parts) * (other_features + bias)


def structure_of(model: nn.Module, layout: Layout, seq_length: int) -> Structure:
    """Read the structure off a model without adapters, sharded or not.

    Multiply-accumulates count every matrix product of a unit: T * its weights, and for heads T * T * width for the scores,
    the same again for the values, and T * width for each relative position, where width covers all query heads of a unit.
    Projections of positions are not counted: a batch computes them once.
    """
    sublayers: list[SubLayer] = []
    start = block_params = fixed_macs = 0
    for index, layer in layers_of(model, layout):
        block_params += sum(full_numel(p) for p in layer.parameters())
        for sub in layout.sublayers:
            params = weights = 0
            for p, side in sub.sides:
                module: Any = layer.get_submodule(p.path)
                params += projection_params(module, p, side)
                other_features = full_shape(module.weight)[1 - p.unit_axis(side)]
                weights += p.per_token * sum(p.parts) * other_features
                fixed_macs += layout.passes * seq_length * p.tail * other_features
            attention = (2 * seq_length + sub.relative_positions) * sub.width if sub.kind == "heads" else 0
            macs = layout.passes * seq_length * (weights + attention)
            floor = sub.floors[index] if sub.floors else 0
            sublayers.append(SubLayer(index, sub.kind, start, sub.num_units, params, macs, floor))
            start += sub.num_units
    unit_params = sum(s.num_units * s.params_per_unit for s in sublayers)
    total = sum(full_numel(p) for p in model.parameters())
    return Structure(tuple(sublayers), block_params - unit_params, total - block_params, seq_length, fixed_macs)


def layers_of(model: nn.Module, layout: Layout) -> Iterator[tuple[int, nn.Module]]:
    layers: Any = model.get_submodule(layout.layers)
    yield from enumerate(layers)
