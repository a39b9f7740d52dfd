"""Write the trained model as a smaller Hugging Face folder, and prove that it computes the same.

One module is gathered at a time; rank 0 merges LoRA and folds gates in fp32, a few rows of what stays at a time, right into files.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds import files, reload
from prunadapt_ds.adapters import ADAPTER, is_lora
from prunadapt_ds.batches import Rows
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.distributed import on_rank_0, rank
from prunadapt_ds.engine import gathered
from prunadapt_ds.errors import ParityError
from prunadapt_ds.files import usual_mode, whole_folder
from prunadapt_ds.formats import MODELING_FILE
from prunadapt_ds.gates import Gate, gate_before
from prunadapt_ds.models import modeling_prunadapt
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.models.modeling_prunadapt import Layout, ProjectionLayout
from prunadapt_ds.watchdog import milestone

MAX_FILE_BYTES = 2**30  # of weights in one exported file
ROWS_NUMEL = 2**22  # of a tensor's rows that are computed at a time: 16 MiB
TOLERANCE = 1e-4  # of max |logit difference|, relative to max(1, max |logit|)


@dataclass(frozen=True)
class Cut:
    """What one projection keeps."""

    projection: ProjectionLayout
    num_units: int  # before
    units: Tensor  # int64 [K], positions among those
    side: str  # "out" or "in"
    vanishes: bool  # the sub-layer has no unit left

    @property
    def axis(self) -> int:
        return self.projection.unit_axis(self.side)

    @property
    def index(self) -> Tensor:
        return self.projection.indices(self.units, self.num_units)


def cuts_of(layout: Layout, plan: PruningPlan, present: PruningPlan) -> dict[str, Cut]:
    """By the projection's full name, what it keeps of a model that holds `present`."""
    cuts, pairs = {}, iter(zip(present.kept, plan.kept, strict=True))
    for layer in range(layout.num_layers):
        for sublayer in layout.sublayers:
            old, new = (torch.tensor(units, dtype=torch.long) for units in next(pairs))
            units = torch.searchsorted(old, new)
            sides = [(p, "out") for p in sublayer.inputs] + [(sublayer.output, "in")]
            for projection, side in sides:
                name = f"{layout.layers}.{layer}.{projection.path}"
                cuts[name] = Cut(projection, len(old), units, side, vanishes=len(units) == 0)
    return cuts


@dataclass(frozen=True)
class Exported:
    """An fp32 tensor of the export, which never has to be whole in memory. `rows`: computes some of its rows, anew."""

    shape: tuple[int, ...]
    rows: Callable[[slice], Tensor]

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)

    def whole(self) -> Tensor:
        return self.rows(slice(0, self.shape[0]))

    def write(self, out: Tensor) -> None:
        """Fill `out`, row by row."""
        step = max(1, ROWS_NUMEL // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], step):
            part = slice(start, start + step)
            out[part].copy_(self.rows(part))


def kept_rows(module: Any, gate: Gate | None, cut: Cut, part: slice) -> Tensor:
    """Some rows, in fp32, of the weight that a projection keeps, with LoRA merged in and the gate folded; parameters gathered."""
    stored = getattr(module, "base_layer", module).weight.detach()
    index = cut.index.to(stored.device)
    weight = stored[index[part]] if cut.axis == 0 else stored[part].index_select(1, index)
    weight = weight.float()
    if is_lora(module):
        left, right = module.lora_B[ADAPTER].weight.detach(), module.lora_A[ADAPTER].weight.detach()
        if module.fan_in_fan_out:
            left, right = right.T, left.T
        left, right = (left[index[part]], right) if cut.axis == 0 else (left[part], right[:, index])
        weight.addmm_(left.float(), right.float(), alpha=module.scaling[ADAPTER])
    return weight if gate is None else weight.mul_(folded_scale(gate, cut, part))


def folded_scale(gate: Gate, cut: Cut, part: slice) -> Tensor:
    """g * m of the units of those rows, or of the kept columns, of the output projection behind the gate."""
    scale = ((1 + gate.delta.detach().float()) * gate.mask.float()).repeat_interleave(gate.width)
    scale = scale[cut.index.to(scale.device)]
    return scale if cut.axis == 1 else scale[part, None]


def pruned_tensors(
    model: nn.Module, layout: Layout, plan: PruningPlan, present: PruningPlan | None = None
) -> Iterator[tuple[str, Exported]]:
    """Name, under the stock model's names, of everything the exported checkpoint holds, and its tensor, to be asked for its
    rows before the next name is. Ranks that do not write need not ask.

    `present`: what the model physically holds (None: dense). Collective: every rank must consume the whole iterator.
    One module is gathered at a time. A tensor that several modules share comes once, under its first name.
    """
    cuts = cuts_of(layout, plan, present or PruningPlan.dense(plan.structure))
    inside = tuple(f"{layout.layers}.{layer}." for layer in plan.skipped)  # nothing of these is exported
    seen: set[int] = set()
    for name, module in model.named_modules():
        if name.startswith(inside):  # part of a projection that was taken as a whole
            continue
        cut = cuts.get(name)
        if isinstance(module, Gate):  # folded into its projection
            continue
        if cut is None:
            own = [(key, p) for key, p in module.named_parameters(recurse=False) if id(p) not in seen]
            seen |= {id(p) for _, p in own}
            with gathered([p for _, p in own]):
                for key, parameter in own:
                    yield f"{name}.{key}".lstrip("."), _as_it_is(parameter)
            continue
        inside = (*inside, name + ".")
        gate = gate_before(model, name) if cut.side == "in" else None
        with gathered([*module.parameters(), *(gate.parameters() if gate else [])]):
            yield from _projection_tensors(name, module, gate, cut)


def _as_it_is(tensor: Tensor) -> Exported:
    return Exported(tuple(tensor.shape), lambda part: tensor.detach()[part].to(torch.float32, copy=True))


def _projection_tensors(name: str, module: Any, gate: Gate | None, cut: Cut) -> Iterator[tuple[str, Exported]]:
    base = getattr(module, "base_layer", module)
    if not cut.vanishes:
        shape = list(base.weight.shape)
        shape[cut.axis] = len(cut.index)
        yield f"{name}.weight", Exported(tuple(shape), partial(kept_rows, module, gate, cut))
    bias = getattr(base, "bias", None)
    if bias is None or (cut.vanishes and cut.side == "out"):
        return
    kept = bias.detach() if cut.side == "in" else bias.detach().index_select(0, cut.index.to(bias.device))
    yield f"{name}.bias", _as_it_is(kept)


def export(
    model: Any,
    layout: Layout,
    plan: PruningPlan,
    tokenizer: Any,
    folder: Path,
    present: PruningPlan | None = None,
) -> bool:
    """Write the pruned model in fp32 to `folder` (rank 0 writes, all ranks must call). Returns whether it needs remote code.

    `present`: what the model physically holds (None: dense). The folder appears complete or not at all.
    A model of which nothing was cut loads with the stock class.
    """
    needs_remote_code = not bool(plan.mask().all())
    weights = WeightFiles(folder.with_name(f".{folder.name}.weights.tmp"))
    for name, tensor in pruned_tensors(model, layout, plan, present):
        if rank() == 0:
            weights.add(name, tensor)
    config = exported_config(model, layout, plan, needs_remote_code)
    generation = None
    if auto_class_for(type(model).__name__) == "AutoModelForCausalLM":
        generation, tokenizer = model.generation_config, copy.deepcopy(tokenizer)
        tokenizer.padding_side = "left"  # generation goes on at the right end
    parts = [part for part in (config, generation, tokenizer) if part is not None]
    on_rank_0(f"writing the export {folder}", lambda: write_folder(folder, weights, parts, needs_remote_code))
    return needs_remote_code


class WeightFiles:
    """The weights of an export on their way to its folder, which rest in the page cache and not in this process's memory.

    Each lies in a file of its own, numbers only, until there are `MAX_FILE_BYTES` of them, which become one file.
    Everything lies in `scratch` until `finish`. A write that fails is said there as well: until then other ranks count on
    this one.
    """

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.waiting: dict[str, Tensor] = {}  # mapped from their files
        self.written: list[dict[str, int]] = []  # by file: bytes of each tensor
        self.failure: Exception | None = None

    def add(self, name: str, tensor: Exported) -> None:
        if self.failure is not None:
            return
        if self.waiting and sum(other.nbytes for other in self.waiting.values()) + tensor.nbytes > MAX_FILE_BYTES:
            self._write()
        with self._noting_failure():
            self.scratch.mkdir(parents=True, exist_ok=True)
            self.waiting[name] = new_mapped(self.scratch / f"waiting-{len(self.waiting)}", tensor.shape)
            tensor.write(self.waiting[name])

    def _write(self) -> None:
        from safetensors.torch import save_file

        with self._noting_failure():
            save_file(self.waiting, self.scratch / str(len(self.written)), {"format": "pt"})
            for part in self.scratch.glob("waiting-*"):
                part.unlink()
        self.written.append({name: tensor.nbytes for name, tensor in self.waiting.items()})
        self.waiting = {}

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            self.failure = error

    def finish(self, folder: Path) -> None:
        """Move the files to `folder` under Hugging Face's names, with an index where there are several. Raises OSError."""
        if self.failure is None:
            self._write()
        if self.failure is not None:
            raise self.failure
        count = len(self.written)
        where: dict[str, str] = {}
        for i, sizes in enumerate(self.written):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            (self.scratch / str(i)).replace(folder / file)
            where |= dict.fromkeys(sizes, file)
        if count > 1:
            total = sum(sum(sizes.values()) for sizes in self.written)
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def discard(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)


def new_mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A new file as an fp32 tensor. Its room is taken first: on a full disk, writing to it would end the process by a signal."""
    size = math.prod(shape)
    reserve = getattr(os, "posix_fallocate", lambda file, start, length: os.truncate(file, length))  # not everywhere
    with path.open("wb") as file:
        reserve(file.fileno(), 0, 4 * size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)


def write_folder(folder: Path, weights: WeightFiles, parts: list[Any], needs_remote_code: bool) -> None:
    """The Hugging Face folder, whole or not at all. `parts`: configurations and tokenizer, which save themselves."""
    try:
        with whole_folder(folder) as unfinished:
            weights.finish(unfinished)
            milestone("export/half written")
            if needs_remote_code:
                shutil.copyfile(Path(modeling_prunadapt.__file__), unfinished / MODELING_FILE)
            for part in parts:
                part.save_pretrained(unfinished)
    finally:
        weights.discard()


def exported_config(model: Any, layout: Layout, plan: PruningPlan, needs_remote_code: bool) -> Any:
    """The model's configuration, with the structure and the class that reads it where something was cut."""
    config = copy.deepcopy(model.config)
    stock = type(model).__name__
    config.dtype = torch.float32
    if FAMILIES[config.model_type].is_decoder:
        config.use_cache = True  # it was off for training
    config.architectures = [f"Pruned{stock}" if needs_remote_code else stock]
    if needs_remote_code:
        kept = [len(units) for units in plan.kept]
        width = len(layout.sublayers)
        rows = [kept[i : i + width] for i in range(0, len(kept), width)]
        config.pruned_structure = {"layout": layout.to_dict(), "kept": rows}
        module = MODELING_FILE.removesuffix(".py")
        config.auto_map = {auto_class_for(stock): f"{module}.Pruned{stock}"}
    return config


def auto_class_for(stock: str) -> str:
    """The auto class that loads a stock class."""
    return (
        "AutoModelForCausalLM"
        if stock.endswith(("ForCausalLM", "LMHeadModel"))
        else "AutoModelForSequenceClassification"
    )


def auto_class_of(folder: Path) -> str:
    return auto_class_for(json.loads((folder / "config.json").read_text())["architectures"][0])


@dataclass(frozen=True)
class Reload:
    """A folder and what a fresh process is to compute from it.

    `latency`: {"batch_size", "seq_length", "repeats", "dtype"} to time it against the dense stock model as well.
    `adapter_of`: the folder is a PEFT adapter of this base: {"model", "auto_class", "num_labels", "pad_token_id"}.
    """

    folder: Path
    datasets: dict[str, Rows]
    batch_size: int
    device: torch.device
    needs_remote_code: bool = False
    dtype: str = "float32"
    latency: dict[str, Any] | None = None
    threads: int | None = None
    adapter_of: dict[str, Any] | None = None

    def request(self, scratch: Path) -> dict[str, Any]:
        """As reload.py reads it; answers are written to `scratch`."""
        rows = next(iter(self.datasets.values()))
        return {
            "folder": str(self.folder.resolve()),
            "rows": {
                name: [{c: row[c] for c in rows.columns} for row in rows.examples]
                for name, rows in self.datasets.items()
            },
            "labels": {n: rows.token_labels for n, rows in self.datasets.items() if rows.token_labels is not None},
            "auto_class": self.adapter_of["auto_class"] if self.adapter_of else auto_class_of(self.folder),
            "needs_remote_code": self.needs_remote_code,
            "pad_token_id": rows.tokenizer.pad_token_id,
            "batch_size": self.batch_size,
            "device": str(self.device),
            "dtype": self.dtype,
            "threads": self.threads,
            "latency": self.latency,
            "adapter_of": self.adapter_of,
            "logits": str(scratch / "logits.safetensors"),
            "result": str(scratch / "result.json"),
        }


@dataclass(frozen=True)
class Reloaded:
    """What a fresh process computed from an exported folder: logits float32 [N, C] per dataset, and timings."""

    logits: dict[str, Tensor]
    latency: dict[str, Any] | None


def reload_in_fresh_process(*reloads: Reload) -> list[Reloaded]:
    """Load each folder in a new Python process that does not import this package, and predict.

    One process for all: most of its time it imports. Folders of stock classes come first, before any code of a folder's own.
    Raises ParityError with the process's last words if it fails.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        order = sorted(range(len(reloads)), key=lambda i: reloads[i].needs_remote_code)
        for i in order:
            (scratch / str(i)).mkdir()
            (scratch / str(i) / "request.json").write_text(json.dumps(reloads[i].request(scratch / str(i))))
        script = shutil.copyfile(Path(reload.__file__), scratch / "reload.py")
        drop = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
        environment = {k: v for k, v in os.environ.items() if k not in drop}
        environment |= {"HF_MODULES_CACHE": f"{scratch}/modules", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        requests = [str(scratch / str(i) / "request.json") for i in order]
        done = run_script(script, requests, environment, scratch)
        if done.returncode != 0:
            failed = next((i for i in order if not (scratch / str(i) / "result.json").exists()), order[-1])
            folder = reloads[failed].folder
            raise ParityError(f"the exported folder {folder} could not be reloaded:\n{done.stderr[-3000:]}")
        answers = [scratch / str(i) for i in range(len(reloads))]
        return [
            Reloaded(load_file(a / "logits.safetensors"), json.loads((a / "result.json").read_text()).get("latency"))
            for a in answers
        ]


def run_script(
    script: Path, arguments: list[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """A Python process of its own, in `folder`."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def compare_logits(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The report's parity block over all datasets: (trained, exported) logits, float32 [N, C] twice. NaN is infinite."""
    trained, exported = (torch.cat([pair[i].flatten() for pair in pairs.values()]) for i in (0, 1))
    difference = float((trained - exported).abs().nan_to_num(nan=torch.inf).max())
    return {
        "max_abs_logit_diff": difference if difference < torch.inf else sys.float_info.max,
        "tolerance": TOLERANCE * max(1.0, float(trained.abs().max())),
        "examples": sum(len(logits) for logits, _ in pairs.values()),
    }


def cast(folder: Path, dtype: torch.dtype) -> None:
    """Store the weights of an exported folder in another dtype, file by file."""
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.glob("*.safetensors")):
        with files.whole_path(file) as unfinished:
            save_file({name: t.to(dtype) for name, t in load_file(file).items()}, unfinished, {"format": "pt"})
            unfinished.chmod(usual_mode())
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    files.replace(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
