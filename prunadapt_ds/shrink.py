"""Make the model in a running engine physically smaller, when that pays.

No parameter can change its shape inside an engine. So: capture what training has learnt, let go of the engine, cut
module by module, build an engine around what is left, and put back what was learnt, cut alike.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunadapt_ds import distributed, memory, state
from prunadapt_ds import engine as engines
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.models.modeling_prunadapt import Layout
from prunadapt_ds.resize import Slices, resize


def shrink(
    engine: Any, layout: Layout, plan: PruningPlan, present: PruningPlan | None, build: Callable[[], Any]
) -> Any:
    """Cut the model of `engine` from `present` (None: dense) to `plan`; returns the engine that `build` makes of it.

    fp32 masters, Adam's moments and step count go on as they were. Collective. At no time is more than one module whole.
    The old engine's memory is free for the new one if the caller holds no reference to it.
    """
    model = engine.module
    learnt = state.capture(engine, keep=distributed.rank() == 0)
    engines.destroy(engine)
    del engine
    gc.collect()
    memory.return_freed()
    slices = cut(model, layout, plan, present)
    smaller = build()
    state.restore(smaller, learnt.sliced(slices, set(state.trainable(model))))
    return smaller


def cut(model: Any, layout: Layout, plan: PruningPlan, present: PruningPlan | None = None) -> Slices:
    """Resize a sharded model that no engine holds, and free the shards of whatever it lost. Collective."""
    before = list(model.parameters())
    slices = resize(model, layout, plan, present, engines.rewriting)
    engines.release(before, model)  # whole sub-layers too
    return slices


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

    def ends(self) -> tuple[float | None, float | None]:
        """Median seconds of a step at the first size and at the last, which is the smallest; None where no step was timed.

        Of steps that do not record, or of steps that do, where both sizes have had such; else of what there is.
        """
        sizes = self.plain.keys() | self.recording.keys()
        if not sizes:
            return None, None
        first, last = max(sizes), min(sizes)
        alike = [times for times in (self.plain, self.recording) if times.keys() >= {first, last}]
        times = alike[0] if alike else {**self.recording, **self.plain}
        return median(times[first]), median(times[last])

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


def pays_now(
    present: int, decisions: Sequence[tuple[int, int]], step_seconds: Callable[[int], float], rebuild_seconds: float
) -> bool:
    """Whether the cheapest way through the rest of the run begins with a rebuild at the present decision.

    present: size of the model as it physically is. decisions: (size after it, steps until the next one or the end) of
    the present and all later decisions. Every way to rebuild at some of them is weighed, by dynamic programming.
    """
    if not decisions:
        return False
    sizes = [present, *(size for size, _ in decisions)]  # what the model may physically be
    best = dict.fromkeys(range(len(sizes)), 0.0)  # seconds to the end, by which of `sizes` the model has
    rebuild = keep = 0.0
    for i in reversed(range(len(decisions))):
        size, steps = decisions[i]
        smaller = i + 1
        rebuild = rebuild_seconds + steps * step_seconds(size) + best[smaller]
        keep = steps * step_seconds(sizes[0]) + best[0]
        best = {j: min(rebuild, steps * step_seconds(sizes[j]) + best[j]) for j in range(i + 1)}
    return rebuild < keep
