"""What a DeepSpeed file may contain, field by field: the type of each, what is taken out of the file, and what does not work here.

DeepSpeed itself would ignore some of these mistakes, fail on others later, and accept some and compute something wrong.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prunadapt_ds.errors import Problem

AUTO = "auto"
ADAM_TYPES = ("adam", "adamw")
KNOWN_KEYS = {
    "train_batch_size": "count",
    "train_micro_batch_size_per_gpu": "count",
    "gradient_accumulation_steps": "count",
    "gradient_clipping": "number",
    "communication_data_type": "text",
    "steps_per_print": "count",
    "wall_clock_breakdown": "switch",
    "memory_breakdown": "switch",
    "dump_state": "switch",
    "bf16": "object",
    "fp16": "object",
    "optimizer": "object",
    "scheduler": "object",
    "zero_optimization": "object",
    "zero_allow_untested_optimizer": "switch",
    "zero_force_ds_cpu_optimizer": "switch",
    "aio": "object",
    "comms_logger": "object",
    "flops_profiler": "object",
    "tensorboard": "object",
    "csv_monitor": "object",
    "wandb": "object",
    "data_types": "object",
    "seq_parallel_communication_data_type": "text",
    "disable_allgather": "switch",
}
"""Accepted fields and their types. DeepSpeed does not notice a wrong type at once, and fails later."""


ELSEWHERE = {
    "activation_checkpointing": "DeepSpeed's own is not called here; remove it and pass --gradient_checkpointing",
    "checkpoint": "DeepSpeed's own checkpoints are not written here; remove it, see --checkpoint_steps",
}
"""Blocks of DeepSpeed's that would change nothing here, and what does."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "count": ("a whole number of at least 1", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1),
    "number": ("a number of at least 0", lambda v: _is_number(v) and v >= 0),
    "switch": ("true or false", lambda v: isinstance(v, bool)),
    "text": ("text", lambda v: isinstance(v, str)),
    "object": ("an object", lambda v: isinstance(v, dict)),
}
ADAM_PARAMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number above 0", lambda v: _is_number(v) and v > 0),
    "betas": (
        "two numbers of at least 0 and below 1",
        lambda v: isinstance(v, list) and len(v) == 2 and all(_is_number(b) and 0 <= b < 1 for b in v),
    ),
    "eps": ("a number above 0", lambda v: _is_number(v) and v > 0),
    "weight_decay": ("a number of at least 0", lambda v: _is_number(v) and v >= 0),
}
_REACH = "cuts, checkpoints and teachers do not support; remove it"
_ROUNDS = "frozen weights would not stay what they are, and an export would not compute what was trained; remove it"
NOT_TAKEN: dict[str, tuple[Any, str]] = {
    "zero_quantized_weights": (False, f"DeepSpeed would gather weights in 8 bits: {_ROUNDS}"),
    "zero_quantized_nontrainable_weights": (False, f"DeepSpeed would keep cut matrices in 8 bits: {_ROUNDS}"),
    "zero_hpz_partition_size": (1, f"DeepSpeed would gather from a second copy, which {_REACH}"),
    "round_robin_gradients": (False, f"DeepSpeed would keep masters in another order, which {_REACH}"),
    "compute_grad_norm": (True, "clipping gradients needs that norm; remove it"),
    "zenflow": (None, f"its optimizer keeps weights and moments of its own, which {_REACH}"),
    "cpu_offload": (None, 'an old name; write "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": (None, 'an old name; write "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": (None, 'an old name; write "pin_memory" in the offload blocks'),
}
"""Fields of zero_optimization that work only with their default value: that default, and the remedy."""
NOT_TAKEN_OF_AN_OFFLOAD: dict[str, tuple[Any, str]] = {
    "ratio": (1, f"a separate optimizer steps the part that stays on the device, which {_REACH}"),
    "super_offload": (False, f"it keeps masters and moments in a separate process, which {_REACH}"),
}
NEED_A_GPU = (
    "zero_quantized_gradients",
    "stage3_module_granularity_threshold",
)
OFFLOADS = {"offload_optimizer": 1, "offload_param": 3}  # block: the lowest stage at which DeepSpeed applies it


def refuse_unknown(values: dict[str, Any], problems: list[Problem]) -> None:
    for name in values:
        if name not in KNOWN_KEYS:
            close = difflib.get_close_matches(name, KNOWN_KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "DeepSpeed options that do not apply here are refused"
            hint = ELSEWHERE.get(name, hint)
            problems.append(Problem(name, values[name], hint))
            continue
        kind = KNOWN_KEYS[name]
        words, holds = KINDS[kind]
        if values[name] is None and kind == "object":
            values[name] = {}
        elif not holds(values[name]) and (values[name] != AUTO or kind == "object"):
            problems.append(Problem(name, values[name], f"must be {words}"))


def take_optimizer(values: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Remove the optimizer block, and return the AdamW settings that it states."""
    block = values.pop("optimizer", None)
    if not block or not isinstance(block, dict):
        return {}
    kind = str(block.get("type", ""))
    if kind.lower() not in ADAM_TYPES:
        problems.append(
            Problem("optimizer.type", kind, "only Adam and AdamW are accepted; this trainer builds AdamW itself")
        )
        return {}
    block = block.get("params") or {}
    if not isinstance(block, dict):
        problems.append(Problem("optimizer.params", block, "must be an object"))
        return {}
    params = {k: v for k, v in block.items() if v != AUTO}
    if params.get("adam_w_mode", True) is not True:
        remedy = "decay is not added to the gradients here, as in Adam, but to the step, as in AdamW; remove it"
        problems.append(Problem("optimizer.params.adam_w_mode", params["adam_w_mode"], remedy))
    for name in sorted(params.keys() - ADAM_PARAMS.keys() - {"torch_adam", "adam_w_mode"}):
        problems.append(Problem(f"optimizer.params.{name}", params[name], "not an option of AdamW"))
    found = {}
    for name in (name for name in ADAM_PARAMS if name in params):
        words, holds = ADAM_PARAMS[name]
        if holds(params[name]):
            found[name] = params[name]
        else:
            problems.append(Problem(f"optimizer.params.{name}", params[name], f"must be {words}"))
    return found


def take_tensorboard(values: dict[str, Any], problems: list[Problem]) -> str | None:
    """Remove the tensorboard block, and return the folder that it names, if it is enabled and names one."""
    block = values.pop("tensorboard", None) or {}
    if not isinstance(block, dict):
        return None
    for name in set(block) - {"enabled", "output_path", "job_name"}:
        problems.append(Problem(f"tensorboard.{name}", block[name], "accepted are enabled, output_path and job_name"))
    if not block.get("enabled") or not block.get("output_path"):
        return None
    return str(Path(str(block["output_path"])) / str(block.get("job_name", "")))


def check_precision(values: dict[str, Any], problems: list[Problem]) -> None:
    fp16 = values.pop("fp16", None) or {}
    if isinstance(fp16, dict) and fp16.get("enabled"):
        problems.append(
            Problem("fp16.enabled", fp16["enabled"], 'use {"bf16": {"enabled": "auto"}}, or neither for fp32')
        )
    bf16 = values.get("bf16")
    enabled = bf16.get("enabled", False) if isinstance(bf16, dict) else False
    if not isinstance(enabled, bool) and enabled != AUTO:
        problems.append(Problem("bf16.enabled", enabled, 'must be true, false or "auto"'))


def zero_stage(values: dict[str, Any], problems: list[Problem]) -> int:
    """The ZeRO stage; 0 if none is stated."""
    zero = values.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.append(Problem("zero_optimization.stage", stage, "must be 0, 1, 2 or 3"))
        return 0
    return int(stage)


def zero_problems(zero: dict[str, Any], on_this_machine: bool) -> list[Problem]:
    """The problems of a ZeRO block whose stage is resolved.

    `on_this_machine`: also refuse what needs hardware or folders that are not here.
    """
    problems: list[Problem] = []
    for block in OFFLOADS:
        if isinstance(zero.get(block) or {}, dict):
            problems += _offload_problems(block, zero, on_this_machine)
        else:
            problems.append(Problem(f"zero_optimization.{block}", zero[block], "must be an object"))
    is_on_disk = isinstance(zero.get("offload_param"), dict) and zero["offload_param"].get("device") == "nvme"
    if is_on_disk and zero.get("stage3_max_reuse_distance") != 0:
        remedy = "must be 0 with parameters on NVMe: one that stays gathered between two uses would keep its buffer"
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
        remedy = "adapters have little optimizer state: cpu is enough, and nvme is not supported"
        yield Problem(f"{name}.device", device, remedy)
    elif on_this_machine and device == "nvme" and not Path(str(found.get("nvme_path") or "-")).is_dir():
        remedy = "there is no such folder; name one on a local NVMe disk"
        yield Problem(f"{name}.nvme_path", found.get("nvme_path"), remedy)
    elif device != "none" and zero["stage"] < OFFLOADS[block]:
        yield Problem(f"{name}.device", device, f"has no effect below ZeRO stage {OFFLOADS[block]}; remove it")
    yield from _not_taken(name, found, NOT_TAKEN_OF_AN_OFFLOAD)


def _not_taken(block: str, values: dict[str, Any], table: dict[str, tuple[Any, str]]) -> list[Problem]:
    """The problems of fields that differ from DeepSpeed's default, where only that default works."""
    return [
        Problem(f"{block}.{name}", values[name], remedy)
        for name, (default, remedy) in table.items()
        if values.get(name, default) != default
    ]


def _need_a_gpu(zero: dict[str, Any]) -> list[Problem]:
    import torch

    names = () if torch.cuda.is_available() else NEED_A_GPU
    return [Problem(f"zero_optimization.{name}", zero[name], "needs a CUDA device") for name in names if zero.get(name)]


def sum_problems(values: dict[str, Any]) -> list[Problem]:
    """A dtype of summed gradients that DeepSpeed would refuse only once the model is loaded."""
    name, wanted = "data_types.grad_accum_dtype", values.get("data_types", {}).get("grad_accum_dtype")
    if wanted not in (None, "fp32", "bf16"):
        return [Problem(name, wanted, "must be fp32 or bf16")]
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if wanted == "fp32" and stage == 0 and values.get("bf16", {}).get("enabled"):
        return [
            Problem(
                name, wanted, "DeepSpeed has no such sum in bf16 without ZeRO; take a stage of 1 to 3, or remove it"
            )
        ]
    return []
