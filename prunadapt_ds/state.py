"""The training state by parameter name: fp32 masters and Adam's moments, as whole tensors.

Whole tensors do not depend on the number of ranks or the ZeRO stage, and are sliced like the parameters when the model is cut.
Where possible only rank 0 keeps all of them: trainables are few with a frozen backbone, but not with --method full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds.distributed import device, rank, world_size
from prunadapt_ds.models.structure import full_shape, is_sharded
from prunadapt_ds.resize import Slices

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingState:
    """`masters[name]` and `moments[key][name]`: float32, in the parameter's full shape. `steps`: optimizer steps taken."""

    masters: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    steps: int

    def sliced(self, slices: Slices, names: set[str]) -> TrainingState:
        """The state of the model after a cut. `slices`: as `resize` returned them; `names`: of what still trains."""

        def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            kept = {}
            for name in tensors.keys() & names:
                axis, index = slices.get(name, (0, None))
                kept[name] = tensors[name] if index is None else tensors[name].index_select(axis, index)
            return kept

        return TrainingState(cut(self.masters), {key: cut(t) for key, t in self.moments.items()}, self.steps)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def capture(engine: Any, *, keep: bool = True) -> TrainingState:
    """Gather the engine's training state on the CPU of the ranks that `keep` it; others get only `steps`. Collective."""
    started = any(state for state in _torch_optimizer(engine).state.values())
    if started:
        _link_moments(engine)
    moments = {key: _read_all(engine, key, keep) if started else {} for key in MOMENTS}
    steps = max((int(s["step"]) for s in _torch_optimizer(engine).state.values() if s), default=0)
    return TrainingState(_read_all(engine, None, keep), moments, steps)


def read_masters(engine: Any) -> dict[str, Tensor]:
    """Gather the fp32 masters alone on the CPU of every rank. Collective."""
    return _read_all(engine, None)


def restore(engine: Any, state: TrainingState) -> None:
    """Load rank 0's training state into an engine: masters, the weights that follow from them, and moments. Collective.

    Of the state on other ranks only `steps` is read. One tensor at a time is whole on every rank.
    """
    if state.steps:
        _make_moments(engine, state.steps)
        _link_moments(engine)
    parameters = trainable(engine.module)
    assert rank() or parameters.keys() == state.masters.keys(), "this state is another model's"
    with torch.no_grad():
        for name, parameter in parameters.items():
            _write(engine, parameter, None, _from_rank_0(parameter, state.masters.get(name)))
        for name, parameter in parameters.items() if state.steps else ():
            for key in MOMENTS:
                _write(engine, parameter, key, _from_rank_0(parameter, state.moments[key].get(name)))


def _from_rank_0(parameter: nn.Parameter, value: Tensor | None) -> Tensor:
    """Broadcast rank 0's float32 value for a parameter, in its full shape, to the CPU of every rank."""
    if world_size() == 1:
        assert value is not None
        return value
    mine = value if rank() == 0 and value is not None else torch.empty(full_shape(parameter))
    whole = mine.to(device())
    torch.distributed.broadcast(whole, src=0)
    return whole.cpu()


def write_masters(engine: Any, masters: dict[str, Tensor]) -> None:
    """Replace an engine's masters, and the weights that follow from them; moments stay. Collective."""
    parameters = trainable(engine.module)
    assert parameters.keys() == masters.keys(), "these are another model's"
    with torch.no_grad():
        for name, parameter in parameters.items():
            _write(engine, parameter, None, masters[name])


# ------------------------------------------------------------------- where DeepSpeed keeps masters, by ZeRO stage


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _is_flat(parameter: nn.Parameter) -> bool:
    """Whether the optimizer works on flat fp32 partitions that DeepSpeed maps to the parameter (ZeRO)."""
    return is_sharded(parameter) or hasattr(parameter, "_hp_mapping")


def _master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The tensor that the optimizer steps for this parameter without ZeRO: itself, or in bf16 its fp32 copy."""
    groups = zip(
        getattr(engine.optimizer, "fp16_groups", ()), getattr(engine.optimizer, "fp32_groups", ()), strict=True
    )
    pairs = ((low, high) for lows, highs in groups for low, high in zip(lows, highs, strict=True))
    return next((high for low, high in pairs if low is parameter), parameter)


def _whole(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    master = _master(engine, parameter)
    return master if key is None else _torch_optimizer(engine).state[master][key]


def _read_all(engine: Any, key: str | None, keep: bool = True) -> dict[str, Tensor]:
    """Read the tensors one by one; a rank that does not keep them drops each at once. Collective."""
    whole = ((name, _read(engine, parameter, key)) for name, parameter in trainable(engine.module).items())
    return {name: tensor for name, tensor in whole if keep}


def _read(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not _is_flat(parameter):
        return _whole(engine, parameter, key).detach().float().cpu().clone()
    full = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    return full.detach().float().cpu().clone()


def _write(engine: Any, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if is_sharded(parameter):
        _write_shard(engine, parameter, key, value)
    elif hasattr(parameter, "_hp_mapping"):
        if key is None:
            parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
    else:
        _whole(engine, parameter, key).data.copy_(value)
        if key is None:
            parameter.data.copy_(value)


def _write_shard(engine: Any, parameter: Any, key: str | None, value: Tensor) -> None:
    """Write this rank's part of a ZeRO-3 parameter. The last rank's is padded, which DeepSpeed's own setter does not do."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * world_size())
    padded[: value.numel()] = value.flatten()
    shard = padded[rank() * size : (rank() + 1) * size]
    engine.optimizer.set_local_hp_param(shard, parameter, key)
    if key is None:
        parameter.ds_tensor.data.copy_(shard)
        if parameter.numel():  # currently whole, because it persists
            parameter.data.copy_(value)


def _flat_masters(engine: Any) -> Iterator[Tensor]:
    """The tensors that the torch optimizer really steps on this rank."""
    # ZeRO-3 lends them to the optimizer's groups only during a step.
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if partitions is not None:
        yield from partitions
        return
    for group in _torch_optimizer(engine).param_groups:
        yield from group["params"]


def optimizer_bytes(engine: Any) -> int:
    """Bytes of this rank's share of the optimizer state: Adam's moments, and masters that are not the parameters themselves."""
    parameters = {id(p) for p in engine.module.parameters()}
    held = [master for master in _flat_masters(engine) if id(master) not in parameters]
    for state in _torch_optimizer(engine).state.values():
        held += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in held)


def _make_moments(engine: Any, steps: int) -> None:
    """Create Adam's state, which a fresh optimizer does not have before its first step."""
    optimizer = _torch_optimizer(engine)
    for master in _flat_masters(engine):
        counter = steps if type(optimizer).__name__ == "DeepSpeedCPUAdam" else torch.tensor(float(steps))
        optimizer.state[master] = {"step": counter, **{key: torch.zeros_like(master) for key in MOMENTS}}


def _link_moments(engine: Any) -> None:
    """Let ZeRO-1 and 2 find the moments by parameter: of several groups DeepSpeed links only the first."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
