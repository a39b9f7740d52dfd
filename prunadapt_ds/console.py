"""One command for all programs: `prunadapt train ...`, or `python -m prunadapt_ds train ...` under any launcher.

A program is imported only when it is run, so that `prunadapt --help` needs no torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from prunadapt_ds.environment import prepare_environment
from prunadapt_ds.errors import Problem, UserError


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, the module whose `main(argv)` returns the exit code, and its help text."""

    name: str
    module: str
    text: str


# fmt: off
COMMANDS = (
    Command("train", "train", "prune while fine-tuning, export a smaller model, report"),
    Command("plan", "commands.plan", "estimate the memory, communication and seconds of a run without its weights"),
    Command("evaluate", "commands.evaluate", "score an exported folder, or any stock model, on a task"),
    Command("predict", "commands.predict", "predict for a file or standard input, or write a GLUE submission"),
    Command("export", "commands.reexport", "export other formats from a finished run, or an interrupted run from its checkpoint"),
    Command("compare", "commands.compare", "compare any number of runs in one table and one page"),
    Command("glue-table", "commands.glue_table", "collect the runs of all GLUE tasks in one table"),
    Command("doctor", "commands.doctor", "check this installation and the launched ranks, and say what is wrong"),
    Command("init-slurm", "commands.init_slurm", "copy SLURM templates and DeepSpeed configurations into a folder"),
)
# fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word of `argv` names with the rest; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # `deepspeed --module` puts the rank, which the environment also states, before everything else.
    while words and words[0].startswith(("--local_rank=", "--local-rank=")):
        del words[0]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else UserError.exit_code
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"prunadapt {version('prunadapt_ds')}")
        return 0
    command = next((c for c in COMMANDS if c.name == words[0].replace("_", "-")), None)
    if command is None:
        print(f"error: {_unknown(words[0])}", file=sys.stderr)
        return UserError.exit_code
    prepare_environment()  # before torch and deepspeed are imported
    sys.argv = [f"prunadapt {command.name}", *words[1:]]  # what `--help` calls the program
    return int(importlib.import_module(f"prunadapt_ds.{command.module}").main(words[1:]))


def usage() -> str:
    """The text of `prunadapt --help`."""
    width = max(len(c.name) for c in COMMANDS)
    lines = [
        "usage: prunadapt COMMAND [option ...]",
        "",
        "Fine-tuning that is cheap to train and leaves a model that is cheap to serve.",
        "",
        "commands:",
        *(f"  {c.name:<{width}}  {c.text}" for c in COMMANDS),
        "",
        "`prunadapt COMMAND --help` lists its options. On several ranks: deepspeed --module prunadapt_ds COMMAND ..., or",
        "torchrun --nproc-per-node N -m prunadapt_ds COMMAND ...",
        "",
        "example: prunadapt train --model_name_or_path bert-base-uncased --task_name mrpc --target_sparsity 0.6",
    ]
    return "\n".join(lines)


def _unknown(word: str) -> Problem:
    import difflib

    names = [c.name for c in COMMANDS]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return Problem("command", word, f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}")
