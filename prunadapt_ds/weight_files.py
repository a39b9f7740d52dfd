"""Weight files of an export, written through memory maps so that the kernel can evict their pages while they are filled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 2**30  # bytes of weights per exported file, unless a single tensor is larger


class WeightFiles:
    """Collects the weights of an export in the page cache instead of this process's memory.

    Each tensor is first a raw file of its own; every `MAX_FILE_BYTES` of them are then merged into one safetensors file. All
    files stay in `scratch` until `finish`. A failed write raises only there: until then, other ranks depend on this one to
    take part in collectives.
    """

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.waiting: dict[str, Tensor] = {}  # mapped from their files
        self.written: list[dict[str, int]] = []  # by file: bytes of each tensor
        self.failure: Exception | None = None

    def room_for(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """A memory-mapped fp32 tensor of `shape` to write the weights `name` to; None after a failure."""
        if self.waiting and sum(t.nbytes for t in self.waiting.values()) + 4 * prod(shape) > MAX_FILE_BYTES:
            self._write()
        if self.failure is None:
            with self._noting_failure():
                self.scratch.mkdir(parents=True, exist_ok=True)
                self.waiting[name] = new_mapped(self.scratch / f"waiting-{len(self.waiting)}", shape)
                return self.waiting[name]
        return None

    def _write(self) -> None:
        from safetensors.torch import save_file

        with self._noting_failure():
            save_file(self.waiting, self.scratch / str(len(self.written)), {"format": "pt"})
            for part in self.scratch.glob("waiting-*"):
                part.unlink()
        self.written.append({name: tensor.nbytes for name, tensor in self.waiting.items()})
        self.waiting = {}

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            self.failure = error

    def finish(self, folder: Path) -> None:
        """Move the files to `folder` under Hugging Face's names, with an index if there are several.

        Raises the OSError or SafetensorError of the first write that failed.
        """
        if self.failure is None:
            self._write()
        if self.failure is not None:
            raise self.failure
        count = len(self.written)
        where: dict[str, str] = {}
        for i, sizes in enumerate(self.written):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            (self.scratch / str(i)).replace(folder / file)
            where |= dict.fromkeys(sizes, file)
        if count > 1:
            total = sum(sum(sizes.values()) for sizes in self.written)
            write_index(folder, where, total)

    def discard(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)


def write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    """Write the index of several weight files. `weight_map`: the file of each tensor; `total`: the bytes of all."""
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def shapes(file: Path | str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a weight file, by name, from its header. Raises OSError or SafetensorError."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118


def new_mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A new file, mapped as an fp32 tensor. Its space is reserved first: writing to a map on a full disk raises SIGBUS."""
    size = prod(shape)
    if not size:
        return torch.empty(shape)  # no file can be mapped to nothing
    reserve = getattr(os, "posix_fallocate", lambda file, start, length: os.truncate(file, length))  # macOS has none
    with path.open("wb") as file:
        reserve(file.fileno(), 0, 4 * size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)
