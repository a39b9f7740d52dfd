"""Build and rebuild the DeepSpeed engine and its optimizer, with the settings that ZeRO-3 needs.

The optimizer and the learning rates are our own, not DeepSpeed's: named parameter groups, each with its own base rate, and
rates that are a pure function of the global step, so that a rebuilt engine continues exactly where the old one stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds import memory, zero3
from prunadapt_ds.gates import GATE_NAME, gates_of
from prunadapt_ds.models.structure import full_numel, full_shape, is_sharded

# Freed shards of one module that are large enough to be worth returning to the system at once.
FREED_BYTES = 2**22

Group = dict[str, Any]  # a torch optimizer's parameter group; "name" and "base_lr" are kept beside "lr"


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, write_from: int | None = None) -> Iterator[None]:
    """Gather sharded parameters on every rank while the context lasts; a no-op for parameters that are not sharded.

    All ranks must enter. `write_from`: the rank whose changes are kept; None for reading only.
    """
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=write_from):
        yield


def row_blocks(parameter: nn.Parameter, numel: int) -> Iterator[Tensor]:
    """Yield all rows of a parameter in order, on every rank, in blocks [k, ...] of about `numel` elements. Collective.

    A partitioned parameter is fetched block by block and never whole anywhere; a whole or gathered one is only sliced, so
    that its blocks are views of it.
    """
    shape = full_shape(parameter)
    row = prod(shape[1:])
    step = max(1, numel // row)
    in_parts = zero3.own_run(parameter) is not None
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        if in_parts:
            yield zero3.fetch(parameter, start * row, stop * row).view(-1, *shape[1:])
        else:
            yield parameter.detach()[start:stop]


def gate_values(model: nn.Module) -> torch.Tensor:
    """Return the scale of every unit that is physically there: float32 [U] on the CPU, in flat order.

    Collective, and too slow for every step.
    """
    deltas = [gate.delta for gate in gates_of(model)]
    with gathered(deltas):
        return torch.cat([1 + delta.detach().float().cpu() for delta in deltas])


@contextmanager
def rewriting(module: nn.Module) -> Iterator[None]:
    """Gather one module's parameters on every rank while they are replaced.

    At the end the new parameters are sharded, and the shards of those that were replaced are freed. Collective.
    """
    sharded: list[Any] = [p for p in module.parameters() if is_sharded(p)]
    with gathered(sharded):
        yield
    if release(sharded, module) > FREED_BYTES:
        memory.return_freed()
    if sharded:
        new = [p for p in module.parameters() if not is_sharded(p)]
        sharded[0].convert_to_zero_parameters(param_list=new)


def release(parameters: Iterable[Any], module: nn.Module) -> int:
    """Free the shards of those `parameters` that `module` no longer holds; returns the number of bytes freed.

    DeepSpeed attaches methods to each parameter that refer back to it. Without this, the cycle would keep a dropped
    parameter's shard in memory until the next garbage collection.
    """
    held = {id(p) for p in module.parameters()}
    gone = [p.ds_tensor for p in parameters if is_sharded(p) and id(p) not in held]
    freed = sum(shard.nbytes for shard in gone)
    for shard in gone:
        shard.data = shard.new_empty(0)
    return freed


def parameter_groups(
    model: nn.Module,
    task_head_names: frozenset[str],
    *,
    learning_rate: float,
    gate_learning_rate: float,
    weight_decay: float,
) -> list[Group]:
    """Return optimizer groups for everything that trains: adapters, head, gates, and backbone (norms, or all of it).

    Parameters with one dimension (biases, norms) and gates get no weight decay.
    """
    groups: dict[str, Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        family = _group_name(name, task_head_names)
        decays = len(full_shape(parameter)) > 1 and family != "gates"
        key = family if decays or family == "gates" else f"{family}_no_decay"
        lr = gate_learning_rate if family == "gates" else learning_rate
        group = groups.setdefault(
            key,
            {"name": key, "params": [], "lr": lr, "base_lr": lr, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return list(groups.values())


def trainable_counts(model: nn.Module, task_head_names: frozenset[str]) -> dict[str, int]:
    """Count trainable elements by kind: adapters, head, gates, backbone."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            family = _group_name(name, task_head_names)
            counts[family] = counts.get(family, 0) + full_numel(parameter)
    return counts


def _group_name(name: str, task_head_names: frozenset[str]) -> str:
    if f".{GATE_NAME}." in name:
        return "gates"
    if "lora_" in name:
        return "adapters"
    return "head" if name in task_head_names else "backbone"


def make_optimizer(groups: list[Group], adam: dict[str, Any], *, offloaded: bool) -> torch.optim.Optimizer:
    """Build AdamW, DeepSpeed's CPU version if its state is offloaded. `adam`: betas and eps."""
    options = {k: adam[k] for k in ("betas", "eps") if adam.get(k) is not None}
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, **options)


def shard_while_loading(ds_config: dict[str, Any]) -> Any:
    """Return an object that, while it is alive, makes `from_pretrained` shard as it loads; None below ZeRO-3.

    Transformers keeps only a weak reference to it: hold on to it as long as models are loaded.
    """
    if ds_config.get("zero_optimization", {}).get("stage", 0) != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(nothing_persists(ds_config))


def build(
    model: nn.Module,
    groups: list[Group],
    ds_config: dict[str, Any],
    adam: dict[str, Any],
    *,
    blocks: Iterable[nn.Module] = (),
) -> Any:
    """Build a DeepSpeed engine around `model` that trains `groups`.

    `ds_config` must have no "auto" left. Under ZeRO-3 DeepSpeed gets it with a persistence threshold of 0, so that no frozen
    tensor stays whole; trainables up to the configured threshold are made persistent afterwards.
    `blocks`: the model's blocks, if each of them runs once per pass (see `zero3.blocks_as_leaves`).
    """
    import deepspeed

    zero = ds_config.get("zero_optimization", {})
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    optimizer = make_optimizer(groups, adam, offloaded=offload != "none")
    threshold = zero.get("stage3_param_persistence_threshold", 0)
    zero3.spare_the_compiler()
    if zero.get("stage", 0) == 3:
        zero3.blocks_as_leaves(blocks, zero)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=nothing_persists(ds_config))
    _undo_first_step(engine)
    if zero.get("stage", 0) == 3:
        keep_whole([p for p in model.parameters() if p.requires_grad], engine.optimizer, threshold)
        zero3.keep_recomputed(engine.optimizer)
    return engine


def _undo_first_step(engine: Any) -> None:
    """Undo the step on zero gradients by which DeepSpeed creates Adam's state in bf16 without ZeRO.

    That step would count, and decay the fp32 masters.
    """
    masters, stored = (getattr(engine.optimizer, name, None) for name in ("fp32_groups", "fp16_groups"))
    if masters is None or stored is None:
        return
    for highs, lows in zip(masters, stored, strict=True):
        for high, low in zip(highs, lows, strict=True):
            high.data.copy_(low.data)
    engine.optimizer.optimizer.state.clear()


def nothing_persists(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return the same configuration with a persistence threshold of 0: no parameter stays whole on every rank."""
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage", 0) != 3:
        return ds_config
    return {**ds_config, "zero_optimization": {**zero, "stage3_param_persistence_threshold": 0}}


def keep_whole(parameters: list[nn.Parameter], zero_optimizer: Any, threshold: int) -> None:
    """Let ZeRO-3 keep these parameters whole between steps if they have at most `threshold` elements.

    Parameters of a block that is fetched as one piece are left out: what stays whole is gathered again after each step,
    tensor by tensor.
    """
    from deepspeed.utils import z3_leaf_parameter

    for parameter in parameters:
        if z3_leaf_parameter(parameter):
            continue
        if parameter.ds_numel <= threshold and not parameter.ds_persist:  # type: ignore[attr-defined]
            parameter.ds_persist = True  # type: ignore[attr-defined]
            zero_optimizer.persistent_parameters.append(parameter)


def set_learning_rates(engine: Any, factor: float) -> dict[str, float]:
    """Set every group's rate to `base_lr * factor`; returns the rates by group name."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return {group["name"]: group["lr"] for group in engine.optimizer.param_groups}


def destroy(engine: Any) -> None:
    """Detach an engine from its module, which stays usable with its (sharded) parameters; what the engine held becomes garbage."""
    module = engine.module
    engine.destroy()
    # Its finaliser would call this again, when the parameters may already have the masters of another engine.
    engine.destroy = _nothing
    zero3.forget_engine(module)
    for parameter in module.parameters():
        parameter.grad = None
        for name in ("_z3_optimizer", "_zero_optimizer", "ds_z3_leaf_module"):  # these keep the old engine alive
            vars(parameter).pop(name, None)
        if is_sharded(parameter) and parameter.ds_persist:  # the next engine decides anew what stays whole
            parameter.ds_persist = False
            parameter.partition()


def _nothing() -> None:
    pass
