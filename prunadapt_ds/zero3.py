"""Settings and workarounds for DeepSpeed 0.19 where ZeRO-3 meets adapters, forward-only passes, and engines that are rebuilt.
Everything that relies on its internals is here.
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
from prunadapt_ds.models.structure import full_numel

PIECE_ELEMENTS = 2**24
"""The largest block that is fetched as one piece: 32 MiB in bf16. Beyond it a fetch should run beside the computation."""


def spare_the_compiler() -> None:
    """Whatever the optimizer, DeepSpeed asks whether it is Muon, and that one's module compiles a function as it is imported:
    torch's compiler would be loaded, which takes seconds of every start, for an optimizer that no run here has."""
    from deepspeed.runtime import compiler

    with patch.object(compiler, "compile", lambda *args, **kwargs: lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401


def is_piece(elements: int, zero: Mapping[str, Any]) -> bool:
    """Whether a block of so many parameters is fetched as one piece. `zero`: the configuration's ZeRO block.

    Only where it costs no memory: where the last blocks, as long as half of `stage3_max_reuse_distance`, stay gathered
    between forward and backward pass in any case.
    """
    return 0 < elements <= min(PIECE_ELEMENTS, zero.get("stage3_max_reuse_distance", 2 * PIECE_ELEMENTS) // 2)


def blocks_as_leaves(blocks: Iterable[nn.Module], zero: Mapping[str, Any]) -> None:
    """Let ZeRO-3 fetch each of these blocks as one piece, if it is small, rather than each of the modules in it.

    With LoRA, norms and gates a block has about 80 modules. Hooks before and after each, forward and backward, and a gather
    for each that has parameters, take as long as the arithmetic of a small one.

    A leaf's gradients are reduced when the gradient of its input is there, so the input is made to have one.
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
    """The hidden states that enter a block, as something that has a gradient: behind a frozen embedding they have none."""
    hidden = args[0]
    if not torch.is_grad_enabled() or hidden.requires_grad:
        return None
    return hidden.detach().requires_grad_(), *args[1:]


def keep_recomputed(zero_optimizer: Any) -> None:
    """Let a block that is computed again not release the module whose backward pass has asked for it.

    That module's forward pass runs within its own backward pass then, and would drop the weights that are about to be used. It
    happens where something still follows it in the block that no gradient comes from, as the norm of a feed-forward that was
    cut away.
    """
    coordinator = zero_optimizer.parameter_offload.get_param_coordinator()
    release = coordinator.release_sub_module

    def release_unless_wanted(submodule: nn.Module, forward: bool = False) -> None:
        is_recomputed = forward and torch._C._current_graph_task_id() != -1  # a forward pass within a backward one
        wanted = coordinator._PartitionedParameterCoordinator__active_backward_submodules
        if not (is_recomputed and submodule.ds_id in wanted):
            release(submodule, forward=forward)

    coordinator.release_sub_module = release_unless_wanted


def forget_trace(engine: Any) -> None:
    """Between training and passes without a backward, and back: let ZeRO-3 begin a new trace of what is fetched when.

    By the trace of a training step it would keep every parameter of a forward pass for the backward one, the whole model. On
    the trace of an evaluation DeepSpeed 0.19 stops in the next training step ("tracing error").
    """
    if not hasattr(engine, "zero_optimization_stage") or engine.zero_optimization_stage() != 3:
        return
    # The engine's own function of this name collects the garbage of the whole process as well: half a second each time.
    engine.optimizer.empty_partition_cache()
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    coordinator.reset_step()
    _forget_releases()


def forget_engine(model: nn.Module) -> None:
    """Take off a model what a destroyed engine has left on it.

    Hooks on the model go on calling the engine, and keep it with all its buffers in memory. And every module keeps the
    functions that fetch and release its parameters in the backward pass: the next engine would leave them in place, so
    that the old one's records, of what is used when, decide for it. So does the list of a module's parameters that another one
    asked for, as a LoRA layer does for its A's dtype: the next engine would go on fetching those of before the cut.
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
    """Empty the cache of which parameters to release after which module.

    Its answers are those of the trace at the time they were first asked for. And being one cache for the whole class, it keeps
    every engine's parameters in memory for good, those of the dense model too.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    asked = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(asked).nonlocals["func"].cache_clear()


def own_run(parameter: Any) -> tuple[int, Tensor] | None:
    """This rank's part of a parameter: where it begins among the flattened elements, and it, [n], without padding behind it.

    None where no part lies plainly in this rank's memory: the parameter is whole, on a disk, quantised, or kept twice. The
    same on every rank.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if not hasattr(parameter, "ds_id"):
        return None
    shard = parameter.ds_tensor
    is_apart = parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE and shard.final_location is None
    if not is_apart or parameter.ds_secondary_tensor is not None or hasattr(shard, "ds_quant_scale"):
        return None
    start = parameter.ds_zero_partition_rank * shard.ds_numel
    return start, shard[: max(0, parameter.ds_numel - start)]  # the last ranks' are shorter, or empty


def fetch(parameter: Any, first: int, last: int) -> Tensor:
    """Some of the flattened elements of a parameter of which every rank has its own run, on every rank. Collective."""
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
