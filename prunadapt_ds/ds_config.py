"""The DeepSpeed configuration: read, checked against the options, and without any "auto" left.

Resolved before `HfDeepSpeedConfig` is created, because transformers reads it as it loads the model.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunadapt_ds import resources
from prunadapt_ds.config import Config
from prunadapt_ds.errors import Problem, UserError

AUTO = "auto"
ADAM_TYPES = ("adam", "adamw")
# Trainables below this many elements stay whole on every rank (LoRA matrices do); frozen tensors never do.
PERSISTENCE_ELEMENTS = 100_000
# One bucket of gradients holds every trainable of a LoRA run; prefetching reaches a few layers ahead.
REDUCE_BUCKET_ELEMENTS = 5_000_000
PREFETCH_BUCKET_ELEMENTS = 5_000_000

KNOWN_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "prescale_gradients",
    "gradient_predivide_factor",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
    "comms_logger",
    "flops_profiler",
    "activation_checkpointing",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "data_types",
    "seq_parallel_communication_data_type",
    "disable_allgather",
    "checkpoint",
)


@dataclass(frozen=True)
class DsConfig:
    """A configuration that DeepSpeed takes as it is.

    values: no "auto", no optimizer or scheduler block.  resolved: field -> what its "auto" became.  adam: the optimizer
    block's lr, betas, eps and weight_decay where it states them.  A "tensorboard" block says where our own events go; DeepSpeed
    would write some of them a second time.
    """

    values: dict[str, Any]
    resolved: dict[str, Any]
    stage: int
    dtype: str  # "bf16" or "fp32"
    path: str
    adam: dict[str, Any]
    board_dir: str | None = None  # where a "tensorboard" block wants the events of the run


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices faster than fp32 ones."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"amx_bf16", "avx512_bf16"})


def resolve_ds_config(config: Config, world_size: int, probe: Callable[[], bool] = fast_bf16) -> DsConfig:
    """Read `--ds_config` for `world_size` ranks. Raises UserError with every problem of the file."""
    path = config.train.ds_config
    values = _read(path)
    problems: list[Problem] = []
    _refuse_unknown(values, problems)
    adam = _take_optimizer(values, problems)
    board_dir = _take_tensorboard(values, problems)
    if values.pop("scheduler", None) is not None:
        remedy = "learning rates are set by --learning_rate, --warmup_ratio and --gate_learning_rate; remove the block"
        problems.append(Problem("scheduler", "in " + path, remedy))
    zero = values.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        problems.append(Problem("zero_optimization.stage", stage, "must be 0, 1, 2 or 3"))
    _check_precision(values, problems)
    resolved: dict[str, Any] = {}
    if not problems:
        _check_zero(zero, problems)
        _resolve_batch(config, values, world_size, resolved, problems)
        _resolve_auto(values, "gradient_clipping", config.train.max_grad_norm, resolved, default=True)
        _resolve_auto(values["bf16"], "enabled", probe, resolved, prefix="bf16.")
        for name, size in (
            ("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS),
            ("stage3_prefetch_bucket_size", PREFETCH_BUCKET_ELEMENTS),
            ("stage3_param_persistence_threshold", PERSISTENCE_ELEMENTS),
        ):
            _resolve_auto(zero, name, size, resolved, prefix="zero_optimization.", default=stage == 3)
        problems += [
            Problem(name, AUTO, "has no automatic value here; write a number or remove the field")
            for name in _left_auto(values)
        ]
    if problems:
        raise UserError(problems)
    values.setdefault("steps_per_print", 2**31 - 1)  # progress is ours to print
    dtype = "bf16" if values["bf16"]["enabled"] else "fp32"
    return DsConfig(values, resolved, int(stage or 0), dtype, path, adam, board_dir)


def _read(path: str) -> dict[str, Any]:
    def refuse(remedy: str) -> UserError:
        return UserError(Problem("ds_config", path, remedy))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise refuse(f"states {', '.join(twice)} twice")
        return dict(pairs)

    try:
        values = json.loads(resources.find(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError as error:
        raise refuse("there is no such file; ds_configs/ has one for each ZeRO stage") from error
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(f"cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise refuse(f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise refuse("must be a JSON object")
    return values


def _refuse_unknown(values: dict[str, Any], problems: list[Problem]) -> None:
    for name in values:
        if name not in KNOWN_KEYS:
            close = difflib.get_close_matches(name, KNOWN_KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "DeepSpeed options that do not apply here are refused"
            problems.append(Problem(name, values[name], hint))


def _take_optimizer(values: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Remove the optimizer block and return AdamW defaults from it."""
    block = values.pop("optimizer", None)
    if block is None:
        return {}
    kind = str(block.get("type", "")) if isinstance(block, dict) else str(block)
    if kind.lower() not in ADAM_TYPES:
        problems.append(
            Problem("optimizer.type", kind, "only Adam and AdamW are taken; this trainer builds AdamW itself")
        )
        return {}
    params = {k: v for k, v in block.get("params", {}).items() if v != AUTO}
    for name in set(params) - {"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode"}:
        problems.append(Problem(f"optimizer.params.{name}", params[name], "not an option of AdamW"))
    return {k: params[k] for k in ("lr", "betas", "eps", "weight_decay") if k in params}


def _take_tensorboard(values: dict[str, Any], problems: list[Problem]) -> str | None:
    """Remove the tensorboard block and return the folder it names, if it is enabled and names one."""
    block = values.pop("tensorboard", None) or {}
    if not isinstance(block, dict):
        problems.append(Problem("tensorboard", block, "must be an object"))
        return None
    for name in set(block) - {"enabled", "output_path", "job_name"}:
        problems.append(Problem(f"tensorboard.{name}", block[name], "taken are enabled, output_path and job_name"))
    if not block.get("enabled") or not block.get("output_path"):
        return None
    return str(Path(str(block["output_path"])) / str(block.get("job_name", "")))


def _check_precision(values: dict[str, Any], problems: list[Problem]) -> None:
    fp16 = values.pop("fp16", None) or {}
    if fp16.get("enabled"):
        problems.append(
            Problem("fp16.enabled", fp16["enabled"], 'use {"bf16": {"enabled": "auto"}}, or neither for fp32')
        )
    bf16 = values.setdefault("bf16", {"enabled": False})
    if not isinstance(bf16, dict) or bf16.setdefault("enabled", False) not in (True, False, AUTO):
        problems.append(Problem("bf16.enabled", bf16, 'must be true, false or "auto"'))


def _check_zero(zero: dict[str, Any], problems: list[Problem]) -> None:
    import torch

    for block in ("offload_optimizer", "offload_param"):
        device = (zero.get(block) or {}).get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            problems.append(Problem(f"zero_optimization.{block}.device", device, "must be none, cpu or nvme"))
        elif device == "nvme" and block == "offload_optimizer":
            remedy = "adapters have little optimizer state: cpu is enough, and nvme is not taken"
            problems.append(Problem(f"zero_optimization.{block}.device", device, remedy))
        elif device == "nvme" and not Path(zero[block].get("nvme_path") or "-").is_dir():
            remedy = "there is no such folder; name one on a local NVMe disk"
            problems.append(Problem(f"zero_optimization.{block}.nvme_path", zero[block].get("nvme_path"), remedy))
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(name) and not torch.cuda.is_available():
            problems.append(Problem(f"zero_optimization.{name}", True, "quantised communication needs a CUDA device"))


def _resolve_batch(
    config: Config, values: dict[str, Any], world_size: int, resolved: dict[str, Any], problems: list[Problem]
) -> None:
    """Batch sizes of the file and of the options must be one and the same."""
    sizes = {}
    for name, flag in (
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ):
        wanted = getattr(config.train, flag)
        stated = values.get(name, AUTO)
        if stated == AUTO:
            values[name] = resolved[name] = wanted
        elif not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
            problems.append(Problem(name, stated, 'must be a whole number of at least 1, or "auto"'))
            return
        elif flag in config.given and stated != wanted:
            problems.append(Problem(name, stated, f'contradicts --{flag} {wanted}; write "auto" in the file'))
        sizes[name] = values[name]
    product = sizes["train_micro_batch_size_per_gpu"] * sizes["gradient_accumulation_steps"] * world_size
    stated = values.get("train_batch_size", AUTO)
    if stated == AUTO:
        values["train_batch_size"] = resolved["train_batch_size"] = product
    elif stated != product:
        remedy = (
            f"is not micro-batch x accumulation x ranks = {sizes['train_micro_batch_size_per_gpu']} x "
            f'{sizes["gradient_accumulation_steps"]} x {world_size} = {product}; write "auto"'
        )
        problems.append(Problem("train_batch_size", stated, remedy))


def _resolve_auto(
    values: dict[str, Any],
    name: str,
    value: Any,
    resolved: dict[str, Any],
    *,
    prefix: str = "",
    default: bool = False,
) -> None:
    """Replace "auto" (and with `default` also a missing field) by `value`, which may be a function."""
    if values.get(name, AUTO if default else None) == AUTO:
        values[name] = resolved[prefix + name] = value() if callable(value) else value


def _left_auto(values: Any, prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if value == AUTO:
            yield prefix + name
        elif isinstance(value, dict):
            yield from _left_auto(value, f"{prefix}{name}.")
