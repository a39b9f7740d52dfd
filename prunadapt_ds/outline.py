"""What a run says about itself: the command that makes it again, what will happen, and what to do next. Text only."""

from __future__ import annotations

import shlex
from typing import Any

from prunadapt_ds.config import OPTIONS, Config


def command(config: Config, world_size: int) -> str:
    """The options that were given, wherever they came from, as one line for a shell."""
    words = ["deepspeed", "--num_accelerators", str(world_size)] if world_size > 1 else ["python"]
    words.append("launcher/train.py")
    for name, option in OPTIONS.items():
        if name in config.given:
            value: Any = getattr(getattr(config, option.section), name)
            words += [f"--{name}", *map(_word, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
