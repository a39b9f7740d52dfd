"""The run's own teacher: the mean of the weights that its dense phase went through.

In the middle of training, at a high learning rate, a model circles around the best it knows. The mean of its weights over
many steps lies close to that (Izmailov et al., arXiv 1803.05407): about what letting the rate fall to zero would have given,
at the price of a few copies of the trainables, which are small.
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
    """Sums of the fp32 masters by parameter name, whole, on the CPU of every rank; `count` snapshots so far."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, engine: Any) -> None:
        """Another snapshot of what the engine trains. Collective."""
        masters = state.read_masters(engine)
        self.sums = {name: self.sums[name] + master for name, master in masters.items()} if self.count else masters
        self.count += 1

    def mean(self) -> dict[str, Tensor]:
        return {name: total / self.count for name, total in self.sums.items()}


@contextmanager
def averaged(engine: Any, average: WeightAverage) -> Iterator[None]:
    """Lend the engine the mean weights; afterwards it is exactly what it was. Collective; no-op without a snapshot."""
    if not average.count:
        yield
        return
    learnt = state.read_masters(engine)
    state.write_masters(engine, average.mean())
    try:
        yield
    finally:
        state.write_masters(engine, learnt)
