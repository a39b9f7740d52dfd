"""The DeepSpeed configuration: read, checked against the options, and without any "auto" left.

Resolved before `HfDeepSpeedConfig` is created, because transformers reads it as it loads the model.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunadapt_ds import resources, zero_fields
from prunadapt_ds.config import Config
from prunadapt_ds.errors import Problem, UserError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
ADAM_TYPES = ("adam", "adamw")
# Trainables below this many elements stay whole on every rank (LoRA matrices do); frozen tensors never do.
PERSISTENCE_ELEMENTS = 100_000
# One bucket of gradients holds every trainable of a LoRA run; prefetching reaches a few layers ahead.
REDUCE_BUCKET_ELEMENTS = 5_000_000
PREFETCH_BUCKET_ELEMENTS = 5_000_000

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
    "activation_checkpointing": "object",
    "tensorboard": "object",
    "csv_monitor": "object",
    "wandb": "object",
    "data_types": "object",
    "seq_parallel_communication_data_type": "text",
    "disable_allgather": "switch",
    "checkpoint": "object",
}
"""Fields that are taken, and what they hold. DeepSpeed reads on where a type is wrong, and stumbles later."""


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

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices faster than fp32 ones."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"amx_bf16", "avx512_bf16"})


def resolve_ds_config(
    config: Config, world_size: int, probe: Callable[[], bool] = fast_bf16, *, on_this_machine: bool = True
) -> DsConfig:
    """Read `--ds_config` for `world_size` ranks. Raises UserError with every problem of the file.

    `on_this_machine`: also refuse what needs hardware or folders that are not here.
    """
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
    stage = zero.setdefault("stage", 0) if isinstance(zero, dict) else 0
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.append(Problem("zero_optimization.stage", stage, "must be 0, 1, 2 or 3"))
    _check_precision(values, problems)
    resolved: dict[str, Any] = {}
    if not problems:
        problems += zero_fields.problems_of(zero, on_this_machine)
        _resolve_batch(config, values, world_size, resolved, problems)
        for name, stated, flag in (
            ("gradient_clipping", values.get("gradient_clipping"), "max_grad_norm"),
            ("optimizer.params.lr", adam.get("lr"), "learning_rate"),
            ("optimizer.params.weight_decay", adam.get("weight_decay"), "weight_decay"),
        ):
            problems += _contradiction(config, flag, name, stated)
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
    if not problems:
        problems += _schema_problems(values, path)
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
    except (ValueError, RecursionError) as error:
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
            continue
        kind = KNOWN_KEYS[name]
        words, holds = KINDS[kind]
        if values[name] is None and kind == "object":
            values[name] = {}
        elif not holds(values[name]) and (values[name] != AUTO or kind == "object"):
            problems.append(Problem(name, values[name], f"must be {words}"))


def _take_optimizer(values: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Remove the optimizer block and return AdamW defaults from it."""
    block = values.pop("optimizer", None)
    if not block or not isinstance(block, dict):
        return {}
    kind = str(block.get("type", ""))
    if kind.lower() not in ADAM_TYPES:
        problems.append(
            Problem("optimizer.type", kind, "only Adam and AdamW are taken; this trainer builds AdamW itself")
        )
        return {}
    block = block.get("params") or {}
    if not isinstance(block, dict):
        problems.append(Problem("optimizer.params", block, "must be an object"))
        return {}
    params = {k: v for k, v in block.items() if v != AUTO}
    for name in sorted(params.keys() - ADAM_PARAMS.keys() - {"torch_adam", "adam_w_mode"}):
        problems.append(Problem(f"optimizer.params.{name}", params[name], "not an option of AdamW"))
    found = {name: params[name] for name in ADAM_PARAMS if name in params}
    for name, value in found.items():
        words, holds = ADAM_PARAMS[name]
        if not holds(value):
            problems.append(Problem(f"optimizer.params.{name}", value, f"must be {words}"))
    return found


def _take_tensorboard(values: dict[str, Any], problems: list[Problem]) -> str | None:
    """Remove the tensorboard block and return the folder it names, if it is enabled and names one."""
    block = values.pop("tensorboard", None) or {}
    if not isinstance(block, dict):
        return None
    for name in set(block) - {"enabled", "output_path", "job_name"}:
        problems.append(Problem(f"tensorboard.{name}", block[name], "taken are enabled, output_path and job_name"))
    if not block.get("enabled") or not block.get("output_path"):
        return None
    return str(Path(str(block["output_path"])) / str(block.get("job_name", "")))


def _check_precision(values: dict[str, Any], problems: list[Problem]) -> None:
    fp16 = values.pop("fp16", None) or {}
    if isinstance(fp16, dict) and fp16.get("enabled"):
        problems.append(
            Problem("fp16.enabled", fp16["enabled"], 'use {"bf16": {"enabled": "auto"}}, or neither for fp32')
        )
    bf16 = values.setdefault("bf16", {"enabled": False})
    enabled = bf16.setdefault("enabled", False) if isinstance(bf16, dict) else False
    if not isinstance(enabled, bool) and enabled != AUTO:
        problems.append(Problem("bf16.enabled", enabled, 'must be true, false or "auto"'))


def _contradiction(config: Config, flag: str, name: str, stated: Any) -> list[Problem]:
    """The problem of a field that states something else than the user's own option; no problem where either is silent."""
    wanted = getattr(config.train, flag)
    if flag not in config.given or stated in (None, AUTO, wanted):
        return []
    return [Problem(name, stated, f'contradicts --{flag} {wanted}; write "auto" in the file')]


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
        else:
            problems += _contradiction(config, flag, name, stated)
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


def _schema_problems(values: dict[str, Any], path: str) -> list[Problem]:
    """What DeepSpeed itself would refuse, later and with a traceback. Its own batch sizes are ours, checked above."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(copy.deepcopy({k: v for k, v in values.items() if k != "train_batch_size"}))
    except ValidationError as error:
        return [_schema_problem(values, found) for found in error.errors(include_url=False)]
    except Exception as error:  # one of many types, always about this file
        return [Problem("ds_config", path, f"DeepSpeed does not take it: {error}")]
    return []


def _schema_problem(values: dict[str, Any], found: Any) -> Problem:
    names = [str(name) for name in found["loc"]]
    if names and names[0] not in values:  # said within its block
        blocks = {name: inside for name, inside in values.items() if isinstance(inside, dict) and names[0] in inside}
        meant = [name for name, inside in blocks.items() if len(names) > 1 or inside[names[0]] == found["input"]]
        names[:0] = meant[:1]
    return Problem(".".join(names) or "ds_config", found["input"], f"DeepSpeed does not take it: {found['msg']}")


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
