"""Cut a model to a plan: frozen weights, biases, LoRA matrices, gates and masks together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds.adapters import ADAPTER, is_lora
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.gates import gate_before, gate_path, remove_gate, renumber_gates, resize_gate
from prunadapt_ds.models.modeling_prunadapt import (
    Layout,
    ProjectionLayout,
    SkippedLayer,
    remove_sublayer,
    slice_linear,
    update_attributes,
)

Slices = dict[str, tuple[int, Tensor]]  # by parameter name: the axis, and the indices kept, int64
Editing = Callable[[nn.Module], AbstractContextManager[None]]  # keeps a module's parameters whole while it is cut


def resize(
    model: nn.Module,
    layout: Layout,
    plan: PruningPlan,
    present: PruningPlan | None = None,
    editing: Editing = lambda module: nullcontext(),
) -> Slices:
    """Physically remove the units that `plan` cuts from a model that still holds `present` (None: dense). In place.

    The model may have LoRA and gates; those of the kept units keep their values. A sub-layer without units is replaced by
    the bias of its output projection; a layer without units by `SkippedLayer`, if the layout skips such layers. Projections
    are cut one at a time, each inside `editing(projection)`, which is `engine.rewriting` under ZeRO-3. Returns how every
    parameter that changed its shape was sliced, so that its optimizer state can be sliced alike.
    """
    slices: Slices = {}
    before = present or PruningPlan.dense(plan.structure)
    pairs = iter(zip(before.kept, plan.kept, strict=True))
    layers: Any = model.get_submodule(layout.layers)
    for number, layer in enumerate(layers):
        of_layer = [next(pairs) for _ in layout.sublayers]
        if layout.skips and not any(new for _, new in of_layer):
            layers[number] = SkippedLayer.in_place_of(layer, layout.sublayers[-1])
            continue
        for sublayer, (old, new) in zip(layout.sublayers, of_layer, strict=True):
            if len(new) == len(old):
                continue
            output = layer.get_submodule(sublayer.output.path)
            if not new:
                with editing(output):
                    remove_gate(layer, sublayer.output.path)
                    remove_sublayer(layer, sublayer)
                continue
            units = torch.searchsorted(torch.tensor(old), torch.tensor(new))  # positions among the units still present
            for projection, side in sublayer.sides:
                module = layer.get_submodule(projection.path)
                with editing(module):
                    cut = resize_projection(module, projection, units, len(old), side)
                prefix = f"{layout.layers}.{number}.{projection.path}."
                slices |= {prefix + name: how for name, how in cut.items()}
            if gate := gate_before(layer, sublayer.output.path):
                with editing(gate):
                    resize_gate(gate, units)
                slices[f"{layout.layers}.{number}.{gate_path(sublayer.output.path)}.delta"] = (0, units)
            update_attributes(layer, sublayer, len(units))
    renumber_gates(model)
    return slices


def resize_projection(module: Any, layout: ProjectionLayout, units: Tensor, num_units: int, side: str) -> Slices:
    """Slice one projection with its LoRA: rows of B for outputs, columns of A for inputs.

    units: int64 [K], the units that stay, of `num_units`. Returns the slices by parameter name below the module.
    """
    index, axis = layout.indices(units, num_units), layout.unit_axis(side)
    base, prefix = (module.base_layer, "base_layer.") if is_lora(module) else (module, "")
    slice_linear(base, index, side, axis)
    slices: Slices = {f"{prefix}weight": (axis, index)}
    if side == "out" and base.bias is not None:
        slices[f"{prefix}bias"] = (0, index)
    if is_lora(module):
        matrix, lora_axis = ("lora_B", 0) if side == "out" else ("lora_A", 1)
        slice_linear(getattr(module, matrix)[ADAPTER], index, side, lora_axis)
        setattr(module, f"{side}_features", len(index))
        slices[f"{matrix}.{ADAPTER}.weight"] = (lora_axis, index)
    return slices
