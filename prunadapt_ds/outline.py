"""What a run says about itself: the command that makes it again, what will happen, and what to do next. Text only."""

from __future__ import annotations

import shlex
from typing import Any

from prunadapt_ds.config import OPTIONS, Config


def command(config: Config, world_size: int) -> str:
    """The options that were given, wherever they came from, as one line for a shell."""
    words = ["deepspeed", "--num_accelerators", str(world_size), "--module"] if world_size > 1 else ["python", "-m"]
    words += ["prunadapt_ds", "train"]  # works in a checkout and with an installed package alike
    for name, option in OPTIONS.items():
        if name in config.given:
            value: Any = getattr(getattr(config, option.section), name)
            words += [f"--{name}", *map(_word, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def footer(config: Config, task: str) -> str:
    """What to do with a finished run, each line ready to paste."""
    folder = shlex.quote(config.output.output_dir)
    names = ("task_name", "data_dir", "train_file", "validation_file")
    words = [word for n in names if getattr(config.data, n) for word in (f"--{n}", str(getattr(config.data, n)))]
    data = shlex.join(words or ["--task_name", task])
    answer = "" if config.data.task_type == "causal_lm" else _ANSWER.format(folder=folder)
    return f"""Next:
  read it      open {folder}/report.html
  watch it     tensorboard --logdir {folder} --host 127.0.0.1
  score it     python -m prunadapt_ds evaluate --model_name_or_path {folder}/exports/compact {data}{answer}"""


_ANSWER = """
  use it       python -m prunadapt_ds predict --model_name_or_path {folder}/exports/compact --input_file - --output_file -"""


DEFAULTS = ("method", "target_sparsity", "criterion", "r", "learning_rate", "num_train_epochs", "seed")


def header(
    config: Config, phases: list[tuple[str, int, int]], trainable: dict[str, int], total: int, sharding: str
) -> str:
    """What will happen. phases: (name, first step, end); trainable: numbers by group; total: numbers of the whole model."""
    steps = ", ".join(f"{name} {start} to {end}" for name, start, end in phases if end > start)
    groups = ", ".join(f"{name} {count:,}" for name, count in trainable.items())
    chosen = {o.name: getattr(getattr(config, o.section), o.name) for o in OPTIONS.values() if o.name in DEFAULTS}
    meaningless = {"num_train_epochs"} if config.train.max_steps > 0 else set()
    meaningless |= {"target_sparsity"} if "target_speedup" in config.given else set()
    defaults = ", ".join(f"{name}={chosen[name]}" for name in DEFAULTS if name not in config.given | meaningless)
    lines = [
        f"steps:     {steps}",
        f"trainable: {groups}; {sum(trainable.values()) / total:.1%} of {total:,}",
        f"sharding:  {sharding}",
    ]
    return "\n".join(lines + ([f"defaults:  {defaults}"] if defaults else []))


def sharding(stage: int, world_size: int) -> str:
    """What each rank holds of model, gradients and optimizer."""
    kept = (
        "nothing",
        "optimizer states",
        "optimizer states and gradients",
        "parameters, gradients and optimizer states",
    )
    rest = "" if stage == 3 else ", the rest whole"
    share = f"1/{world_size} of the {kept[stage]}{rest}" if stage else "everything whole"
    return f"ZeRO {stage} on {world_size} rank(s): each holds {share}"
