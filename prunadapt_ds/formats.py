"""Converts a compact export to other formats, file by file: no model, no ranks, one weight file in memory at a time.

    padded    every tensor has its dense shape, with zeros for units that were cut: stock classes load it, nothing is saved
    uniform   the same tensors under a stock configuration with fewer units in every layer, or fewer layers; requires all
              layers to keep the same numbers of units

The compact folder and the run's `plan.json` hold all that is needed.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.files import read_object, replace, usual_mode, whole_folder, whole_path
from prunadapt_ds.models import auto_classes
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.models.layouts import head_dim_of, representable_heads, stock_fields
from prunadapt_ds.models.modeling_prunadapt import Layout
from prunadapt_ds.older_readers import tensor_name, write_config
from prunadapt_ds.weight_files import INDEX, write_index

MODELING_FILE = "modeling_prunadapt.py"
CHAT_TEMPLATES = "additional_chat_templates"  # where transformers keeps all but the default one
Shapes = dict[str, tuple[int, ...]]
Change = Callable[[str, Tensor], tuple[str, Tensor]]


def auto_class_of(folder: Path) -> str:
    """The name of the auto class that loads an exported folder."""
    return auto_classes.name_for(json.loads((folder / "config.json").read_text())["architectures"][0])


def convert(
    kind: str, compact: Path, plan: dict[str, Any], folder: Path, finish: Callable[[Path], None] = lambda _: None
) -> None:
    """Write `folder` in the format `kind` from a compact folder and its `plan.json`, complete or not at all.

    `finish`: called with the folder under its temporary name; if it raises, no folder is left.
    Raises UserError if the format cannot represent what the plan keeps.
    """
    config = read_object(compact / "config.json", _refuse(compact))
    structure = config.get("pruned_structure")
    stock = stock_config(config)
    change: Change = lambda name, tensor: (name, tensor)  # noqa: E731
    shapes: Shapes = {}

    def stored(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        name, tensor = change(name, tensor)
        return tensor_name(config["model_type"], name), tensor

    if structure is not None and kind == "uniform":
        stock |= uniform_fields(config, plan)
        renamed = without_gaps(structure["layout"]["layers"], layers_left(config, plan))
        change = lambda name, tensor: (renamed(name), tensor)  # noqa: E731
    elif structure is not None:
        layout = Layout.from_dict(structure["layout"])
        shapes = dense_shapes(stock)
        places = kept_places(layout, plan)
        if len(layers_left(config, plan)) < layout.num_layers:
            remedy = (
                "whole layers were removed, which zeros cannot represent; the uniform folder loads with stock classes"
            )
            raise UserError(Problem("export_formats", "padded", remedy))
        change = lambda name, tensor: (name, spread(tensor, shapes[name], places.get(name)))  # noqa: E731

    with whole_folder(folder) as unfinished:
        copy_others(compact, unfinished)
        write_config(unfinished, stock)
        _rewrite_weights(compact, unfinished, stored, shapes)
        finish(unfinished)


def _refuse(folder: Path) -> Callable[[str], UserError]:
    return lambda remedy: UserError(Problem("run_dir", str(folder), remedy))


def read_plan(file: Path, compact: Path) -> dict[str, Any]:
    """Read a run's `plan.json`, checked against the configuration of the compact folder. Raises UserError if they differ."""
    refuse = _refuse(file.parent)
    config, plan = read_object(compact / "config.json", refuse), read_object(file, refuse)
    structure = config.get("pruned_structure")
    try:
        if config["model_type"] not in FAMILIES or not isinstance(config["architectures"][0], str):
            raise ValueError("unknown model family")
        units = [_Units(u["layer"], u["kind"], u["dense"], tuple(u["kept"])) for u in plan["units"]]
        for u in units:
            if not all(isinstance(n, int) for n in (u.layer, u.dense, *u.kept)):
                raise ValueError("unit numbers are not integers")
            if list(u.kept) != sorted({k for k in u.kept if 0 <= k < u.dense}):
                raise ValueError(f"the plan keeps units that do not exist in layer {u.layer}")
        if structure is not None:
            _compare(Layout.from_dict(structure["layout"]), structure["kept"], units)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise refuse(f"{file.name} and exports/{compact.name}/config.json do not fit: {error!r}") from error
    return plan


@dataclass(frozen=True)
class _Units:
    layer: int
    kind: str
    dense: int
    kept: tuple[int, ...]


def _compare(layout: Layout, kept: list[list[int]], units: list[_Units]) -> None:
    """Raise ValueError unless the plan has the layout's units and keeps the numbers that the configuration gives."""
    counts = [count for row in kept for count in row]
    wanted = [
        (layer, sublayer.kind, sublayer.num_units, count)
        for (layer, sublayer), count in zip(layout.places, counts, strict=True)
    ]
    if wanted != [(u.layer, u.kind, u.dense, len(u.kept)) for u in units]:
        raise ValueError("the plan has other units than the folder")


def stock_config(config: dict[str, Any]) -> dict[str, Any]:
    """A compact folder's configuration as that of its stock class, without the fields that we add. Sizes stay dense."""
    stock = {k: copy.deepcopy(v) for k, v in config.items() if k not in ("pruned_structure", "auto_map")}
    stock["architectures"] = [name.removeprefix("Pruned") for name in config["architectures"]]
    return stock


# ------------------------------------------------------------------------------------------------------- uniform


def uniform_fields(config: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stock configuration that represent the plan's counts. Raises UserError if none can."""
    family, values = FAMILIES[config["model_type"]], as_config(stock_config(config))
    fields: dict[str, int] = {}
    left = layers_left(config, plan)
    if len(left) < config["pruned_structure"]["layout"]["num_layers"]:
        fields[values.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(left)
    for kind, record in (("heads", family.heads), ("neurons", family.neurons)):
        units = [u for u in plan["units"] if u["kind"] == kind and u["layer"] in left]
        counts = {len(u["kept"]) for u in units}
        if counts == {units[0]["dense"]}:
            continue
        if len(counts) > 1 or counts == {0}:
            kept = ", ".join(str(len(u["kept"])) for u in units)
            remedy = f"layers keep {kept} {kind}; the stock configuration has one number for all: train with --uniform"
            raise UserError(Problem("export_formats", "uniform", remedy))
        if not record.config_fields:
            remedy = f"the stock configuration of {family.model_type} cannot have fewer {kind}; train with --uniform"
            raise UserError(Problem("export_formats", "uniform", remedy))
        count = counts.pop()
        fields |= stock_fields(record, values, count)
        if kind == "heads":
            fields["head_dim"] = head_dim_of(values)
            if count not in (possible := representable_heads(family, values)):
                accepted = ", ".join(map(str, possible))
                remedy = f"the stock configuration accepts {accepted} heads, not {count}; train with --uniform"
                raise UserError(Problem("export_formats", "uniform", remedy))
    return fields


def layers_left(config: dict[str, Any], plan: dict[str, Any]) -> list[int]:
    """The layers of a compact folder that are not skipped, in order."""
    every = sorted({u["layer"] for u in plan["units"]})
    if not config["pruned_structure"]["layout"].get("skips"):
        return every
    some = {u["layer"] for u in plan["units"] if u["kept"]}
    return [layer for layer in every if layer in some]


def without_gaps(layers: str, left: list[int]) -> Callable[[str], str]:
    """A function that renames tensors for the layers `left`, renumbered without gaps below the path `layers`."""
    number = {str(old): str(new) for new, old in enumerate(left)}

    def renamed(name: str) -> str:
        if not name.startswith(f"{layers}."):
            return name
        old, _, rest = name[len(layers) + 1 :].partition(".")
        return f"{layers}.{number[old]}.{rest}"

    return renamed


def as_config(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})


# -------------------------------------------------------------------------------------------------------- padded


def dense_shapes(stock: dict[str, Any]) -> Shapes:
    """The shapes of the tensors that the stock model's files hold, by name: of tied ones the first name. Allocates nothing."""
    import transformers

    with unsharded(), torch.device("meta"):
        model = getattr(transformers, stock["architectures"][0])(as_config(stock))
    tied = model.all_tied_weights_keys
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


@contextmanager
def unsharded() -> Iterator[None]:
    """Build models unsharded within the block.

    While the run's ZeRO-3 configuration is alive, transformers shards every new model, which takes all ranks; here only one
    builds it.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    alive = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if alive is not None:
            deepspeed.set_hf_deepspeed_config(alive)


def kept_places(layout: Layout, plan: dict[str, Any]) -> dict[str, tuple[int, Tensor]]:
    """By tensor name: the axis that was cut, and the dense indices (int64) that the compact tensor holds along it."""
    places = {}
    for (layer, sublayer), units in zip(layout.places, plan["units"], strict=True):
        kept = torch.tensor(units["kept"], dtype=torch.long)
        for projection, side in sublayer.sides:
            name = f"{layout.layers}.{layer}.{projection.path}"
            index = projection.indices(kept, sublayer.num_units)
            places[f"{name}.weight"] = (projection.unit_axis(side), index)
            if side == "out":
                places[f"{name}.bias"] = (0, index)
    return places


def spread(tensor: Tensor, shape: tuple[int, ...], place: tuple[int, Tensor] | None) -> Tensor:
    """The compact tensor's values, at their dense places, in zeros of `shape`. `place`: (axis, indices) or None if uncut."""
    if place is None:
        assert tuple(tensor.shape) == shape, "only projections are cut"
        return tensor
    axis, index = place
    return torch.zeros(shape, dtype=tensor.dtype).index_copy_(axis, index, tensor)


# --------------------------------------------------------------------------------------------------------- files


def copy_others(source: Path, target: Path) -> None:
    """Copy the tokenizer and other files, but not weights, configuration, model card or modelling file."""
    ours = {"config.json", "README.md", MODELING_FILE, INDEX}
    for file in source.iterdir():
        if file.is_file() and file.name not in ours and file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
        elif file.name == CHAT_TEMPLATES:
            shutil.copytree(file, target / file.name)


def _rewrite_weights(source: Path, target: Path, change: Change, shapes: Shapes) -> None:
    """Write every weight file with its tensors changed; the last also gets zeros for names in `shapes` that no file holds."""
    from safetensors.torch import save_file

    files = sorted(source.glob("*.safetensors"))
    missing = set(shapes) - {name for file in files for name, _ in tensors_of(file)}
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        changed = (change(name, tensor) for name, tensor in tensors_of(file))
        tensors = {name: tensor.contiguous() for name, tensor in changed}
        if file == files[-1]:
            dtype = next(iter(tensors.values())).dtype
            tensors |= {name: torch.zeros(shapes[name], dtype=dtype) for name in missing}
        save_file(tensors, target / file.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total += sum(t.nbytes for t in tensors.values())
    if len(files) > 1:
        write_index(target, weight_map, total)


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a weight file, without the empty ones that keep stock classes from loading a compact folder."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            if prod(opened.get_slice(name).get_shape()):
                yield name, opened.get_tensor(name)


def cast(folder: Path, dtype: torch.dtype) -> None:
    """Convert the weights of an exported folder to another dtype, in place and one file at a time."""
    from safetensors.torch import load_file, save_file

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {name: t.to(dtype) for name, t in load_file(file).items()}
        total += sum(t.nbytes for t in tensors.values())
        with whole_path(file) as unfinished:
            save_file(tensors, unfinished, {"format": "pt"})
            unfinished.chmod(usual_mode())
    index = folder / INDEX
    if index.is_file():
        values = json.loads(index.read_text())
        values["metadata"]["total_size"] = total
        replace(index, json.dumps(values, indent=2, sort_keys=True) + "\n")
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, config | {"dtype": str(dtype).removeprefix("torch.")})
