"""Writes metrics to the console, TensorBoard and metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prunadapt_ds import board


class Tracker:
    """The progress of a run on rank 0; on other ranks (`enabled=False`) every call does nothing.

    Shows a progress bar if standard error is a terminal, and prints a line per interval unless standard output is one too.
    Metric keys contain their unit, if any ("memory/parameters(bytes)"), and, before the slash, the group that TensorBoard
    shows them under.

    A run that resumes at `step` keeps the first `metrics_bytes` of metrics.jsonl, its size at that step. Raises OSError if
    that file cannot be opened; a run without TensorBoard continues. With `records=False` only the console shows metrics.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        *,
        enabled: bool,
        records: bool = True,
        step: int = 0,
        metrics_bytes: int = 0,
        board_dir: Path | None = None,
    ):
        self.enabled = enabled
        self.problem = ""  # why a line of metrics could not be written, to be reported to all ranks
        if not enabled:
            return
        from tqdm import tqdm

        output_dir.mkdir(parents=True, exist_ok=True)
        _quiet_writer_threads()
        self.total_steps = total_steps
        self._file = (output_dir / "metrics.jsonl" if records else Path(os.devnull)).open("ab", buffering=0)
        if records:
            self._file.truncate(min(metrics_bytes, self._file.tell()))
        shown = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=step, unit="step", disable=not shown, file=sys.stderr)
        # With `train > log`, the lines go to the log and the bar to the terminal.
        self._lines = not (shown and sys.stdout.isatty())
        self._postfix: dict[str, str] = {}
        self._began = step, time.monotonic()
        self._writer = self._new_writer(board_dir or output_dir / "runs", step) if records else None
        self.show(board.begin)

    def _new_writer(self, folder: Path, step: int) -> Any:
        """TensorBoard's writer, or None if its folder cannot be created: the run then continues without it."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            return SummaryWriter(str(folder), purge_step=step + 1)
        except Exception as error:  # an OSError, or tensorboard's own error for one
            self.say(f"TensorBoard logging is off: {' '.join(str(error).split())}")
            return None

    def say(self, text: str) -> None:
        """Print text for the user, above the bar."""
        if self.enabled:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def text(self, tag: str, text: str) -> None:
        """Write a text page to TensorBoard."""
        if self.enabled:
            self._board("add_text", tag, f"```\n{text}\n```")

    def show(self, draw: Callable[[Any], None]) -> None:
        """Call `draw` with TensorBoard's writer, to write pictures and the like."""
        if self.enabled:
            self._guarded(draw)

    def advance(self, step: int, phase: str) -> None:
        """Move the progress bar to `step` optimizer steps, without logging."""
        if self.enabled:
            self._bar.update(step - self._bar.n)
            self._bar.set_description(phase)

    def log(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        """Log one interval's metrics: a line in metrics.jsonl, scalars in TensorBoard, and a line or the bar on the console."""
        if not self.enabled:
            return
        line: dict[str, Any] = {"step": step, "phase": phase}
        for key, value in metrics.items():
            line[key] = value if math.isfinite(value) else None  # JSON has no NaN
            self._board("add_scalar", board.tag(key), board.scaled(key, value), step)
        try:
            text = json.dumps(line).encode() + b"\n"
            if self._file.write(text) != len(text):
                self.problem = "metrics.jsonl cannot be written: no space left on device"
        except OSError as error:
            self.problem = f"metrics.jsonl cannot be written: {error}"
        short = {_SHOWN[key][0]: f"{value / _SHOWN[key][1]:.4g}" for key, value in metrics.items() if key in _SHOWN}
        self._postfix |= short  # an evaluation logs only a score, and the loss should stay visible
        self.advance(step, phase)
        self._bar.set_postfix_str(_joined(self._postfix))
        if self._lines and short:
            self.say(f"step {step}/{self.total_steps}  {phase}  {_joined(short)}{self._left(step)}")

    def _left(self, step: int) -> str:
        """The time left at the pace so far, all phases and evaluations included."""
        first, began = self._began
        if not first < step < self.total_steps:
            return ""
        seconds = (time.monotonic() - began) / (step - first) * (self.total_steps - step)
        return f"  left {duration(seconds)}"

    def metrics_bytes(self) -> int:
        """Flush metrics.jsonl to disk and return its size."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        if self.enabled:
            self._bar.close()
            self._board("close")
            with contextlib.suppress(OSError):
                self._file.close()
            self.enabled = False

    def _board(self, method: str, *values: Any) -> None:
        self._guarded(lambda writer: getattr(writer, method)(*values))

    def _guarded(self, write: Callable[[Any], None]) -> None:
        """Call `write` with TensorBoard's writer. If it fails (folder gone, disk full), the run continues without TensorBoard."""
        if self._writer is None:
            return
        try:
            write(self._writer)
        except Exception as error:  # any error of its own thread
            self._writer = None
            self.say(f"TensorBoard logging stopped: {' '.join(str(error).split())}")


def duration(seconds: float) -> str:
    """Format seconds as 3:07 (minutes), 2:03:07 (hours) or 1 d 2:03:07."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not days and not hours:
        return f"{minutes}:{rest:02d}"
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"


def _joined(values: Mapping[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items())


def _quiet_writer_threads() -> None:
    """Suppress tracebacks of TensorBoard's writer thread: its next call raises the same error, which is printed in one line."""
    usual = threading.excepthook

    def hook(args: Any) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            usual(args)

    threading.excepthook = hook


_SHOWN = {
    "train/loss": ("loss", 1),
    "sparsity/achieved": ("sparsity", 1),
    "samples/s": ("samples/s", 1),
    "memory/live(bytes)": ("MiB", 2**20),
    "eval/score": ("score", 1),
}
"""Metrics shown on the console: key -> (name shown, divisor)."""
