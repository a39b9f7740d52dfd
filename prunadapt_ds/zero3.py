"""Workarounds for ZeRO-3 in DeepSpeed 0.19: for blocks of many small modules, forward-only passes, and rebuilt engines.

Like the access to single partitions (`own_run`, `fetch`), they rely on its internals.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunadapt_ds.distributed import device
from prunadapt_ds.models.structure import full_numel, is_sharded

PIECE_ELEMENTS = 2**24
"""The largest block that is fetched as one piece: 32 MiB in bf16. Larger fetches should overlap with computation."""


def spare_the_compiler() -> None:
    """Import DeepSpeed's Muon module without torch's compiler.

    DeepSpeed imports it to check whether any optimizer is Muon, and the import compiles a function. Loading the compiler
    takes seconds at every start, for an optimizer that no run here uses.
    """
    from deepspeed.runtime import compiler

    with patch.object(compiler, "compile", lambda *args, **kwargs: lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401


def is_piece(elements: int, zero: Mapping[str, Any]) -> bool:
    """Whether a block of that many elements should be fetched as one piece. `zero`: the configuration's ZeRO block.

    Only if it costs no memory: the last blocks, up to half of `stage3_max_reuse_distance` elements, stay gathered between
    forward and backward pass in any case.
    """
    return 0 < elements <= min(PIECE_ELEMENTS, zero.get("stage3_max_reuse_distance", 2 * PIECE_ELEMENTS) // 2)


def blocks_as_leaves(blocks: Iterable[nn.Module], zero: Mapping[str, Any]) -> None:
    """Let ZeRO-3 fetch each of these blocks as one piece if it is small, instead of module by module.

    With LoRA, norms and gates a block has about 80 modules. Hooks before and after each of them, forward and backward, and a
    gather for each that has parameters take as long as the arithmetic of a small block.

    DeepSpeed reduces a leaf's gradients once the gradient of its input exists, so the input is made to require one.
    """
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        old = vars(block).pop(_INPUT_HOOK, None)
        if old is not None:
            old.remove()
        in_one_piece = is_piece(sum(full_numel(p) for p in block.parameters()), zero)
        set_z3_leaf_module(block, in_one_piece)
        if in_one_piece:
            vars(block)[_INPUT_HOOK] = block.register_forward_pre_hook(_with_gradient)


_INPUT_HOOK = "_prunadapt_input_hook"


def _with_gradient(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook: make the hidden states require a gradient, which they do not behind a frozen embedding."""
    hidden = args[0]
    if not torch.is_grad_enabled() or hidden.requires_grad:
        return None
    return hidden.detach().requires_grad_(), *args[1:]


def keep_recomputed(zero_optimizer: Any) -> None:
    """Keep the recomputation of a block from releasing the module whose backward pass triggered it.

    That module's forward pass then runs inside its own backward pass, and would release the weights that are about to be
    used. This happens if the module is followed, in its block, by something that passes back no gradient, such as the norm of a
    feed-forward that was cut away.
    """
    coordinator = zero_optimizer.parameter_offload.get_param_coordinator()
    release = coordinator.release_sub_module

    def release_unless_wanted(submodule: nn.Module, forward: bool = False) -> None:
        is_recomputed = forward and torch._C._current_graph_task_id() != -1  # a forward pass inside a backward pass
        wanted = coordinator._PartitionedParameterCoordinator__active_backward_submodules
        if not (is_recomputed and submodule.ds_id in wanted):
            release(submodule, forward=forward)

    coordinator.release_sub_module = release_unless_wanted


def forget_trace(engine: Any) -> None:
    """Make ZeRO-3 start a new trace of its fetches. Call it when switching between training and forward-only passes.

    With the trace of a training step, a forward-only pass would keep every parameter for a backward pass: the whole model.
    With the trace of an evaluation, DeepSpeed 0.19 stops in the next training step ("tracing error").
    """
    if not hasattr(engine, "zero_optimization_stage") or engine.zero_optimization_stage() != 3:
        return
    # The engine's method of this name also runs a full garbage collection: half a second each time.
    engine.optimizer.empty_partition_cache()
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    coordinator.reset_step()
    _forget_releases()


def forget_engine(model: nn.Module) -> None:
    """Remove what a destroyed engine has left on a model.

    Its hooks would keep calling the engine, and keep it and all its buffers in memory. Every module also keeps the functions
    that fetch and release its parameters in the backward pass; the next engine would not replace them, and would follow the
    old engine's trace. A module's list of external parameters, which a LoRA layer gets by reading the dtype of its A, would
    make the next engine fetch parameters from before the cut.
    """

    def is_engine_s(function: Any) -> bool:
        return getattr(function, "__qualname__", "").startswith("DeepSpeedEngine.")

    for hooks in (model._forward_pre_hooks, model._forward_hooks, model._backward_pre_hooks, model._backward_hooks):
        for key in [key for key, hook in hooks.items() if is_engine_s(hook)]:
            del hooks[key]
    for name in [name for name, value in vars(model).items() if is_engine_s(value)]:
        delattr(model, name)
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn", "_external_params"):
            vars(module).pop(name, None)
    _forget_releases()


def _forget_releases() -> None:
    """Empty DeepSpeed's cache of which parameters to release after which module.

    Its entries hold for the trace at the time of their first lookup only. And as one cache for the whole class, it would keep
    every engine's parameters in memory for good, those of the dense model too.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    asked = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(asked).nonlocals["func"].cache_clear()


def own_run(parameter: Any) -> tuple[int, Tensor] | None:
    """Return this rank's run of a parameter's flattened elements: where it starts, and the elements [n] without padding.

    None, on all ranks alike, if no partition lies plainly in this rank's memory: the parameter is whole, on disk, quantised,
    or has a secondary partition.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if not is_sharded(parameter):
        return None
    shard = parameter.ds_tensor
    is_apart = parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE and shard.final_location is None
    if not is_apart or parameter.ds_secondary_tensor is not None or hasattr(shard, "ds_quant_scale"):
        return None
    start = parameter.ds_zero_partition_rank * shard.ds_numel
    return start, shard[: max(0, parameter.ds_numel - start)]  # shorter, or empty, on the last ranks


def fetch(parameter: Any, first: int, last: int) -> Tensor:
    """Fetch the flattened elements [first, last) of a partitioned parameter (see `own_run`) to every rank. Collective."""
    fetched = torch.empty(last - first, dtype=parameter.ds_tensor.dtype, device=device())
    length, group = parameter.ds_tensor.ds_numel, parameter.ds_process_group
    for owner in range(first // length, (last - 1) // length + 1):
        start = owner * length
        begin, end = max(first, start), min(last, start + length)
        piece = fetched[begin - first : end - first]
        if owner == parameter.ds_zero_partition_rank:
            piece.copy_(parameter.ds_tensor[begin - start : end - start])
        dist.broadcast(piece, src=dist.get_global_rank(group, owner), group=group)
    return fetched
