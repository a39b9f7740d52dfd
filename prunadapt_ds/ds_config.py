"""The DeepSpeed configuration: read it, check it against the options, and resolve every "auto".

This happens before `HfDeepSpeedConfig` is created, because transformers reads that while it loads the model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunadapt_ds import ds_fields as fields
from prunadapt_ds import resources
from prunadapt_ds.config import Config
from prunadapt_ds.ds_fields import AUTO
from prunadapt_ds.errors import Problem, UserError

if TYPE_CHECKING:
    import torch

# Trainables of up to this many elements stay whole on every rank (LoRA matrices do); frozen tensors never do.
PERSISTENCE_ELEMENTS = 100_000
# One bucket of gradients holds every trainable of a LoRA run; prefetching reaches a few layers ahead.
REDUCE_BUCKET_ELEMENTS = 5_000_000
PREFETCH_BUCKET_ELEMENTS = 5_000_000
BATCH_SIZES = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
"""Fields of the file, and the options that set the same."""


@dataclass(frozen=True)
class DsConfig:
    """A resolved configuration.

    values: what DeepSpeed gets; no "auto", no optimizer, scheduler or tensorboard block.  resolved: field -> what its "auto"
    became.  adam: the optimizer block's lr, betas, eps and weight_decay, if stated.  board_dir: where a "tensorboard" block
    wants our own events; DeepSpeed would write some of them a second time.
    """

    values: dict[str, Any]
    resolved: dict[str, Any]
    stage: int
    dtype: str  # "bf16" or "fp32"
    path: str
    adam: dict[str, Any]
    board_dir: str | None = None

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
    """Read and resolve `--ds_config` for `world_size` ranks. Raises UserError with every problem of the file.

    `probe`: decides what "auto" means for bf16.  `on_this_machine`: also refuse what needs hardware or folders that are not here.
    """
    path = config.train.ds_config
    values = _read(path)
    problems: list[Problem] = []
    fields.refuse_unknown(values, problems)
    adam = fields.take_optimizer(values, problems)
    board_dir = fields.take_tensorboard(values, problems)
    if values.pop("scheduler", None) is not None:
        remedy = "learning rates are set by --learning_rate, --warmup_ratio and --gate_learning_rate; remove the block"
        problems.append(Problem("scheduler", "in " + path, remedy))
    fields.check_precision(values, problems)
    stage = fields.zero_stage(values, problems)
    # What is left out here counts as not stated from now on, so that one mistake does not hide another.
    wrong = _leave_out(values, problems)
    zero = values.setdefault("zero_optimization", {})
    values.setdefault("bf16", {}).setdefault("enabled", False)
    if not wrong & {"zero_optimization", "zero_optimization.stage"}:
        zero["stage"] = stage
        problems += fields.zero_problems(zero, on_this_machine)
    resolved: dict[str, Any] = {}
    problems += _resolve_batch(config, values, world_size, resolved, wrong)
    for name, given, flag in (
        ("gradient_clipping", values.get("gradient_clipping"), "max_grad_norm"),
        ("optimizer.params.lr", adam.get("lr"), "learning_rate"),
        ("optimizer.params.weight_decay", adam.get("weight_decay"), "weight_decay"),
    ):
        problems += _contradiction(config, flag, name, given)
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
    _leave_out(values, problems)
    problems += _schema_problems(values, path)
    problems += fields.sum_problems(values)
    if problems:
        raise UserError(problems)
    values.setdefault("steps_per_print", 2**31 - 1)  # we print progress ourselves
    dtype = "bf16" if values["bf16"]["enabled"] else "fp32"
    if dtype == "bf16" and stage >= 2 and values["gradient_accumulation_steps"] > 1:
        # In bf16 a sum over many micro-batches would lose what the last add. Stage 1 does so if asked to, stage 0 cannot.
        values["data_types"] = {"grad_accum_dtype": "fp32", **values.get("data_types", {})}
    return DsConfig(values, resolved, stage, dtype, path, adam, board_dir)


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


def _leave_out(values: dict[str, Any], problems: list[Problem]) -> set[str]:
    """Remove the fields that have a problem; returns their names."""
    wrong = {problem.field for problem in problems}
    for field in wrong:
        *blocks, name = [field] if field in values else field.split(".")
        block: Any = values
        for each in blocks:
            block = block.get(each) if isinstance(block, dict) else None
        if isinstance(block, dict):
            block.pop(name, None)
    return wrong


def _contradiction(config: Config, flag: str, name: str, stated: Any) -> list[Problem]:
    """The problem of a field that contradicts an option that the user gave; none if either is not stated."""
    wanted = getattr(config.train, flag)
    if flag not in config.given or stated in (None, AUTO, wanted):
        return []
    return [Problem(name, stated, f'contradicts --{flag} {wanted}; write "auto" in the file')]


def _resolve_batch(
    config: Config, values: dict[str, Any], world_size: int, resolved: dict[str, Any], wrong: set[str]
) -> Iterator[Problem]:
    """Resolve the batch sizes, which must be the same in file and options. `wrong`: fields that are refused already."""
    product = world_size
    for name, flag in BATCH_SIZES.items():
        if values.get(name, AUTO) == AUTO:
            values[name] = resolved[name] = getattr(config.train, flag)
        yield from _contradiction(config, flag, name, values[name])
        product *= values[name]
    stated = values.get("train_batch_size", AUTO)
    if stated == AUTO:
        values["train_batch_size"] = resolved["train_batch_size"] = product
    elif stated != product and not wrong & BATCH_SIZES.keys():
        factors = " x ".join(str(factor) for factor in (*(values[name] for name in BATCH_SIZES), world_size))
        remedy = f'is not micro-batch x accumulation x ranks = {factors} = {product}; write "auto"'
        yield Problem("train_batch_size", stated, remedy)


def _schema_problems(values: dict[str, Any], path: str) -> list[Problem]:
    """What DeepSpeed itself would refuse, later and with a traceback. The fields concerned are removed from `values`."""
    problems: list[Problem] = []
    while True:  # it stops at the first block that it refuses
        named = {problem.field for problem in problems}
        new = [problem for problem in _deepspeed_refuses(values, path) if problem.field not in named]
        if not new:
            return problems
        problems += new
        _leave_out(values, new)


def _deepspeed_refuses(values: dict[str, Any], path: str) -> list[Problem]:
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    batch = dict.fromkeys(BATCH_SIZES, 1)  # we check these ourselves
    try:
        DeepSpeedConfig(copy.deepcopy({**values, **batch, "train_batch_size": None}))
    except ValidationError as error:
        return [_schema_problem(values, found) for found in error.errors(include_url=False)]
    except Exception as error:  # one of many types, always about this file
        return [Problem("ds_config", path, f"DeepSpeed does not take it: {error}")]
    return []


def _schema_problem(values: dict[str, Any], found: Any) -> Problem:
    names = [str(name) for name in found["loc"]]
    if names and names[0] not in values:  # DeepSpeed names it without its block
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
