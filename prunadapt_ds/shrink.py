"""Make the model in a running engine physically smaller, when that pays.

No parameter can change its shape inside an engine. So: capture the training state, destroy the engine, cut the model module
by module, build an engine around the smaller model, and restore the state, sliced in the same way.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
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
    slices = resize_sharded(model, layout, plan, present)
    smaller = build()
    state.restore(smaller, learnt.sliced(slices, set(state.trainable(model))))
    return smaller


def resize_sharded(model: Any, layout: Layout, plan: PruningPlan, present: PruningPlan | None = None) -> Slices:
    """Resize a model that no engine holds, sharded or not, and free the shards of whatever it lost. Collective."""
    before = list(model.parameters())
    slices = resize(model, layout, plan, present, engines.rewriting)
    engines.release(before, model)  # those of whole sub-layers too
    return slices
