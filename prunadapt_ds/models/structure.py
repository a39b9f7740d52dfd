"""What every prunable unit of a model costs, in closed form.

Legend: U units of the whole model in one flat order: layer by layer, heads before neurons.  T sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds.models.modeling_prunadapt import Layout, ProjectionLayout


@dataclass(frozen=True)
class SubLayer:
    """A run of equal units in the flat order."""

    layer: int
    kind: str  # "heads" or "neurons"
    start: int
    num_units: int
    params_per_unit: int
    macs_per_unit: int  # multiply-accumulates for one sequence of `Structure.seq_length` tokens
    floor: int = 0  # units that must stay

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.num_units)


@dataclass(frozen=True)
class Structure:
    """All prunable units of a model, and what the blocks cost beside them.

    `fixed_params`: parameters of the blocks that no cut removes (norms, output biases, the key and value of multi-query
    attention); `fixed_macs` alike.  `other_params`: embeddings and head, not part of sparsity.
    """

    sublayers: tuple[SubLayer, ...]
    fixed_params: int
    other_params: int
    seq_length: int
    fixed_macs: int = 0

    @property
    def num_units(self) -> int:
        return sum(s.num_units for s in self.sublayers)

    def unit_costs(self, budget: str) -> Tensor:
        """Cost of each unit, int64 [U]: parameters ("params") or multiply-accumulates ("macs")."""
        per_unit = [s.params_per_unit if budget == "params" else s.macs_per_unit for s in self.sublayers]
        counts = torch.tensor([s.num_units for s in self.sublayers])
        return torch.tensor(per_unit).repeat_interleave(counts)

    def fixed_cost(self, budget: str) -> int:
        return self.fixed_params if budget == "params" else self.fixed_macs

    def dense_cost(self, budget: str) -> int:
        return self.fixed_cost(budget) + int(self.unit_costs(budget).sum())


def with_outer_floor(structure: Structure, share: float) -> Structure:
    """The same structure of which the first and the last layer keep at least `share` of their units.

    What enters and leaves a model is hard to do without: LLM-Pruner (Ma et al., arXiv 2305.11627) leaves outer layers alone.
    """
    outer = {structure.sublayers[0].layer, structure.sublayers[-1].layer}
    return replace(
        structure,
        sublayers=tuple(
            replace(s, floor=max(s.floor, ceil(share * s.num_units))) if s.layer in outer else s
            for s in structure.sublayers
        ),
    )


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole tensor, also where ZeRO-3 shows a shard of shape (0,)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: nn.Parameter) -> int:
    return prod(full_shape(parameter))


def projection_params(module: Any, projection: ProjectionLayout, side: str) -> int:
    """Parameters of one unit in a projection: its rows and their bias, or its columns."""
    other_features = full_shape(module.weight)[1 - projection.unit_axis(side)]
    bias = 1 if side == "out" and module.bias is not None else 0
    return sum(projection.parts) * (other_features + bias)


def measure(model: nn.Module, layout: Layout, seq_length: int) -> Structure:
    """Read the structure off a model without adapters, sharded or not.

    Multiply-accumulates count every matrix product of a unit: T * its weights, and for a head T * T * its width for the
    scores and again for the values (one per query head of a group), T * its width for each relative position. Left out is
    what a batch computes once: projections of positions.
    """
    sublayers: list[SubLayer] = []
    start = block_params = fixed_macs = 0
    for index, layer in layers_of(model, layout):
        block_params += sum(full_numel(p) for p in layer.parameters())
        for sub in layout.sublayers:
            params = weights = 0
            for side, p in [("out", p) for p in sub.inputs] + [("in", sub.output)]:
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
