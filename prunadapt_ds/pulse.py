"""What ranks tell each other once a step, without waiting: is one asked to stop, is a loss no number, has one failed?

The sum of a few flags over all ranks is started at the end of a step and read at the end of the next one, when it has long
arrived: no rank waits for it, and on an accelerator the host does not wait for the device.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
STOPPING = b"\nstopping after this step; once more to leave now\n"  # on a line of its own, below a bar


class StopSignals:
    """Remembers the first signal that asks this process to stop. A second Ctrl-C ends it at once.

    speaks: whether this process says that it has heard a Ctrl-C; one of all ranks does.
    """

    def __init__(self, speaks: bool = False) -> None:
        self.name, self.speaks = "", speaks
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """From now on. Only a process's main thread may; elsewhere signals do what they did."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self.speaks:
                with contextlib.suppress(OSError):  # whoever listened is gone
                    os.write(2, STOPPING)  # no buffer of Python's, which this handler may have interrupted

    def forget(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Pulse:
    """Sums of `size` flags over all ranks, one step late."""

    def __init__(self, size: int, device: torch.device):
        self.size, self.device = size, device
        self._sent: Tensor | None = None
        self._work: Any = None

    def send(self, flags: Tensor) -> None:
        """Start to add up `flags`: float [size], on the device. Collective, does not wait."""
        assert self._sent is None, "what was sent before must be read first"
        total = flags.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._work = dist.all_reduce(total, async_op=True)
        if self.device.type != "cuda":
            self._sent = total
            return
        if self._work is not None:
            self._work.wait()  # orders streams, the host goes on
            self._work = None
        self._sent = torch.empty(self.size, pin_memory=True).copy_(total, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> list[float] | None:
        """The sums of what was sent last; None if nothing was sent since the last call."""
        if self._sent is None:
            return None
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self.device.type == "cuda":
            self._arrived.synchronize()
        sums, self._sent = self._sent.tolist(), None
        return sums
