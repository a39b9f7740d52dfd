"""The command `prunadapt plan`: its options, and planner.py's plan as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunadapt_ds import resources
from prunadapt_ds.commands.planner import plan, read_config
from prunadapt_ds.config import parse_beside
from prunadapt_ds.errors import Problem, UserError, exit_code_of
from prunadapt_ds.options import Usage, option
from prunadapt_ds.zero_costs import BYTES, Machine

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


_LEAST = 1e6


def quantity(text: str) -> float:
    """Parse "80GiB", "400GB/s" or "4e14" as bytes, bytes/s or operations/s.

    Raises ValueError, also below `_LEAST`: whoever writes 80 does not mean bytes.
    """
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([KMGT]i?)?(?:B|FLOPS?)?(?:/s)?\s*", text)
    value = float(found[1]) * _UNITS[found[2] or ""] if found else 0.0
    if found is None or not (value > 0 and math.isfinite(value)):
        raise ValueError("must be a quantity such as 80GiB, 400GB/s or 4e14")
    if value < _LEAST:
        raise ValueError(
            f"is less than any GPU has; write the unit: {found[1]}GiB, {found[1]}GB/s, or {found[1]}T for operations/s"
        )
    return value


def quantity_option(default: str, text: str) -> Any:
    """An `option` whose value is parsed by `quantity`."""
    return option(default, text, reads=quantity)


@dataclass
class PlanOptions:
    """Machine and model."""

    world_size: int = option(1, "ranks", least=1, most=1_000_000)
    gpus_per_node: int = option(8, "ranks that share a node", least=1)
    gpu_memory: str = quantity_option("80GiB", "memory of one GPU")
    flops: str = quantity_option("400e12", "floating-point operations/s that a GPU sustains in matrix products")
    bandwidth: str = quantity_option("400GB/s", "bandwidth from a GPU to the others on its node")
    network_bandwidth: str = quantity_option("25GB/s", "bandwidth from a GPU to other nodes")
    host_bandwidth: str = quantity_option("25GB/s", "bandwidth from a GPU to its host's memory")
    dtype: str = option("bf16", 'the value of an "auto" in the file', choices=("bf16", "fp32"))
    num_labels: int = option(2, "classes; 1 for regression", least=1, most=1_000_000)
    train_examples: int = option(100_000, "training examples whose teacher logits are kept", least=1)
    json: bool = option(False, "print JSON")

    def machine(self) -> Machine:
        """The machine on which the estimates are based, in bytes, bytes/s and operations/s."""
        texts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["reads"] is quantity}
        rates = {name: quantity(text) for name, text in texts.items()}
        return Machine(self.world_size, self.gpus_per_node, **rates)


USAGE = Usage(
    "Estimate memory, communication and time of a run with every file in ds_configs/ (or the one named by --ds_config), from "
    "the model's configuration alone. All options of a run are accepted; those that matter most are listed.",
    "prunadapt plan --model_name_or_path ./llama --task_type causal_lm --max_seq_length 4096 --per_device_train_batch_size 1 "
    "--gradient_checkpointing --world_size 16",
    frozenset(
        {
            *(f.name for f in dataclasses.fields(PlanOptions)),
            *("model_name_or_path", "trust_remote_code", "task_type", "max_seq_length", "ds_config"),
            *("method", "target_sparsity", "budget", "keep_in_outer_layers", "distill_weight", "distill_top_k"),
            *("r", "train_norms", "target_modules"),
            *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
        }
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan for the command line `argv`. Returns the exit code."""
    return exit_code_of(lambda: print(run(list(sys.argv[1:] if argv is None else argv))))


def run(argv: list[str]) -> str:
    """The text to print. Raises UserError with every problem of the command line."""
    config, sections = parse_beside({"plan": PlanOptions}, argv, USAGE, reads_data=False)
    asked: PlanOptions = sections["plan"]
    problems: list[Problem] = []
    if config.prune.budget == "latency":
        remedy = "is measured when a run starts, on its device; plan with --budget macs and a similar target sparsity"
        name = "budget" if config.prune.target_speedup is None else "target_speedup"
        problems.append(Problem(name, getattr(config.prune, name), remedy))
    if config.lora.adapter_name_or_path is not None:
        remedy = "is not read here; give its rank with --r and its projections with --target_modules"
        problems.append(Problem("adapter_name_or_path", config.lora.adapter_name_or_path, remedy))
    if problems:
        raise UserError(problems)
    named = "ds_config" in config.given
    files = [Path(config.train.ds_config)] if named else sorted(resources.folder("ds_configs").glob("*.json"))
    if not files:
        files = [Path(config.train.ds_config)]  # reading it reports that it is missing
    model_config = read_config(
        config.model.model_name_or_path,
        asked.num_labels,
        is_language=config.is_language,
        trust_remote_code=config.model.trust_remote_code,
    )
    found = plan(
        model_config,
        config,
        asked.machine(),
        files,
        dtype=asked.dtype,
        num_labels=asked.num_labels,
        train_examples=asked.train_examples,
    )
    return json.dumps(found, indent=1) if asked.json else table(found)


def size(count: float) -> str:
    """A number of bytes as readable text."""
    power = min(4, max(0, (int(count).bit_length() - 1) // 10))
    value = count / 1024**power
    return f"{value:.3g} {_SIZES[power]}" if value < 999.5 else f"{value:.0f} {_SIZES[power]}"


def table(found: dict[str, Any]) -> str:
    """The plan as text: first its assumptions, then a block for each ds_config."""
    model, machine, asked = found["model"], found["machine"], found["run"]
    world = machine["world_size"]
    lines = [
        f"{model['architecture']}: {model['parameters']:,} parameters, {model['blocks']:,} in blocks; {model['trainable']:,} "
        f"trainable (--method {asked['method']}); {asked['target_sparsity']:.1%} of the blocks cut, evenly over the layers",
        f"{world} rank(s), {min(world, machine['gpus_per_node'])} per node; a step: {asked['per_device_train_batch_size']} x "
        f"{asked['max_seq_length']} tokens per rank and micro-batch"
        + (", blocks recomputed" if asked["gradient_checkpointing"] else ""),
        f"assumed: {size(machine['gpu_memory'])} per GPU, {machine['reserve']:.0%} of it reserved; {machine['flops']:.3g} FLOP/s; "
        f"{machine['bandwidth'] / 1e9:.4g} GB/s within a node, {machine['network_bandwidth'] / 1e9:.4g} between nodes, "
        f"{machine['host_bandwidth'] / 1e9:.4g} to the host (--flops, --bandwidth, --network_bandwidth, --host_bandwidth)",
        "",
    ]
    header = (
        "",
        "frozen",
        "trainable",
        "gradients",
        "optimizer",
        "activations",
        "buffers",
        "GPU total",
        "host",
        "sent/step",
        "s/step",
    )
    rows: list[tuple[str, ...]] = [header]
    for c in found["configs"]:
        rows.append((f"{c['file']}: {'fits' if c['fits'] else 'does not fit'}", *[""] * (len(header) - 1)))
        shown = [c["phases"][0], c["phases"][-1]] if len(c["phases"]) > 1 else c["phases"]
        for p in shown:
            sent = p["sent_bytes"]["gather"] + p["sent_bytes"]["reduce"]
            rows.append(
                (
                    f"  {p['phase']}",
                    *(size(p["device_bytes"][name]) for name in BYTES),
                    size(p["device_total"]),
                    size(p["host_total"]),
                    size(sent),
                    f"{p['seconds']['total']:.3g}",
                )
            )
    widths = [max(len(row[i]) for row in rows if i or row[1]) for i in range(len(header))]
    for row in rows:
        lines.append(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
    macs, kept = found["macs_per_step"], found["checkpoint_bytes"]
    teacher = sum(found["teacher_bytes"].values())
    lines += [
        "",
        f"multiply-accumulates per rank and step: {macs['dense']:.3g} dense, {macs['last']:.3g} at the end",
        f"export {size(found['export_bytes'])}; a checkpoint {size(kept['dense'])}, at the end {size(kept['last'])}; "
        f"teacher {size(teacher)} in the host memory of every rank",
        f"fastest that fits: {found['fastest'] or 'none; use more GPUs, --gradient_checkpointing or a smaller batch'}",
    ]
    return "\n".join(lines)
