"""Bytes a rank holds: counted tensor by tensor, and measured from outside.

On an accelerator the allocator's peak is the measure. On a CPU, targets refer to the counted bytes; the resident memory of
the process is reported beside them: anonymous pages only, above the level just before the model was loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds import distributed


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes; 0 if the system does not have it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


class PeakMemory:
    """High-water mark of a rank's memory since the last `reset`; on a CPU, above the level at construction."""

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
    """Return memory that the process has freed to the system, if the C library can: glibc keeps most of it otherwise."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class SavedActivations:
    """Counts the bytes that autograd keeps for a backward pass: distinct storages that belong to no parameter.

    `bytes` is the maximum over the watched contexts, each a forward and a backward pass; they are counted one by one, because
    later passes reuse addresses. Tensors on the meta device count like real ones. Of a recomputed block only the inputs are
    seen, not what it saves while it is recomputed.
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


@dataclass
class MemoryMarks:
    """Memory marks of a run, dense and after its last shrink: the maximum over ranks, except for `activation_bytes`.

    `live`: counted bytes in total, "dense" and "after_shrink"; `parts`: the same by part.  `sent`: bytes that a rank sends in a
    step.  `peaks`: measured bytes, "dense_phase" and "after_shrink".  `activation_bytes`: counted on this rank.
    `watched_length`: tokens of the longest sample in a step whose activations were counted with the present engine; 0: none yet.
    """

    peak: PeakMemory
    live: dict[str, int] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    activation_bytes: int = 0
    watched_length: int = 0

    def note_activations(self, found: int, length: int) -> None:
        """Record the activations of a step with samples of up to `length` tokens, more than any before with this engine."""
        is_first = self.watched_length == 0
        self.activation_bytes = found if is_first else max(found, self.activation_bytes)
        self.watched_length = length

    def note_live(self, parts: Mapping[str, int], sent: int, *, is_shrunk: bool) -> None:
        """Record the most that any rank holds now, in total and of each part, and what one sends in a step. Collective."""
        kind = "after_shrink" if is_shrunk else "dense"
        self.live[kind] = int(distributed.dist_max(sum(parts.values())))
        self.sent[kind] = sent
        self.parts[kind] = {name: int(distributed.dist_max(size)) for name, size in parts.items()}

    def note_peak(self, *, is_shrunk: bool) -> None:
        """Record the highest memory of any rank since the last mark; the next one starts here. Collective."""
        self.peaks["after_shrink" if is_shrunk else "dense_phase"] = int(distributed.dist_max(self.peak.bytes()))
        self.peak.reset()

    def saved(self) -> dict[str, Any]:
        """The marks as JSON, for a checkpoint. Collective."""
        of_engine = {"activations": self.activation_bytes, "watched_length": self.watched_length}
        marks = {"live": self.live, "parts": self.parts, "sent": self.sent, "peak": self.peaks}
        return {**marks, **of_engine, "now": distributed.dist_max(self.peak.bytes())}

    def restore(self, saved: Mapping[str, Any], *, is_shrunk: bool) -> None:
        """Continue from a checkpoint's marks."""
        self.live, self.peaks = dict(saved["live"]), dict(saved["peak"])
        self.parts, self.sent = dict(saved.get("parts", {})), dict(saved.get("sent", {}))
        self.peaks["after_shrink" if is_shrunk else "dense_phase"] = int(saved["now"])
        self.peak.reset()
        self.peak.before = int(saved["now"])
        self.activation_bytes, self.watched_length = saved["activations"], saved["watched_length"]


def parameter_bytes(model: nn.Module, *, only_frozen: bool = False) -> int:
    """Bytes of the parameters on this rank now: shards, and whatever is whole."""
    total = 0
    for parameter in model.parameters():
        if only_frozen and parameter.requires_grad:
            continue
        total += parameter.nbytes
        shard = getattr(parameter, "ds_tensor", None)
        if shard is not None:
            total += shard.nbytes
    return total
