"""Texts that a run prints about itself: the command that repeats it, what will happen, and what to do next."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunadapt_ds.config import METHODS, OPTIONS, Config


def command(config: Config, world_size: int, launcher: str | None = None, nodes: int = 1) -> str:
    """The run as one shell command: the launcher that was used, and all options that were given, from whatever source."""
    words = _started(world_size, launcher, nodes)
    words += ["prunadapt_ds", "train"]  # works in a checkout and with an installed package alike
    stated = config.by_name()
    for name in OPTIONS:
        if name in config.given:
            value = stated[name]
            words += [f"--{name}", *map(_word, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _started(world_size: int, launcher: str | None, nodes: int) -> list[str]:
    """The words before the module name. For several ranks and an unknown launcher, DeepSpeed's."""
    of_a_node = str(-(-world_size // nodes))
    several = nodes > 1
    if launcher == "torchrun":
        where = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "FIRST_NODE:29500"]
        return ["torchrun", *(where if several else []), "--nproc-per-node", of_a_node, "-m"]
    if launcher == "mpirun":
        return ["mpirun", "-n", str(world_size), "python", "-m"]
    if launcher == "srun":
        return ["srun", "--nodes", str(nodes), "--ntasks", str(world_size), "python", "-m"]
    if launcher == "deepspeed" or world_size > 1:
        return [
            *("deepspeed", *(["--num_nodes", str(nodes)] if several else [])),
            *("--num_accelerators", of_a_node, "--module"),
        ]
    return ["python", "-m"]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def footer(config: Config, task: str, *, is_pair: bool = False, board_dir: str | None = None) -> str:
    """Commands for a finished run, ready to paste. `board_dir`: folder of the event files, if not the run's own."""
    folder = config.output.output_dir
    compact = shlex.quote(f"{folder}/exports/compact")
    events = shlex.quote(board_dir or folder)
    report = shlex.quote(Path(folder, "report.html").absolute().as_uri())
    name = re.sub(r"[^\w.-]+", "-", f"{task}-{config.prune.method}")
    module = "python -m prunadapt_ds"
    return f"""Next:
  read it      python -m webbrowser -t {report}  # without a browser: {shlex.quote(folder)}/report.md
  watch it     tensorboard --logdir {events} --host 127.0.0.1
  score it     {module} evaluate --model_name_or_path {compact} {shlex.join(_data_words(config, task))}
  use it       {_use(config, is_pair, compact)}
  share it     hf upload {name} {compact} --private  # to your own account, after `hf auth login`"""


def _data_words(config: Config, task: str) -> list[str]:
    """The options with which `evaluate` reads the development set as the run did."""
    data = config.data
    names = (
        "task_type",
        "task_name",
        "data_dir",
        "train_file",
        "validation_file",
        "problem_type",
        "max_seq_length",
        "max_eval_samples",
    )
    values = {name: getattr(data, name) for name in names}
    if not data.train_file:
        values["task_name"] = data.task_name or task
    stated = {name: value for name, value in values.items() if value is not None and value != OPTIONS[name].default}
    return [word for name, value in stated.items() for word in (f"--{name}", str(value))]


def _use(config: Config, is_pair: bool, compact: str) -> str:
    """A command that runs one input through the exported folder."""
    if config.is_language:
        path = json.dumps(f"{config.output.output_dir}/exports/compact")
        code = f"pipeline('text-generation', model={path}, trust_remote_code=True)('once upon a time')"
        return shlex.join(["python", "-c", f"from transformers import pipeline; print({code})"])
    text = '{"sentence1": "a sentence", "sentence2": "another one"}' if is_pair else "a sentence"
    length = config.data.max_seq_length
    longest = "" if length == OPTIONS["max_seq_length"].default else f" --max_seq_length {length}"
    module = "python -m prunadapt_ds"
    return f"echo {shlex.quote(text)} | {module} predict --model_name_or_path {compact} --input_file -{longest}"


DEFAULTS = ("method", "target_sparsity", "criterion", "r", "learning_rate", "num_train_epochs", "seed")


def header(
    config: Config,
    phases: list[tuple[str, int, int]],
    trainable: dict[str, int],
    total: int,
    sharding: str,
    learning_rate: float | None = None,
) -> str:
    """The text printed before training: steps, trainable parameters, sharding and defaults.

    phases: (name, first step, end).  trainable: parameter counts by group.  total: parameter count of the whole model.
    learning_rate: the default that was chosen; None if the ds_config sets it.
    """
    steps = ", ".join(f"{name} {start} to {end}" for name, start, end in phases if end > start)
    groups = ", ".join(f"{name} {count:,}" for name, count in trainable.items())
    chosen = config.by_name() | {"learning_rate": None if learning_rate is None else f"{learning_rate:.2g}"}
    hidden = config.given | _meaningless(config)
    shown = [name for name in DEFAULTS if name not in hidden and chosen[name] is not None]
    lines = [
        f"steps:     {steps}",
        f"trainable: {groups}; {sum(trainable.values()) / total:.1%} of {total:,}",
        f"sharding:  {sharding}",
    ]
    defaults = ", ".join(f"{name}={chosen[name]}" for name in shown)
    return "\n".join(lines + ([f"defaults:  {defaults}"] if defaults else []))


def _meaningless(config: Config) -> set[str]:
    """Options that have no effect in this run."""
    methods = {name: option.limits["needs"].get("method", METHODS) for name, option in OPTIONS.items()}
    found = {name for name, those in methods.items() if config.prune.method not in those}
    found |= {"num_train_epochs"} if config.train.max_steps > 0 else set()
    found |= {"target_sparsity"} if "target_speedup" in config.given else set()
    return found | ({"r"} if config.lora.adapter_name_or_path else set())


def phases(step: int, start: int, end: int, total: int) -> list[tuple[str, int, int]]:
    """(name, first step, end) of the phases left after `step`: dense to `start`, pruning to `end`, recovery to `total`."""
    bounds = (("dense", 0, start), ("prune", start, end), ("recover", end, total))
    return [(name, max(step, first), last) for name, first, last in bounds if last > max(step, first)]


def sharding(stage: int, world_size: int, zero: Mapping[str, Any] | None = None) -> str:
    """Which parts of model, gradients and optimizer each rank holds, and what is offloaded.

    zero: the ds_config's `zero_optimization`.
    """
    kept = (
        "nothing",
        "optimizer states",
        "optimizer states and gradients",
        "parameters, gradients and optimizer states",
    )
    rest = "" if stage == 3 else ", the rest whole"
    share = f"1/{world_size} of the {kept[stage]}{rest}" if stage else "everything whole"
    parts = (("offload_param", "parameters"), ("offload_optimizer", "optimizer states"))
    places = {what: ((zero or {}).get(block) or {}).get("device", "none") for block, what in parts}
    away = [f"{what} in {_PLACES.get(place, place)}" for what, place in places.items() if place != "none"]
    return f"ZeRO {stage} on {world_size} rank(s): each holds {share}" + "".join(f"; {text}" for text in away)


_PLACES = {"cpu": "the host's memory", "nvme": "NVMe"}
