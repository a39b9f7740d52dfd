"""Writes the trained model as a smaller Hugging Face folder.

Large matrices are never gathered whole: rank 0 receives a few rows at a time, merges LoRA and folds gates in fp32, and writes
the result straight to files.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds import older_readers
from prunadapt_ds.adapters import ADAPTER, is_lora
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.distributed import on_rank_0, rank
from prunadapt_ds.engine import gathered, row_blocks
from prunadapt_ds.faults import fault_point
from prunadapt_ds.files import whole_folder
from prunadapt_ds.formats import MODELING_FILE
from prunadapt_ds.gates import Gate, gate_before
from prunadapt_ds.models import auto_classes, modeling_prunadapt
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.models.modeling_prunadapt import Layout, ProjectionLayout, SkippedLayer
from prunadapt_ds.models.structure import full_numel, full_shape, layers_of
from prunadapt_ds.weight_files import WeightFiles
from prunadapt_ds.zero3 import own_run

ROWS_NUMEL = 2**22  # elements of a tensor's rows that are computed at a time: 16 MiB


@dataclass(frozen=True)
class Cut:
    """The units that one projection keeps."""

    projection: ProjectionLayout
    num_units: int  # before the cut
    units: Tensor  # int64 [K], the kept ones among these
    side: str  # "out" or "in"
    vanishes: bool  # the sub-layer has no units left

    @property
    def axis(self) -> int:
        return self.projection.unit_axis(self.side)

    @property
    def index(self) -> Tensor:
        return self.projection.indices(self.units, self.num_units)


def cuts_of(layout: Layout, plan: PruningPlan, present: PruningPlan) -> dict[str, Cut]:
    """By full name of the projection: what `plan` keeps of it in a model that physically holds the units of `present`."""
    cuts = {}
    for (layer, sublayer), old, new in zip(layout.places, present.kept, plan.kept, strict=True):
        units = torch.searchsorted(torch.tensor(old, dtype=torch.long), torch.tensor(new, dtype=torch.long))
        for projection, side in sublayer.sides:
            name = f"{layout.layers}.{layer}.{projection.path}"
            cuts[name] = Cut(projection, len(old), units, side, vanishes=len(units) == 0)
    return cuts


@dataclass(frozen=True)
class Exported:
    """An fp32 tensor of the export that never has to be whole in memory.

    `kept`: int64 [n], ascending, the rows of `stored` that stay; None: all. `values` maps some of these rows, [k, ...], and
    their positions in the export to the exported rows.
    """

    shape: tuple[int, ...]
    stored: nn.Parameter
    kept: Tensor | None
    values: Callable[[Tensor, slice], Tensor]

    def write(self, out: Tensor | None) -> None:
        """Fill `out` a few rows at a time. Collective; `out` is None on ranks that only send their shards."""
        if not prod(self.shape):
            return
        start = written = 0
        for block in row_blocks(self.stored, ROWS_NUMEL):
            stop = start + len(block)
            if out is not None:
                if self.kept is not None:
                    first, last = torch.searchsorted(self.kept, torch.tensor([start, stop])).tolist()
                    block = block[(self.kept[first:last] - start).to(block.device)]
                rows = slice(written, written + len(block))
                out[rows].copy_(self.values(block, rows))
                written += len(block)
            start = stop


def kept_rows(module: Any, gate: Gate | None, cut: Cut, stored: Tensor, rows: slice) -> Tensor:
    """Rows `rows` of a projection's exported weight, in fp32, with LoRA merged and the gate folded in.

    stored: the rows of the base weight that they come from. All other parameters must be whole.
    """
    index = cut.index.to(stored.device)
    weight = (stored if cut.axis == 0 else stored.index_select(1, index)).to(torch.float32, copy=True)
    if is_lora(module):
        left, right = module.lora_B[ADAPTER].weight.detach(), module.lora_A[ADAPTER].weight.detach()
        if module.fan_in_fan_out:
            left, right = right.T, left.T
        left, right = (left[index[rows]], right) if cut.axis == 0 else (left[rows], right[:, index])
        weight.addmm_(left.float(), right.float(), alpha=module.scaling[ADAPTER])
    return weight if gate is None else weight.mul_(folded_scale(gate, cut, rows))


def folded_scale(gate: Gate, cut: Cut, rows: slice) -> Tensor:
    """The gate's factors g * m for the weight of the output projection behind it.

    [K * width] for its kept columns; [rows, 1] for `rows` of its kept rows, if the weight is transposed.
    """
    scale = ((1 + gate.delta.detach().float()) * gate.mask.float()).repeat_interleave(gate.width)
    scale = scale[cut.index.to(scale.device)]
    return scale if cut.axis == 1 else scale[rows, None]


def pruned_tensors(
    model: nn.Module,
    layout: Layout,
    plan: PruningPlan,
    present: PruningPlan | None = None,
    head: Mapping[str, tuple[float, float]] | None = None,
) -> Iterator[tuple[str, Exported]]:
    """Yield (name in the stock model, tensor) for everything in the exported checkpoint.

    Collective: every rank must write each tensor before it requests the next. `present`: what the model physically holds
    (None: dense). Small parameters are gathered, one module at a time. A tensor that several modules share is yielded once,
    under its first name. `head`: (factor, shift) to apply to parameters by name, see `label_scale.fold`.
    """
    cuts = cuts_of(layout, plan, present or PruningPlan.dense(plan.structure))
    yield from _empty_weights(model, layout, plan.skipped)
    inside = tuple(f"{layout.layers}.{layer}." for layer in plan.skipped)  # nothing else of these is exported
    seen: set[int] = set()
    for name, module in model.named_modules():
        if name.startswith(inside):  # in a skipped layer, or part of a projection that was exported as a whole
            continue
        cut = cuts.get(name)
        if isinstance(module, Gate):  # folded into its projection
            continue
        if cut is None:
            own = [(key, p) for key, p in module.named_parameters(recurse=False) if id(p) not in seen]
            seen |= {id(p) for _, p in own}
            with gathered(p for _, p in own if not _comes_in_parts(p)):
                for key, parameter in own:
                    full_name = f"{name}.{key}".lstrip(".")
                    values = partial(affine, *head[full_name]) if head and full_name in head else _as_it_is
                    yield full_name, Exported(full_shape(parameter), parameter, None, values)
            continue
        inside = (*inside, name + ".")
        gate = gate_before(model, name) if cut.side == "in" else None
        parameters = [*module.parameters(), *(gate.parameters() if gate else [])]
        base = {id(p) for p in getattr(module, "base_layer", module).parameters()}
        with gathered(p for p in parameters if id(p) not in base or not _comes_in_parts(p)):
            yield from _projection_tensors(name, module, gate, cut)


def _empty_weights(model: nn.Module, layout: Layout, skipped: set[int]) -> Iterator[tuple[str, Exported]]:
    """What `SkippedLayer` holds, for each layer that the plan skips and the model may still have."""
    for layer, module in layers_of(model, layout):
        if layer in skipped:
            for name, weight in SkippedLayer.in_place_of(module, layout.sublayers[-1]).named_buffers():
                empty = Exported(tuple(weight.shape), nn.Parameter(weight), None, _as_it_is)
                yield f"{layout.layers}.{layer}.{name}", empty


def _comes_in_parts(parameter: nn.Parameter) -> bool:
    """Whether a tensor is so large that its rows are fetched from its shards instead of gathering it."""
    return full_numel(parameter) > ROWS_NUMEL and own_run(parameter) is not None


def affine(factor: float, shift: float, stored: Tensor, rows: slice = slice(None)) -> Tensor:
    """factor * stored + shift in fp32, rounded once."""
    return (stored.double() * factor + shift).float()


def _as_it_is(stored: Tensor, rows: slice) -> Tensor:
    return stored


def _projection_tensors(name: str, module: Any, gate: Gate | None, cut: Cut) -> Iterator[tuple[str, Exported]]:
    base = getattr(module, "base_layer", module)
    if not cut.vanishes or cut.side == "in":  # an empty weight is stored of the output, see BiasOnly
        sizes = list(full_shape(base.weight))
        sizes[cut.axis] = len(cut.index)
        kept = cut.index if cut.axis == 0 else None
        yield f"{name}.weight", Exported(tuple(sizes), base.weight, kept, partial(kept_rows, module, gate, cut))
    bias = getattr(base, "bias", None)
    if bias is None or (cut.vanishes and cut.side == "out"):
        return
    kept = None if cut.side == "in" else cut.index
    shape = full_shape(bias) if kept is None else (len(kept),)
    yield f"{name}.bias", Exported(shape, bias, kept, _as_it_is)


def export(
    model: Any,
    layout: Layout,
    plan: PruningPlan,
    tokenizer: Any,
    folder: Path,
    present: PruningPlan | None = None,
    *,
    head: Mapping[str, tuple[float, float]] | None = None,
) -> bool:
    """Write the pruned model in fp32 to `folder`, complete or not at all. Returns whether loading it needs remote code.

    Collective; rank 0 writes. `present`, `head`: as for `pruned_tensors`. A model from which nothing was cut
    loads with its stock class.
    """
    needs_remote_code = not bool(plan.mask().all())
    weights = WeightFiles(folder.with_name(f".{folder.name}.weights.tmp"))
    for name, tensor in pruned_tensors(model, layout, plan, present, head):
        if not needs_remote_code:
            name = older_readers.tensor_name(model.config.model_type, name)
        tensor.write(weights.room_for(name, tensor.shape) if rank() == 0 else None)
    config = exported_config(model, layout, plan, needs_remote_code)
    generation, tokenizer = None, to_save(tokenizer)
    if auto_classes.name_for(type(model).__name__) == auto_classes.LANGUAGE_MODEL:
        generation = model.generation_config
        tokenizer.padding_side = "left"  # generation appends on the right
    parts = [part for part in (config, generation, tokenizer) if part is not None]
    on_rank_0(f"writing the export {folder}", lambda: write_folder(folder, weights, parts, needs_remote_code))
    return needs_remote_code


def to_save(tokenizer: Any) -> Any:
    """A copy without the truncation and padding of the last call, which programs that read tokenizer.json would repeat."""
    copied = copy.deepcopy(tokenizer)
    if getattr(copied, "is_fast", False):
        copied.backend_tokenizer.no_truncation()
        copied.backend_tokenizer.no_padding()
    return copied


def write_folder(folder: Path, weights: WeightFiles, parts: list[Any], needs_remote_code: bool) -> None:
    """Write the Hugging Face folder, complete or not at all. `parts`: objects with `save_pretrained`."""
    try:
        with whole_folder(folder) as unfinished:
            weights.finish(unfinished)
            fault_point("export/half written")
            if needs_remote_code:
                shutil.copyfile(Path(modeling_prunadapt.__file__), unfinished / MODELING_FILE)
            for part in parts:
                part.save_pretrained(unfinished)
            older_readers.add_old_names(unfinished)
    finally:
        weights.discard()


def exported_config(model: Any, layout: Layout, plan: PruningPlan, needs_remote_code: bool) -> Any:
    """The model's configuration; if anything was cut, with the structure and the class that builds it."""
    config = copy.deepcopy(model.config)
    stock = type(model).__name__
    config.dtype = torch.float32
    if FAMILIES[config.model_type].is_decoder:
        config.use_cache = True  # it was off for training
    config.architectures = [f"Pruned{stock}" if needs_remote_code else stock]
    if type(model).__module__.startswith("transformers."):
        config.__dict__.pop("auto_map", None)  # of code that comes with the base model, and was not used
    if needs_remote_code:
        kept = [len(units) for units in plan.kept]
        width = len(layout.sublayers)
        rows = [kept[i : i + width] for i in range(0, len(kept), width)]
        config.pruned_structure = {"layout": layout.to_dict(), "kept": rows}
        module = MODELING_FILE.removesuffix(".py")
        config.auto_map = {name: f"{module}.Pruned{c}" for name, c in auto_classes.stock_classes(model).items()}
    return config
