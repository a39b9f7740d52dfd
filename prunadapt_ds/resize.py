"""Cut a model to a plan: frozen weights, biases, LoRA matrices, gates and masks together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds.adapters import ADAPTER, is_lora
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.gates import GATE_NAME, Gate
from prunadapt_ds.models.modeling_prunadapt import (
    Layout,
    ProjectionLayout,
    remove_sublayer,
    select,
    slice_linear,
    update_attributes,
)
from prunadapt_ds.models.structure import layers_of


def resize(model: nn.Module, layout: Layout, plan: PruningPlan) -> None:
    """Physically remove the units that `plan` cuts from a whole (not sharded) dense model. In place.

    The model may carry LoRA and gates; those of the kept units keep their values. A sub-layer without units is replaced
    by the bias of its output projection.
    """
    kept = iter(plan.kept)
    for _, layer in layers_of(model, layout):
        for sublayer in layout.sublayers:
            units = torch.tensor(next(kept), dtype=torch.long)
            if len(units) == sublayer.num_units:
                continue
            if len(units) == 0:
                remove_sublayer(layer, sublayer)
                continue
            for projection in sublayer.inputs:
                resize_projection(layer.get_submodule(projection.path), projection, units, sublayer.num_units, "out")
            output = layer.get_submodule(sublayer.output.path)
            resize_projection(output, sublayer.output, units, sublayer.num_units, "in")
            if isinstance(getattr(output, GATE_NAME, None), Gate):
                resize_gate(getattr(output, GATE_NAME), units)
            update_attributes(layer, sublayer, len(units))
    renumber_gates(model)


def resize_projection(module: Any, layout: ProjectionLayout, units: Tensor, num_units: int, side: str) -> None:
    """Slice one projection with its LoRA: rows of B for outputs, columns of A for inputs.

    units: int64 [K], the units that stay, of `num_units`.
    """
    index = layout.indices(units, num_units)
    if not is_lora(module):
        slice_linear(module, index, side, layout.unit_axis(side))
        return
    slice_linear(module.base_layer, index, side, layout.unit_axis(side))
    if side == "out":
        slice_linear(module.lora_B[ADAPTER], index, "out", 0)
        module.out_features = len(index)
    else:
        slice_linear(module.lora_A[ADAPTER], index, "in", 1)
        module.in_features = len(index)


def resize_gate(gate: Gate, units: Tensor) -> None:
    """Keep the gate entries `units`; masks of the kept units stay as they are."""
    keep = gate.mask.index_select(0, units.to(gate.mask.device))
    gate.delta = select(gate.delta, units, 0)
    gate.register_buffer("mask", keep, persistent=False)
    gate.num_units = len(units)
    gate.set_mask(keep.bool().cpu())


def renumber_gates(model: nn.Module) -> None:
    """Give the gates that are left their positions in the flat order of the units that are left."""
    start = 0
    for module in model.modules():
        if isinstance(module, Gate):
            module.start = start
            start += module.num_units
