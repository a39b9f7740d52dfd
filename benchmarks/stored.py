"""Results that a benchmark finds in its folder: they count if they were measured under the settings that are asked for."""

import json
from collections.abc import Mapping
from pathlib import Path

SHOWN = 5  # differences, before the rest are only counted


def refusal(asked: Mapping[Path, Mapping[str, object]]) -> str:
    """Why results that exist cannot count as what is `asked`, with the remedy; empty if they can.

    asked: the settings of every result, by its file. What an older file does not hold is not compared.
    """
    found = []
    for path, settings in asked.items():
        stored = json.loads(path.read_text()) if path.exists() else {}
        found += [
            f"{path}: {name} is {stored[name]!r} there, and {value!r} is asked for"
            for name, value in settings.items()
            if name in stored and stored[name] != value
        ]
    if not found:
        return ""
    rest = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    remedy = "ask for what is there, name another --results, or remove these files to measure them anew"
    return "\n  ".join(["results were measured under other settings:", *found[:SHOWN], *rest]) + f"\n{remedy}"
