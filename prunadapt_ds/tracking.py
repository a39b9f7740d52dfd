"""One place that metrics go through: console, TensorBoard and metrics.jsonl."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


class Tracker:
    """Progress of a run on rank 0; on other ranks (`enabled=False`) every call does nothing.

    A bar where standard error is a terminal, otherwise one line per interval. Metric keys carry their unit where they
    have one ("memory/parameters(bytes)"), and a group before the slash that TensorBoard shows them under.
    """

    def __init__(self, output_dir: Path, total_steps: int, *, enabled: bool):
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        output_dir.mkdir(parents=True, exist_ok=True)
        self.total_steps = total_steps
        self._writer = SummaryWriter(str(output_dir / "runs"))
        self._file = (output_dir / "metrics.jsonl").open("w", encoding="utf-8")
        self._bar = tqdm(total=total_steps, unit="step", disable=not sys.stderr.isatty(), file=sys.stderr)

    def say(self, text: str) -> None:
        """Print text for the user, above the bar."""
        if self.enabled:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def text(self, tag: str, text: str) -> None:
        """A text page in TensorBoard."""
        if self.enabled:
            self._writer.add_text(tag, f"```\n{text}\n```")

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
            self._writer.add_scalar(key, value, step)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        short = "  ".join(f"{_SHOWN[key]} {value:.4g}" for key, value in metrics.items() if key in _SHOWN)
        self.advance(step, phase)
        self._bar.set_postfix_str(short)
        if self._bar.disable and short:
            self.say(f"step {step}/{self.total_steps}  {phase}  {short}")

    def close(self) -> None:
        """Flush and end; safe to call twice."""
        if self.enabled:
            self._bar.close()
            self._writer.close()
            self._file.close()
            self.enabled = False


_SHOWN = {"train/loss": "loss", "sparsity/achieved": "sparsity", "samples/s": "samples/s", "eval/score": "score"}
