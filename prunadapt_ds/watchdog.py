"""A process that makes no progress for too long dumps its stacks and exits, instead of waiting forever.

One stuck rank makes all others wait; each of them exits like this, and the stacks show who waits for whom. Other modules
call `beat` in their loops, wrap single long operations in `resting`, and call `rest` before long work that ends with the next
beat. None of these does anything until `start`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LEAST_SECONDS = 60.0  # of silence before a process counts as stuck; PRUNADAPT_STUCK_SECONDS overrides it
TIMES_THE_LONGEST = 20.0  # the limit is at least this many times the longest gap between two beats so far
REST_SECONDS = 3600.0  # the limit for loading, building, compiling and writing: long, but not forever


class _Watch:
    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self.least = float(os.environ.get("PRUNADAPT_STUCK_SECONDS", LEAST_SECONDS))
        self.last, self.longest, self.resting = time.monotonic(), 0.0, True
        self.silent = 0.0  # seconds without a beat while this process was running
        self.done = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()

    def limit(self) -> float:
        if self.resting or not self.longest:
            return max(REST_SECONDS, self.least)
        return max(self.least, TIMES_THE_LONGEST * self.longest)

    def _run(self) -> None:
        tick = min(1.0, self.least / 4)
        while not self.done.wait(tick):
            self.silent += tick  # not from the clock, which keeps running while the process is suspended
            if self.silent > self.limit():
                self._strike()

    def _strike(self) -> None:
        path = self.folder / f"stuck-rank-{self.rank}.txt"
        text = f"error: rank {self.rank} has made no progress for {self.limit():.0f} s and ends"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file)
            text += f"; the stacks of its threads are in {path}"
        except OSError:
            faulthandler.dump_traceback()
        print(text, file=sys.stderr, flush=True)
        os._exit(1)


_watch: _Watch | None = None


def start(folder: Path, rank: int) -> None:
    """Watch this process; if it gets stuck, its stacks are written to `folder`."""
    global _watch
    stop()
    _watch = _Watch(folder, rank)


def stop() -> None:
    global _watch
    if _watch is not None:
        _watch.done.set()
        _watch = None


def beat() -> None:
    """Report progress, once per iteration of a loop."""
    if _watch is not None:
        now = time.monotonic()
        if not _watch.resting:
            _watch.longest = max(_watch.longest, now - _watch.last)
        _watch.last, _watch.silent, _watch.resting = now, 0.0, False


def rest() -> None:
    """Allow long work until the next beat."""
    if _watch is not None:
        _watch.last, _watch.silent, _watch.resting = time.monotonic(), 0.0, True


@contextlib.contextmanager
def resting() -> Iterator[None]:
    """Allow long work inside the context."""
    rest()
    try:
        yield
    finally:
        beat()
