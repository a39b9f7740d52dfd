"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
STOPPING = b"\nstopping after this step; once more to leave now\n"  # on a line of its own, below a progress bar


class StopSignals:
    """Remembers the first signal that asks this process to stop. A second Ctrl-C ends the process at once.

    speaks: whether this process acknowledges a Ctrl-C on standard error; one rank does.
    """

    def __init__(self, speaks: bool = False) -> None:
        self.name, self.speaks = "", speaks
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Install the handlers. Only a process's main thread may; in any other thread this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self.speaks:
                with contextlib.suppress(OSError):  # nobody reads it any more
                    os.write(2, STOPPING)  # past Python's buffers: this handler may have interrupted a write to them

    def forget(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
