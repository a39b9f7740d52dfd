"""Fields of a DeepSpeed file's zero_optimization block that it would pass over, stumble on, or take and go wrong with here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunadapt_ds.errors import Problem

_REACH = "a cut, a checkpoint and a teacher's weights do not reach; remove it"
NOT_TAKEN: dict[str, tuple[Any, str]] = {
    "zero_hpz_partition_size": (1, f"DeepSpeed gathers from a second copy then, which {_REACH}"),
    "round_robin_gradients": (False, f"the order in which DeepSpeed keeps masters is one then that {_REACH}"),
    "compute_grad_norm": (True, "gradients are clipped to that norm; remove it"),
    "zenflow": (None, f"its optimizer has weights and moments of its own, which {_REACH}"),
    "cpu_offload": (None, 'an old name; write "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": (None, 'an old name; write "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": (None, 'an old name; write "pin_memory" in the offload blocks'),
}
"""Fields of zero_optimization that only work as they are by default: that default, and the remedy."""
NOT_TAKEN_OF_AN_OFFLOAD: dict[str, tuple[Any, str]] = {
    "ratio": (1, f"an optimizer of its own steps the part that stays on the device, which {_REACH}"),
    "super_offload": (False, f"it keeps masters and moments in a process of its own, which {_REACH}"),
}
NEED_A_GPU = (
    *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
    "stage3_module_granularity_threshold",
)
OFFLOADS = {"offload_optimizer": 1, "offload_param": 3}  # block: the lowest stage at which DeepSpeed heeds it


def problems_of(zero: dict[str, Any], on_this_machine: bool) -> list[Problem]:
    """zero: the block, whose stage is known. `on_this_machine`: also refuse what needs hardware or folders that are not here."""
    problems: list[Problem] = []
    for block in OFFLOADS:
        if isinstance(zero.get(block) or {}, dict):
            problems += _offload_problems(block, zero, on_this_machine)
        else:
            problems.append(Problem(f"zero_optimization.{block}", zero[block], "must be an object"))
    is_on_disk = isinstance(zero.get("offload_param"), dict) and zero["offload_param"].get("device") == "nvme"
    if is_on_disk and zero.get("stage3_max_reuse_distance") != 0:
        remedy = "must be 0 with parameters on NVMe: each that stays gathered between two uses keeps one of the buffers"
        found = zero.get("stage3_max_reuse_distance")
        problems.append(Problem("zero_optimization.stage3_max_reuse_distance", found, remedy))
    problems += _not_taken("zero_optimization", zero, NOT_TAKEN)
    if on_this_machine:
        problems += _need_a_gpu(zero)
    return problems


def _offload_problems(block: str, zero: dict[str, Any], on_this_machine: bool) -> Iterator[Problem]:
    name, found = f"zero_optimization.{block}", zero.get(block) or {}
    device = found.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        yield Problem(f"{name}.device", device, "must be none, cpu or nvme")
    elif device == "nvme" and block == "offload_optimizer":
        remedy = "adapters have little optimizer state: cpu is enough, and nvme is not taken"
        yield Problem(f"{name}.device", device, remedy)
    elif on_this_machine and device == "nvme" and not Path(str(found.get("nvme_path") or "-")).is_dir():
        remedy = "there is no such folder; name one on a local NVMe disk"
        yield Problem(f"{name}.nvme_path", found.get("nvme_path"), remedy)
    elif device != "none" and zero["stage"] < OFFLOADS[block]:
        yield Problem(f"{name}.device", device, f"has no effect below ZeRO stage {OFFLOADS[block]}; remove it")
    yield from _not_taken(name, found, NOT_TAKEN_OF_AN_OFFLOAD)


def _not_taken(block: str, values: dict[str, Any], table: dict[str, tuple[Any, str]]) -> list[Problem]:
    """Fields of a block that say something else than DeepSpeed's default, where only that default works."""
    return [
        Problem(f"{block}.{name}", values[name], remedy)
        for name, (default, remedy) in table.items()
        if values.get(name, default) != default
    ]


def _need_a_gpu(zero: dict[str, Any]) -> list[Problem]:
    import torch

    names = () if torch.cuda.is_available() else NEED_A_GPU
    return [Problem(f"zero_optimization.{name}", zero[name], "needs a CUDA device") for name in names if zero.get(name)]
