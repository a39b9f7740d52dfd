"""Checkpoints on disk: one folder each, whole or absent, verified before they are used.

    checkpoints/step-120/tensors.safetensors    named tensors
    checkpoints/step-120/checkpoint.json        everything else, with size and sha256 of the tensors and of itself

Both are written to a folder of another name, synced to disk, and renamed. This module knows nothing about their content or
about ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunadapt_ds.faults import fault_point
from prunadapt_ds.files import NOT_THERE, discard, identity, whole_folder

FORMAT = 1
PREFIX = "step-"
TENSORS, STATE = "tensors.safetensors", "checkpoint.json"


class Damaged(Exception):
    """A checkpoint that is not what was written; the message says what is wrong."""


class Unread(Exception):
    """A checkpoint that may be intact, but cannot be read here and now; the message names it and says why."""


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint: where it is, and its JSON part."""

    folder: Path
    step: int
    state: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        """The folder of the run that wrote it."""
        return self.folder.parent.parent

    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / TENSORS)


def write(root: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Add the checkpoint of `step` to `root`, and keep the newest `keep` of those up to `step`. Raises OSError.

    Checkpoints of later steps are deleted: a run that went back to `step` writes them again.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = root / f"{PREFIX}{step}"
    sweep(root)
    try:
        with whole_folder(target) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / TENSORS)
            fault_point(f"checkpoint-{step}/half written")
            content = {"format": FORMAT, "step": step, **state, "files": {TENSORS: identity(unfinished / TENSORS)}}
            content = json.loads(json.dumps(content))  # as it will be read: numeric keys become strings
            (unfinished / STATE).write_text(json.dumps({**content, "sha256": _digest(content)}), encoding="utf-8")
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    for old in [c for c in listed(root) if c[0] != step and (c[0] > step or c[0] not in _newest(root, step, keep))]:
        discard(old[1])
    return target


def sweep(root: Path) -> None:
    """Remove what a killed writer has left half written or half removed."""
    for left in root.glob(f".{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def _newest(root: Path, step: int, keep: int) -> list[int]:
    return [number for number, _ in listed(root) if number <= step][:keep]


def listed(root: Path) -> list[tuple[int, Path]]:
    """List (step, folder) of what look like checkpoints, newest first. Raises OSError if `root` cannot be listed."""
    try:
        names = [name.removeprefix(PREFIX) for name in os.listdir(root) if name.startswith(PREFIX)]
    except NOT_THERE:
        return []
    return sorted(((int(number), root / f"{PREFIX}{number}") for number in names if number.isdecimal()), reverse=True)


def read(folder: Path) -> Checkpoint:
    """Read the checkpoint in `folder` and verify every byte. Raises Damaged, or Unread for a failure that is not damage.

    Every version of the format has `sha256` and `format`, so that a later version can be told from damage.
    """
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        digest = content.pop("sha256")
        if digest != _digest(content):
            raise Damaged(f"{STATE} was changed")
        if content["format"] > FORMAT:
            raise Unread(f"{folder} is of a later version (format {content['format']}, this one reads {FORMAT})")
        if content["format"] != FORMAT:
            raise Damaged(f"{STATE} has no known format")
        for name, written in content["files"].items():
            if identity(folder / name) != written:
                raise Damaged(f"{name} was cut short or changed")
        return Checkpoint(folder, int(content["step"]), content)
    except NOT_THERE as error:
        raise Damaged(f"{Path(error.filename or STATE).name} is missing") from error
    except OSError as error:  # no access, or a disk or file server that does not answer: it may be readable later
        raise Unread(f"{error.filename or folder} cannot be read ({error.strerror or error})") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise Damaged(f"{STATE} cannot be read ({type(error).__name__})") from error


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint below `root`, and a line about each newer one that is damaged. Raises Unread, OSError.

    One that cannot be read is not skipped: a run that goes on from an older one would delete it.
    """
    damaged: list[str] = []
    for _, folder in listed(root):
        try:
            return read(folder), damaged
        except Damaged as error:
            damaged.append(f"{folder}: {error}; skipped")
    return None, damaged


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
