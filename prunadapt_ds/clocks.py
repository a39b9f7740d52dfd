"""What the parts of a run take, and what its steps took at each size."""

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
# Parts whose sum is the training: steps, scoring, teacher, rebuilds and checkpoints; no evaluation.
TRAINING = (*(f"{phase}_phase" for phase in PHASES), "teacher", "importance", "shrink", "checkpoint")
STEP_TIMES_KEPT = 1000  # of each size, in a checkpoint

# Noise of a median of timed steps, as parts of it: what a machine's pace drifts by between two sizes, however many steps
# were timed, and how much a single step differs from the next (padding, neighbours).
DRIFT, SPREAD = 0.05, 0.2


@dataclass
class StepTimes:
    """Measured seconds of optimizer steps at the sizes a run has had, those of steps that record statistics, which take
    longer, apart. Size: multiply-accumulates of the blocks."""

    plain: dict[int, list[float]] = field(default_factory=dict)
    recording: dict[int, list[float]] = field(default_factory=dict)

    def add(self, size: int, seconds: float, *, records: bool = False) -> None:
        (self.recording if records else self.plain).setdefault(size, []).append(seconds)

    def ends(self, dense: int | None = None) -> tuple[float | None, float | None]:
        """Median seconds of a step at the first size and at the last, which is the smallest; None where no step was timed.

        `dense`: what the first size must be; None for the first where it is another. Both are of steps that do not record, or
        both of steps that do, where both sizes have had such; else of what there is.
        """
        sizes = self.plain.keys() | self.recording.keys()
        if not sizes:
            return None, None
        first, last = max(sizes), min(sizes)
        alike = [times for times in (self.plain, self.recording) if times.keys() >= {first, last}]
        times = alike[0] if alike else {**self.recording, **self.plain}
        return median(times[first]) if dense in (None, first) else None, median(times[last])

    def predict(self, size: int) -> float:
        """Seconds of a step at another size: a fixed part and one that grows, fitted to the medians of every size so far.

        Before anything is known the whole step is taken to grow with the size, give or take half of it. So the first
        rebuild is tried where it could pay, two sizes near each other, whose times differ by chance, change that little, and
        sizes far apart decide. What recording adds tells nothing about sizes: a step is compared with others of its kind.
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
        """Sizes, median seconds of each, and the weight of each median: one over its variance."""
        medians = np.array([median(taken) for taken in times.values()])
        counts = np.array([len(taken) for taken in times.values()])
        return np.array([*times], float), medians, 1 / (medians**2 * (DRIFT**2 + SPREAD**2 / counts))


@dataclass
class Clocks:
    """Seconds on the wall and CPU seconds of this process, all threads, by part of the run.

    What a rebuild is weighed by, `now`, is the process's own time on a CPU, as what else runs there stretches all other
    clocks. `build`: of the last engine, `rebuild`: of the last shrink, all of it, both by `now`.
    """

    on_cpu: bool
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    steps: StepTimes = field(default_factory=StepTimes)
    cpu_steps: StepTimes = field(default_factory=StepTimes)
    build: float = 0.0
    rebuild: float = 0.0

    def now(self) -> float:
        return time.process_time() if self.on_cpu else time.perf_counter()

    @property
    def weighed_steps(self) -> StepTimes:
        """What steps took, by `now`."""
        return self.cpu_steps if self.on_cpu else self.steps

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what a block takes to a part's seconds."""
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu_start

    @contextmanager
    def timed_step(self, size: int, *, records: bool) -> Iterator[None]:
        """Add a step, which is whole, to those of its size and kind."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self.steps.add(size, time.perf_counter() - start, records=records)
        self.cpu_steps.add(size, time.process_time() - cpu_start, records=records)

    def train_seconds(self) -> float:
        return sum(self.seconds.get(name, 0.0) for name in TRAINING)

    def train_cpu_seconds(self) -> float:
        """The same in CPU seconds of this rank: what a busy machine cannot stretch."""
        return sum(self.cpu_seconds.get(name, 0.0) for name in TRAINING)

    def saved(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""

        def recent(times: StepTimes) -> dict[str, dict[int, list[float]]]:
            return {
                kind: {size: s[-STEP_TIMES_KEPT:] for size, s in sizes.items()} for kind, sizes in vars(times).items()
            }

        steps = {"step_times": recent(self.steps), "step_cpu_times": recent(self.cpu_steps)}
        seconds = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        return {**seconds, **steps, "build": self.build, "rebuild": self.rebuild}

    def restore(self, saved: Mapping[str, Any], *, steps: bool = True) -> None:
        """Go on as one run's. `steps`: those to come are of the same ranks and devices, so that all can be compared."""
        self.seconds, self.cpu_seconds = dict(saved["seconds"]), dict(saved["cpu_seconds"])
        if not steps:
            return
        self.steps, self.cpu_steps = step_times(saved["step_times"]), step_times(saved["step_cpu_times"])
        self.build, self.rebuild = saved["build"], saved["rebuild"]


def step_times(saved: Mapping[str, Any]) -> StepTimes:
    """What `Clocks.saved` has of one clock's steps; older checkpoints do not tell steps that record from others."""
    kinds = saved if saved.keys() <= {"plain", "recording"} else {"plain": saved}
    return StepTimes(**{kind: {int(size): list(s) for size, s in sizes.items()} for kind, sizes in kinds.items()})
