"""Starts a benchmark's script on several ranks, and lets the script recognise that it runs as one."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(ROOT))


def deepspeed(ranks: int, *options: str) -> list[str]:
    """The launcher's command up to the script, for ranks on this machine."""
    return [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks), *options]


def measured(ranks: int, script: str, *words: object) -> list[str]:
    """The command with which a script runs its own `measure` on every rank, with the arguments `words`."""
    return [*deepspeed(ranks), script, "--measure", *map(str, words)]


def from_anywhere(model: str) -> str:
    """The name of a model for a process in another working directory: a folder's is made absolute, a hub id stays."""
    return str(Path(model).resolve()) if model != "sample" and Path(model).is_dir() else model


def words_of_a_rank() -> list[str] | None:
    """The arguments that `measured` passed to this process, or None if it is not a rank.

    On a rank, also prepares the environment for torch and DeepSpeed.
    """
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if words[:1] != ["--measure"]:
        return None
    from prunadapt_ds.environment import prepare_environment

    prepare_environment()
    return words[1:]
