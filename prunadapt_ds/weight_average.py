"""The run's own teacher: the mean of the weights that its dense phase went through.

In the middle of training, at a high learning rate, the weights circle around a better solution. Their mean over many steps
lies close to it (Izmailov et al., arXiv 1803.05407): about where decaying the rate to zero would have led, at the price of a
few copies of the trainable weights, which are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prunadapt_ds import state


@dataclass
class WeightAverage:
    """Sums of `count` snapshots of the fp32 masters, by parameter name, whole, on the CPU of every rank."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, engine: Any) -> None:
        """Add a snapshot of what the engine trains. Collective."""
        masters = state.read_masters(engine)
        self.sums = {name: self.sums[name] + master for name, master in masters.items()} if self.count else masters
        self.count += 1

    def mean(self) -> dict[str, Tensor]:
        """The mean weights: float32, in the parameters' full shapes, by name."""
        return {name: total / self.count for name, total in self.sums.items()}


@contextmanager
def averaged(engine: Any, average: WeightAverage) -> Iterator[None]:
    """Give the engine the mean weights within the context, and exactly its own afterwards. Collective; no-op without snapshots."""
    if not average.count:
        yield
        return
    learnt = state.read_masters(engine)
    state.write_masters(engine, average.mean())
    try:
        yield
    finally:
        state.write_masters(engine, learnt)
