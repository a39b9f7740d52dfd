"""Times of the parts of a run, and of its steps at each size of the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

PHASES = ("dense", "prune", "recover")
# Parts that add up to the training time: steps, scoring, teacher, rebuilds and checkpoints, but no evaluation.
TRAINING = (*(f"{phase}_phase" for phase in PHASES), "teacher", "importance", "shrink", "checkpoint")
STEP_TIMES_KEPT = 1000  # the latest of each size, in a checkpoint

# Relative noise of the median of timed steps: how far a machine's speed drifts between two sizes, however many steps were
# timed, and how much single steps differ from each other (padding, other processes).
DRIFT, SPREAD = 0.05, 0.2


@dataclass
class StepTimes:
    """Measured seconds of optimizer steps, by the size of the model: multiply-accumulates of its blocks.

    Steps that record statistics take longer and are kept apart.
    """

    plain: dict[int, list[float]] = field(default_factory=dict)
    recording: dict[int, list[float]] = field(default_factory=dict)

    def add(self, size: int, seconds: float, *, records: bool = False) -> None:
        (self.recording if records else self.plain).setdefault(size, []).append(seconds)

    def ends(self, dense: int) -> tuple[float | None, float | None]:
        """Median seconds of a step at the size `dense` and at the last, the smallest, size; None if no step was timed.

        Both come from plain steps if both sizes have some, else from recording steps if both have those; otherwise each comes
        from plain steps if its size has any.
        """
        sizes = self.plain.keys() | self.recording.keys()
        if not sizes:
            return None, None
        first, last = max(sizes), min(sizes)
        alike = [times for times in (self.plain, self.recording) if times.keys() >= {first, last}]
        times = alike[0] if alike else {**self.recording, **self.plain}
        return median(times[first]) if first == dense else None, median(times[last])

    def predict(self, size: int) -> float:
        """Predict the seconds of a step at `size`: a constant plus a slope, fitted to the medians of all sizes so far.

        The prior on the slope is that the whole step is proportional to the size, with a standard deviation of half of that. So
        the first rebuild is tried if it could pay; two sizes near each other, whose times differ by chance, hardly change the
        slope, and sizes far apart determine it. What recording adds says nothing about sizes, so the slope is fitted within
        plain steps and within recording steps.
        """
        kinds = [self._measured(times) for times in (self.plain, self.recording) if times]
        sizes, medians, weights = (np.concatenate(rows) for rows in zip(*kinds, strict=True))
        first = sizes.argmax()
        expected = medians[first] / sizes[first]
        precision = 1 / (expected / 2) ** 2
        total = precision * expected
        for of_kind, seconds, weight in kinds:
            away = of_kind - np.average(of_kind, weights=weight)
            precision, total = precision + weight @ away**2, total + weight @ (away * seconds)
        mean_size, mean_seconds = np.average(sizes, weights=weights), np.average(medians, weights=weights)
        return max(0.0, float(mean_seconds + max(0.0, total / precision) * (size - mean_size)))

    @staticmethod
    def _measured(
        times: Mapping[int, Sequence[float]],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The sizes, and for each its median seconds and that median's weight, one over its variance."""
        medians = np.array([median(taken) for taken in times.values()])
        counts = np.array([len(taken) for taken in times.values()])
        return np.array([*times], float), medians, 1 / (medians**2 * (DRIFT**2 + SPREAD**2 / counts))


@dataclass
class Clocks:
    """Wall-clock seconds, and CPU seconds of this process (all threads), by part of the run.

    Rebuilds are weighed by `now`: on a CPU it is this process's own CPU time, because other processes stretch wall-clock time.
    `build`: seconds that building the last engine took; `rebuild`: those of the whole last shrink; both by `now`.
    """

    on_cpu: bool
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    steps: StepTimes = field(default_factory=StepTimes)
    cpu_steps: StepTimes = field(default_factory=StepTimes)
    build: float = 0.0
    rebuild: float = 0.0

    def now(self) -> float:
        """Seconds on the clock by which rebuilds are weighed; only differences are meaningful."""
        return time.process_time() if self.on_cpu else time.perf_counter()

    @property
    def weighed_steps(self) -> StepTimes:
        """Step times on the clock of `now`."""
        return self.cpu_steps if self.on_cpu else self.steps

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent in the context to the part `name`."""
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu_start

    @contextmanager
    def timed_step(self, size: int, *, records: bool) -> Iterator[None]:
        """Time the context, one whole step, and record it by size and kind, unless it raises."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self.steps.add(size, time.perf_counter() - start, records=records)
        self.cpu_steps.add(size, time.process_time() - cpu_start, records=records)

    def train_seconds(self) -> float:
        return sum(self.seconds.get(name, 0.0) for name in TRAINING)

    def train_cpu_seconds(self) -> float:
        """Training time in CPU seconds of this rank, which a busy machine does not stretch."""
        return sum(self.cpu_seconds.get(name, 0.0) for name in TRAINING)

    def saved(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON."""

        def recent(times: StepTimes) -> dict[str, dict[int, list[float]]]:
            return {
                kind: {size: s[-STEP_TIMES_KEPT:] for size, s in sizes.items()} for kind, sizes in vars(times).items()
            }

        steps = {"step_times": recent(self.steps), "step_cpu_times": recent(self.cpu_steps)}
        seconds = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        return {**seconds, **steps, "build": self.build, "rebuild": self.rebuild}

    def restore(self, saved: Mapping[str, Any], *, steps: bool = True) -> None:
        """Continue from the state in a checkpoint. `steps`: whether its step times are comparable with those to come."""
        self.seconds, self.cpu_seconds = dict(saved["seconds"]), dict(saved["cpu_seconds"])
        if not steps:
            return
        self.steps, self.cpu_steps = step_times(saved["step_times"]), step_times(saved["step_cpu_times"])
        self.build, self.rebuild = saved["build"], saved["rebuild"]


def step_times(saved: Mapping[str, Any]) -> StepTimes:
    """The step times in `Clocks.saved`; older checkpoints do not tell recording steps from plain ones."""
    kinds = saved if saved.keys() <= {"plain", "recording"} else {"plain": saved}
    return StepTimes(**{kind: {int(size): list(s) for size, s in sizes.items()} for kind, sizes in kinds.items()})
