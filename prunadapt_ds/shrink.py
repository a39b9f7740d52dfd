"""Make the model in a running engine physically smaller, when that pays.

No parameter can change its shape inside an engine. So: capture the training state, destroy the engine, cut the model module
by module, build an engine around the smaller model, and restore the state, sliced in the same way.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

from prunadapt_ds import distributed, memory, state
from prunadapt_ds import engine as engines
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.models.modeling_prunadapt import Layout
from prunadapt_ds.resize import Slices, resize


def shrink(
    engine: Any, layout: Layout, plan: PruningPlan, present: PruningPlan | None, build: Callable[[], Any]
) -> Any:
    """Cut the model of `engine` from `present` (None: dense) to `plan`; returns the engine that `build` makes around it.

    fp32 masters, Adam's moments and the step count carry over. Collective. At no time is more than one module whole. The old
    engine's memory is free for the new one, provided the caller holds no reference to it.
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
    """Resize a model that no engine holds, sharded or not, and free the shards of whatever it lost. Collective."""
    before = list(model.parameters())
    slices = resize(model, layout, plan, present, engines.rewriting)
    engines.release(before, model)  # those of whole sub-layers too
    return slices


def pays_now(
    present: int, decisions: Sequence[tuple[int, int]], step_seconds: Callable[[int], float], rebuild_seconds: float
) -> bool:
    """Whether the fastest way through the rest of the run begins with a rebuild at the present decision.

    present: size of the model as it physically is. decisions: for the present and all later decisions, the size after it and
    the steps until the next one or the end. Dynamic programming compares all subsets of decisions at which to rebuild.
    """
    if not decisions:
        return False
    sizes = [present, *(size for size, _ in decisions)]  # that the model can physically have
    best = dict.fromkeys(range(len(sizes)), 0.0)  # seconds to the end, by index of the model's size in `sizes`
    rebuild = keep = 0.0
    for i in reversed(range(len(decisions))):
        size, steps = decisions[i]
        smaller = i + 1
        rebuild = rebuild_seconds + steps * step_seconds(size) + best[smaller]
        keep = steps * step_seconds(sizes[0]) + best[0]
        best = {j: min(rebuild, steps * step_seconds(sizes[j]) + best[j]) for j in range(i + 1)}
    return rebuild < keep
