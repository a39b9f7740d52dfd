"""Bytes a rank holds: counted tensor by tensor, and measured from outside.

On an accelerator the allocator's peak is the measure. On a CPU the counted bytes are what targets speak of; the resident
memory of the process is reported beside them, anonymous pages only, above the level just before the model was loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes; 0 where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


class PeakMemory:
    """High-water mark of a rank's memory since the last `reset`, above the level at construction."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before = 0  # the mark of an earlier process of the same run
        self.baseline = 0 if device.type == "cuda" else _status_bytes("RssAnon")
        self.reset()

    def reset(self) -> None:
        self.before = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):  # no such file, or not allowed: the mark then covers the whole life of the process
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return max(self.before, torch.cuda.max_memory_allocated(self.device))
        return max(self.before, _status_bytes("VmHWM") - _status_bytes("RssFile") - self.baseline)


def return_freed() -> None:
    """Give memory that the process has freed back to the system, where the C library can: glibc keeps most of it otherwise."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class SavedActivations:
    """Counts the tensors autograd keeps for a backward pass: distinct storages that belong to no parameter.

    `bytes` is the most of any stretch that was watched, a forward and a backward pass each: the addresses of one are used
    again in the next.

    Tensors of the meta device count like real ones. Of a recomputed block its inputs are
    seen, and not what it saves while it is computed again.
    """

    def __init__(self) -> None:
        self._most = self._now = 0
        self._seen: set[int] = set()

    @property
    def bytes(self) -> int:
        return max(self._most, self._now)

    def _pack(self, tensor: Tensor) -> Tensor:
        is_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        storage = tensor.untyped_storage()
        identity = storage.data_ptr() or storage._cdata
        if not is_parameter and identity not in self._seen:
            self._seen.add(identity)
            self._now += storage.nbytes()
        return tensor

    @contextmanager
    def watch(self) -> Iterator[None]:
        self._most, self._now = self.bytes, 0
        self._seen.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def parameter_bytes(model: nn.Module, *, only_frozen: bool = False) -> int:
    """Bytes of parameters on this rank now: shards, and whatever is whole."""
    total = 0
    for parameter in model.parameters():
        if only_frozen and parameter.requires_grad:
            continue
        total += parameter.numel() * parameter.element_size()
        shard = getattr(parameter, "ds_tensor", None)
        if shard is not None:
            total += shard.numel() * shard.element_size()
    return total


def optimizer_bytes(engine: Any) -> int:
    """Bytes of this rank's share of fp32 masters and Adam moments: 12 per element it owns, at least 8."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            total += parameter.numel() * parameter.element_size()
    for state in optimizer.state.values():
        total += sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
    return total
