"""`launcher/plan.py`: its options, and the plan of planner.py as a table or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunadapt_ds import resources
from prunadapt_ds.config import TASK_TYPES, parse
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.options import as_called
from prunadapt_ds.planner import plan, read_config
from prunadapt_ds.zero_costs import BYTES, Machine

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str) -> float:
    """ "80GiB", "400GB/s", "4e14" as a number of bytes, bytes/s or operations/s. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([KMGT]i?)?(?:B|FLOPS?)?(?:/s)?\s*", text)
    value = float(found[1]) * _UNITS[found[2] or ""] if found else 0.0
    if not value > 0:
        raise ValueError
    return value


OWN: dict[str, tuple[Any, Any, str]] = {  # name: (kind, default, help)
    "world_size": (int, 1, "ranks"),
    "gpus_per_node": (int, 8, "ranks that share a node"),
    "gpu_memory": (quantity, "80GiB", "of one GPU"),
    "flops": (quantity, "400e12", "floating-point operations/s that a GPU sustains in these products"),
    "bandwidth": (quantity, "400GB/s", "of a GPU to the others of its node"),
    "network_bandwidth": (quantity, "25GB/s", "of a GPU to other nodes"),
    "host_bandwidth": (quantity, "25GB/s", "of a GPU to its host's memory"),
    "num_labels": (int, 2, "classes; 1 for regression"),
    "train_examples": (int, 100_000, "whose teacher logits are kept"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, plan, print; returns the exit code."""
    from prunadapt_ds.entry import message

    try:
        print(run(list(sys.argv[1:] if argv is None else argv)))
    except UserError as error:
        print(message(error), file=sys.stderr)
        return error.exit_code
    return 0


def run(argv: list[str]) -> str:
    """What is printed. Raises UserError with every problem of the command line."""
    values, rest = _parser().parse_known_args(argv)
    problems: list[Problem] = []
    own: dict[str, Any] = {}
    for name, (kind, _, _) in OWN.items():
        text = str(getattr(values, name))
        try:
            own[name] = kind(text)
            if own[name] < 1:
                raise ValueError
        except ValueError:
            wanted = "a whole number of at least 1" if kind is int else "a quantity such as 80GiB, 400GB/s or 4e14"
            problems.append(Problem(name, text, f"must be {wanted}"))
    for name, choices in (("dtype", ("bf16", "fp32")), ("task_type", TASK_TYPES)):
        if getattr(values, name) not in choices:
            problems.append(Problem(name, getattr(values, name), f"must be one of {', '.join(choices)}"))
    is_language = values.task_type == "causal_lm"
    if is_language:  # a run needs files; a plan reads none
        rest = ["--train_file", "any.txt", "--validation_file", "any.txt", *rest, "--task_type", "causal_lm"]
    try:
        config = parse(rest)
    except UserError as error:
        raise UserError([*error.problems, *problems]) from error
    if config.prune.budget == "latency":
        remedy = "is measured when a run starts, on its device; plan with --budget macs and a target sparsity near it"
        asked = "budget" if config.prune.target_speedup is None else "target_speedup"
        problems.append(Problem(asked, getattr(config.prune, asked), remedy))
    if config.lora.adapter_name_or_path is not None:
        remedy = "is not read here; say its rank with --r, its projections with --target_modules"
        problems.append(Problem("adapter_name_or_path", config.lora.adapter_name_or_path, remedy))
    if problems:
        raise UserError(problems)
    named = "ds_config" in config.given
    files = [Path(config.train.ds_config)] if named else sorted(resources.folder("ds_configs").glob("*.json"))
    if not files:
        files = [Path(config.train.ds_config)]  # says that it is not there
    model_config = read_config(
        config.model.model_name_or_path,
        own["num_labels"],
        is_language=is_language,
        trust_remote_code=config.model.trust_remote_code,
    )
    fields = {f.name for f in dataclasses.fields(Machine)}
    found = plan(
        model_config,
        config,
        Machine(**{name: value for name, value in own.items() if name in fields}),
        files,
        dtype=values.dtype,
        num_labels=own["num_labels"],
        train_examples=own["train_examples"],
    )
    return json.dumps(found, indent=1) if values.json else table(found)


_EXAMPLE = "prunadapt plan --model_name_or_path meta-llama/Llama-2-70b-hf --world_size 16 --target_sparsity 0.5"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [option ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Bytes, communication and seconds of a run for every file in ds_configs/, from the configuration alone.",
        epilog="Any option of a training is taken as well: --model_name_or_path, --method, --target_sparsity, --r,\n"
        "--per_device_train_batch_size, --max_seq_length, --gradient_checkpointing, --ds_config (that file only), ...\n\n"
        f"example: {as_called(_EXAMPLE)}",
        allow_abbrev=False,
    )
    for name, (_, default, text) in OWN.items():
        parser.add_argument(f"--{name}", default=default, help=f"{text} [{default}]")
    parser.add_argument("--dtype", default="bf16", help='what an "auto" in the file becomes: bf16 or fp32 [bf16]')
    parser.add_argument("--task_type", default=TASK_TYPES[0], help=f"{' or '.join(TASK_TYPES)} [{TASK_TYPES[0]}]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def size(count: float) -> str:
    """Bytes for a reader."""
    power = min(4, max(0, (int(count).bit_length() - 1) // 10))
    value = count / 1024**power
    return f"{value:.3g} {_SIZES[power]}" if value < 999.5 else f"{value:.0f} {_SIZES[power]}"


def table(found: dict[str, Any]) -> str:
    """The plan as text: first what it rests on, then a block for each ds_config."""
    model, machine, asked = found["model"], found["machine"], found["run"]
    world = machine["world_size"]
    lines = [
        f"{model['architecture']}: {model['parameters']:,} parameters, {model['blocks']:,} in blocks; {model['trainable']:,} train "
        f"(--method {asked['method']}); {asked['target_sparsity']:.1%} of the blocks cut, evenly over the layers",
        f"{world} rank(s), {min(world, machine['gpus_per_node'])} per node; a step: {asked['per_device_train_batch_size']} x "
        f"{asked['max_seq_length']} tokens per rank and micro-batch"
        + (", blocks recomputed" if asked["gradient_checkpointing"] else ""),
        f"taken: {size(machine['gpu_memory'])} per GPU, {machine['reserve']:.0%} of it not ours; {machine['flops']:.3g} FLOP/s; "
        f"{machine['bandwidth'] / 1e9:.4g} GB/s in a node, {machine['network_bandwidth'] / 1e9:.4g} between, "
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
        f"multiply-accumulates of a rank's step: {macs['dense']:.3g} dense, {macs['last']:.3g} at the end",
        f"export {size(found['export_bytes'])}; a checkpoint {size(kept['dense'])}, at the end {size(kept['last'])}; "
        f"teacher {size(teacher)} of every rank's host memory",
        f"fastest that fits: {found['fastest'] or 'none; take more GPUs, --gradient_checkpointing or a smaller batch'}",
    ]
    return "\n".join(lines)
