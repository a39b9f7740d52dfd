"""A benchmark on several ranks: how it is started, and how its script knows that it was."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(ROOT))


def deepspeed(ranks: int, *options: str) -> list[str]:
    """The launcher's command as far as the script, on this machine."""
    return [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks), *options]


def measured(ranks: int, script: str, *words: object) -> list[str]:
    """The command with which a script runs its own `measure` on every rank; `words` reach it there."""
    return [*deepspeed(ranks), script, "--measure", *map(str, words)]


def words_of_a_rank() -> list[str] | None:
    """What `measured` gave this process, which is then ready for torch and DeepSpeed; None where it is not a rank."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if words[:1] != ["--measure"]:
        return None
    from prunadapt_ds.environment import prepare_environment

    prepare_environment()
    return words[1:]
