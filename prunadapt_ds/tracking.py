"""One place that metrics go through: console, TensorBoard and metrics.jsonl."""

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
    """Progress of a run on rank 0; on other ranks (`enabled=False`) every call does nothing.

    A bar where standard error is a terminal; one line per interval where standard output or error is none. Metric keys
    carry their unit where they have one ("memory/parameters(bytes)"), and a group before the slash that TensorBoard shows
    them under.

    A run that goes on at `step` keeps the first `metrics_bytes` of metrics.jsonl, which were written up to there. Raises
    OSError where that file cannot be opened; without TensorBoard the run goes on. Without `records` nothing is kept but what
    the console shows.
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
        self.problem = ""  # why a line of metrics could not be written; for all ranks to hear of
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
        # Of `train > log` the log has the lines, the terminal the bar.
        self._lines = not (shown and sys.stdout.isatty())
        self._postfix: dict[str, str] = {}
        self._began = step, time.monotonic()
        self._writer = self._new_writer(board_dir or output_dir / "runs", step) if records else None
        self.show(board.begin)

    def _new_writer(self, folder: Path, step: int) -> Any:
        """TensorBoard's, or None where its folder cannot be had: the run goes on without it."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            return SummaryWriter(str(folder), purge_step=step + 1)
        except Exception as error:  # OSError, or what tensorboard makes of one
            self.say(f"TensorBoard is not written: {' '.join(str(error).split())}")
            return None

    def say(self, text: str) -> None:
        """Print text for the user, above the bar."""
        if self.enabled:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def text(self, tag: str, text: str) -> None:
        """A text page in TensorBoard."""
        if self.enabled:
            self._board("add_text", tag, f"```\n{text}\n```")

    def show(self, draw: Callable[[Any], None]) -> None:
        """Let `draw` write pictures and the like with TensorBoard's writer."""
        if self.enabled:
            self._guarded(draw)

    def advance(self, step: int, phase: str) -> None:
        """`step` optimizer steps are done; nothing is logged."""
        if self.enabled:
            self._bar.update(step - self._bar.n)
            self._bar.set_description(phase)

    def log(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        """One interval: a line in metrics.jsonl, scalars in TensorBoard, and the console."""
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
        self._postfix |= short  # an evaluation has a score alone, and the loss stays in sight
        self.advance(step, phase)
        self._bar.set_postfix_str(_joined(self._postfix))
        if self._lines and short:
            self.say(f"step {step}/{self.total_steps}  {phase}  {_joined(short)}{self._left(step)}")

    def _left(self, step: int) -> str:
        """How long the remaining steps take at the pace so far, every phase and evaluation included."""
        first, began = self._began
        if not first < step < self.total_steps:
            return ""
        seconds = (time.monotonic() - began) / (step - first) * (self.total_steps - step)
        return f"  left {duration(seconds)}"

    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl, which the disk holds up to there."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Flush and end; safe to call twice."""
        if self.enabled:
            self._bar.close()
            self._board("close")
            with contextlib.suppress(OSError):
                self._file.close()
            self.enabled = False

    def _board(self, method: str, *values: Any) -> None:
        self._guarded(lambda writer: getattr(writer, method)(*values))

    def _guarded(self, write: Callable[[Any], None]) -> None:
        """Use TensorBoard's writer. A run goes on without it when its folder has vanished or its disk is full."""
        if self._writer is None:
            return
        try:
            write(self._writer)
        except Exception as error:  # whatever its own thread stumbled over
            self._writer = None
            self.say(f"TensorBoard is not written any more: {' '.join(str(error).split())}")


def duration(seconds: float) -> str:
    """As 3:07 (minutes), 2:03:07 (hours) or 1 d 2:03:07."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not days and not hours:
        return f"{minutes}:{rest:02d}"
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"


def _joined(values: Mapping[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items())


def _quiet_writer_threads() -> None:
    """No traceback of TensorBoard's own thread: its next call raises what it stumbled over, and that is said in one line."""
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
"""Metrics on the console: (name there, divided by)."""
