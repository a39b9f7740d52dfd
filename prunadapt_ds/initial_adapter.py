"""The PEFT LoRA adapter that a run starts from (`--adapter_name_or_path`): a folder or hub ID.

The run uses its rank, scale and projections. Training starts from its LoRA matrices and from what it saved whole (a head).
"""

from __future__ import annotations

import hashlib
import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunadapt_ds import adapters, hub, labels, weight_files
from prunadapt_ds.adapters import ADAPTER, PREFIX
from prunadapt_ds.backbone import Backbone
from prunadapt_ds.config import LoraOptions
from prunadapt_ds.engine import gathered
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.files import read_object
from prunadapt_ds.models.modeling_prunadapt import Layout
from prunadapt_ds.models.structure import full_shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MATRICES = (".lora_A.weight", ".lora_B.weight")
# Options with which an adapter is no longer a frozen matrix plus the product of two small ones.
OTHER_KINDS = (
    *("use_dora", "use_rslora", "use_qalora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config"),
)
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the frozen weights


@dataclass(frozen=True)
class InitialAdapter:
    """A checked adapter. `shapes`: shapes of its tensors by the model's names, `lora_A.weight` without the adapter's name.

    `classes`: what its head calls the classes, in its order; () if its folder does not say.
    """

    name: str
    config: Path
    weights: Path
    r: int
    lora_alpha: float
    base: str  # the base model that its configuration names
    shapes: dict[str, tuple[int, ...]]
    classes: tuple[str, ...] = ()

    @property
    def modules(self) -> list[str]:
        """Modules with LoRA."""
        return sorted({n.removesuffix(MATRICES[0]) for n in self.shapes if n.endswith(MATRICES[0])})

    @property
    def whole(self) -> list[str]:
        """Parameters that were saved whole."""
        return [name for name in self.shapes if not name.endswith(MATRICES)]

    def identity(self) -> str:
        """sha256 of configuration and weights, whatever their location."""
        return hashlib.sha256(self.config.read_bytes() + self.weights.read_bytes()).hexdigest()


def refuse(name: str) -> Callable[[str], UserError]:
    return lambda remedy: UserError(Problem("adapter_name_or_path", name, remedy))


def read(name: str) -> InitialAdapter:
    """Read an adapter's configuration and the header of its weights.

    Raises UserError if it cannot be read, is not plain LoRA, or has only pickled weights.
    """
    from safetensors import SafetensorError

    refused = refuse(name)
    file, weights = _file(name, CONFIG), _file(name, WEIGHTS)
    config = read_object(file, refused)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise refused(f"has {kind or 'no'} weights of PEFT; a run can only start from LoRA")
    begins = str(config.get("init_lora_weights")).lower()
    odd = [field for field in OTHER_KINDS if config.get(field)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if begins.startswith(CHANGE_THE_BASE) else []
    if odd:
        said = ", ".join(f"{field}={config[field]!r}" for field in odd)
        raise refused(f"is not plain LoRA ({said}); merge it into its model with PEFT and name that model instead")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, int | float) or r < 1 or alpha <= 0:
        raise refused(f"{CONFIG} has r={r!r} and lora_alpha={alpha!r}; both must be positive numbers, r an integer")
    try:
        stored = weight_files.shapes(weights)
    except (SafetensorError, OSError) as error:
        raise refused(f"{WEIGHTS} cannot be loaded: it is damaged or cut short ({error}); fetch it again") from error
    named = {key.removeprefix(PREFIX): shape for key, shape in stored.items()}
    try:
        classes = labels.stored(file.parent)
    except (ValueError, OSError) as error:
        raise refused(f"{labels.FILE} cannot be read ({error}); mend or remove it") from error
    base = str(config.get("base_model_name_or_path") or "")
    return InitialAdapter(name, file, weights, r, float(alpha), base, named, classes)


def _file(name: str, file: str) -> Path:
    """The path of one of an adapter's two files, fetched from the hub unless `name` is a folder. Raises UserError."""
    refused = refuse(name)
    if os.path.isdir(name):
        if (Path(name) / file).is_file():
            return Path(name) / file
        if file == WEIGHTS and any(Path(name).glob("adapter_model.*")):
            raise refused(f"has no {WEIGHTS}; pickled ones are never loaded, save it again with a recent PEFT")
        raise refused(f"the folder has no {file}; name one that PEFT saved")
    if os.path.exists(name):
        raise refused("is a file; name the folder of the adapter")
    if not hub.could_be_id(name):
        raise refused("there is no such folder")
    try:
        found = hub.snapshot(name) / file
    except hub.UnavailableError as error:
        raise refused(str(error)) from error
    if not found.is_file():
        raise refused(f"the repository has no {file}; name that of an adapter saved by PEFT")
    return found


def take_over(
    adapter: InitialAdapter, loaded: Backbone, lora: LoraOptions, given: frozenset[str], label_names: Sequence[str] = ()
) -> list[str]:
    """Set the run's LoRA options to the adapter's, in place. Returns the projections that get LoRA, in the model's order.

    `given`: names of the options that the user gave. `label_names`: the task's classes. Raises UserError if an option
    contradicts the adapter, or if the adapter does not fit the model.
    """
    targets = _fitting(adapter, loaded)
    says = {"r": adapter.r, "lora_alpha": adapter.lora_alpha}
    problems = [
        Problem(name, getattr(lora, name), f"the adapter {adapter.name} has {value:g}; leave it out")
        for name, value in says.items()
        if name in given and getattr(lora, name) != value
    ]
    if lora.target_modules and adapters.target_modules(loaded.layout, lora.target_modules) != targets:
        some = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
        remedy = f"the adapter {adapter.name} adapts {some}, {len(targets)} projections in all; leave it out"
        problems.append(Problem("target_modules", lora.target_modules, remedy))
    if problems:
        raise UserError(problems)
    lora.r, lora.lora_alpha = adapter.r, adapter.lora_alpha
    loaded.notes.append(
        f"starts from the adapter {adapter.name} (made for {adapter.base or 'an unnamed model'}): r={adapter.r}, "
        f"lora_alpha={adapter.lora_alpha:g}, {len(targets)} projections{_head_words(adapter, loaded, label_names)}"
    )
    return targets


def _head_words(adapter: InitialAdapter, loaded: Backbone, label_names: Sequence[str]) -> str:
    """Where the head comes from, for the note; empty where it is the model's own."""
    if heads(adapter, loaded):
        theirs = _classes(adapter, loaded)
        moved = f", which knew the classes as {', '.join(theirs)} and was reordered to match the task"
        return ", its head" + moved * labels.are_ours_elsewhere(theirs, label_names)
    begins = loaded.task_head_names and not loaded.known_classes
    return ", without a head for this task, which starts from scratch" if begins else ""


def _classes(adapter: InitialAdapter, loaded: Backbone) -> tuple[str, ...]:
    """What the adapter's head calls the classes; if its folder does not say, it has them from the model that it was made for."""
    return adapter.classes or loaded.known_classes


def heads(adapter: InitialAdapter, loaded: Backbone) -> set[str]:
    """Parameters of the head that the adapter brings, of the size that the task needs."""
    return set(adapter.whole) & loaded.task_head_names - _of_other_size(adapter, loaded)


def _fitting(adapter: InitialAdapter, loaded: Backbone) -> list[str]:
    """The adapter's projections in the model's order. Raises UserError if a name or shape does not match the model's."""
    refused = refuse(adapter.name)
    possible = adapters.target_modules(loaded.layout)
    strange = sorted(set(adapter.modules) - set(possible))
    if strange or not adapter.modules:
        some = f"{strange[0]} and {len(strange) - 1} more" if strange else "nothing"
        remedy = f"a run can only start from LoRA on the projections of the model's blocks, such as {possible[0]}"
        raise refused(f"adapts {some}; {remedy}")
    parameters = dict(loaded.model.named_parameters())
    wanted = _matrix_shapes(adapter, parameters, loaded.layout)
    wanted |= {name: full_shape(parameters[name]) for name in adapter.whole if name in parameters}
    for name, shape in adapter.shapes.items():
        if name not in wanted:
            raise refused(f"holds {name}, which this model does not have")
        if shape != wanted[name] and name not in _of_other_size(adapter, loaded):
            raise refused(f"{name} has shape {shape}, but this model needs {wanted[name]}; was it made for another?")
    if lost := sorted(wanted.keys() - adapter.shapes.keys()):
        raise refused(f"{WEIGHTS} has no {lost[0]}; fetch it again")
    return [name for name in possible if name in set(adapter.modules)]


def _matrix_shapes(
    adapter: InitialAdapter, parameters: dict[str, nn.Parameter], layout: Layout
) -> dict[str, tuple[int, ...]]:
    """The shapes that A and B of every adapted projection must have: [r, in] and [out, r]."""
    transposed = {p.path: p.transposed for sub in layout.sublayers for p in (*sub.inputs, sub.output)}
    shapes: dict[str, tuple[int, ...]] = {}
    for module in adapter.modules:
        path = module.removeprefix(f"{layout.layers}.").partition(".")[2]
        rows, columns = full_shape(parameters[f"{module}.weight"])[:: -1 if transposed[path] else 1]
        shapes |= dict(zip((module + m for m in MATRICES), ((adapter.r, columns), (rows, adapter.r)), strict=True))
    return shapes


def _of_other_size(adapter: InitialAdapter, loaded: Backbone) -> set[str]:
    """Parameters of a head for another number of labels. They start from scratch, as a checkpoint's would."""
    parameters = dict(loaded.model.named_parameters())
    heads = [name for name in adapter.whole if name in loaded.task_head_names]
    return {name for name in heads if full_shape(parameters[name]) != adapter.shapes[name]}


def load(adapter: InitialAdapter, loaded: Backbone, label_names: Sequence[str] = ()) -> bool:
    """Copy the adapter's values into the model, which must already have LoRA; returns whether a head was among them.

    Its classes are brought into the order of `label_names`. In place; collective if parameters are sharded.
    """
    from safetensors import safe_open

    parameters, skipped = dict(loaded.model.named_parameters()), _of_other_size(adapter, loaded)
    with safe_open(adapter.weights, framework="pt") as opened, torch.no_grad():
        keys = {key.removeprefix(PREFIX): key for key in opened.keys()}  # noqa: SIM118
        for name in adapter.shapes:
            if name in skipped:
                continue
            ours: Any = name
            for matrix in MATRICES:
                ours = ours.replace(matrix, matrix.replace(".weight", f".{ADAPTER}.weight"))
            with gathered([parameters[ours]], write_from=0):
                parameters[ours].copy_(opened.get_tensor(keys[name]))
    if not heads(adapter, loaded):
        return False
    labels.reorder_head(loaded, _classes(adapter, loaded), label_names)
    return True
