"""Files for the weights of an export, whose pages the system can take back while they are filled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

MAX_FILE_BYTES = 2**30  # of weights in one exported file


class WeightFiles:
    """The weights of an export on their way to its folder, which rest in the page cache and not in this process's memory.

    Each lies in a file of its own, numbers only, until there are `MAX_FILE_BYTES` of them, which become one file.
    Everything lies in `scratch` until `finish`. A write that fails is said there as well: until then other ranks count on
    this one.
    """

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.waiting: dict[str, Tensor] = {}  # mapped from their files
        self.written: list[dict[str, int]] = []  # by file: bytes of each tensor
        self.failure: Exception | None = None

    def room_for(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Where to write the next tensor; None after a failure."""
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
        """Move the files to `folder` under Hugging Face's names, with an index where there are several. Raises OSError."""
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
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def discard(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)


def new_mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A new file as an fp32 tensor. Its room is taken first: on a full disk, writing to it would end the process by a signal."""
    size = prod(shape)
    reserve = getattr(os, "posix_fallocate", lambda file, start, length: os.truncate(file, length))  # not everywhere
    with path.open("wb") as file:
        reserve(file.fileno(), 0, 4 * size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)
