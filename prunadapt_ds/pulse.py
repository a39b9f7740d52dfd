"""Flags that ranks exchange once per step without waiting: has a rank been asked to stop, has it failed, is its loss not finite?

The all-reduce of a few flags starts at the end of a step and is read at the end of the next one, when it has long finished:
no rank waits for it, and on an accelerator the host does not wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Pulse:
    """Sums of `size` flags over all ranks, one step late."""

    def __init__(self, size: int, device: torch.device):
        self.size, self.device = size, device
        self._sent: Tensor | None = None
        self._work: Any = None

    def send(self, flags: Tensor) -> None:
        """Start summing `flags`, float [size] on the device, over all ranks. Collective; does not wait."""
        assert self._sent is None, "what was sent before must be read first"
        total = flags.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._work = dist.all_reduce(total, async_op=True)
        if self.device.type != "cuda":
            self._sent = total
            return
        if self._work is not None:
            self._work.wait()  # orders the streams; the host does not wait
            self._work = None
        self._sent = torch.empty(self.size, pin_memory=True).copy_(total, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> list[float] | None:
        """Return the sums of what was sent last; None if nothing was sent since the last call."""
        if self._sent is None:
            return None
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self.device.type == "cuda":
            self._arrived.synchronize()
        sums, self._sent = self._sent.tolist(), None
        return sums
