"""What an earlier run left in the output folder: whether it was this run, and where this one goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunadapt_ds import checkpoint, distributed, graphs
from prunadapt_ds.checkpoint import Checkpoint, Damaged, Unread
from prunadapt_ds.config import Config
from prunadapt_ds.ds_config import DsConfig
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.files import unless_damaged
from prunadapt_ds.inputs import content_of, refuse_changed
from prunadapt_ds.setup import agreed_ds_config

# Options that may change when a run is resumed: because they do not change what it computes ...
FREE = {
    "trust_remote_code",
    "per_device_eval_batch_size",
    "eval_steps",
    "logging_steps",
    "output_dir",
    "checkpoint_steps",
    "save_total_limit",
    "resume",
}
# ... because the content that they name is compared instead of the name ...
BY_CONTENT = {"model_name_or_path", "adapter_name_or_path", "data_dir", "train_file", "validation_file"}
# ... or because what they resolve to, together with the ds_config, is compared.
RESOLVED = {
    "ds_config",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "learning_rate",
    "weight_decay",
}
EXPORT_OPTIONS = {"export_formats", "export_dtype"}
LATENCY = "latency.json"
LEFT_BEHIND = ("report.json", "report.md", "report.html", "plan.json", "predictions.jsonl", LATENCY)


@dataclass
class Start:
    """How a run begins: from scratch, from a checkpoint, or not at all because it is complete."""

    options: dict[str, Any]  # as requested now: the ds_config may be edited while the run goes on
    checkpoint: Checkpoint | None = None
    finished: dict[str, Any] | None = None  # the report of the same run, if it is complete
    notes: list[str] = field(default_factory=list)

    @property
    def saved(self) -> dict[str, Any] | None:
        return self.checkpoint.state if self.checkpoint else None


def root_of(config: Config) -> Path:
    return Path(config.output.output_dir) / "checkpoints"


def options(config: Config, ds: DsConfig) -> dict[str, Any]:
    """The requested options by name, as far as they decide what the run computes. `ds`: its resolved ds_config."""
    found = {name: value for name, value in config.by_name().items() if name not in FREE | BY_CONTENT | RESOLVED}
    found |= {
        "train_batch_size": ds.values["train_batch_size"],
        "bf16": ds.dtype == "bf16",
        "max_grad_norm": ds.values["gradient_clipping"],
        "learning_rate": ds.adam.get("lr", config.train.learning_rate),
        "weight_decay": ds.adam.get("weight_decay", config.train.weight_decay),
        "betas": ds.adam.get("betas"),
        "eps": ds.adam.get("eps"),
    }
    return json.loads(json.dumps(found))


def names(config: Config) -> dict[str, Any]:
    given = config.by_name()
    return {name: given[name] for name in sorted(BY_CONTENT)}


def changes(now: Mapping[str, Any], before: Mapping[str, Any], where: str) -> list[Problem]:
    """One problem for every option that has changed."""
    remedy = "the run in {} began with {!r}{}; use that, name another --output_dir, or start over with --resume never"
    product = {"train_batch_size": " (ranks x --per_device_train_batch_size x --gradient_accumulation_steps)"}
    return [
        Problem(name, value, remedy.format(where, before[name], product.get(name, "")))
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def find(config: Config) -> Start:
    """Decide from `--resume` and the output folder how the run begins. Collective. Raises UserError on all ranks.

    Only rank 0 looks, so that no two ranks can find different things.
    """
    ds = agreed_ds_config(config)
    distributed.same_on_all_ranks("what the options and the DeepSpeed file ask for", _digest(config, ds))
    return distributed.on_rank_0("reading the output folder", lambda: _find(config, options(config, ds)))


def _digest(config: Config, ds: DsConfig) -> str:
    """sha256 of what all ranks must agree on: files on the disks of different hosts may differ. Paths are left out."""
    own = BY_CONTENT | {"ds_config", "output_dir", "resume"}
    alike = {name: value for name, value in config.by_name().items() if name not in own}
    return hashlib.sha256(json.dumps([alike, _without_paths(ds.values), ds.adam], sort_keys=True).encode()).hexdigest()


def _without_paths(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: _without_paths(value) for name, value in values.items() if not name.endswith("_path")}


def _find(config: Config, asked: dict[str, Any]) -> Start:
    if config.prune.score_only:
        return Start(asked)
    _refuse_foreign_files(Path(config.output.output_dir))
    if config.output.resume == "never":
        return Start(asked)
    if config.output.resume != "auto":
        _refuse_another_run(Path(config.output.output_dir), asked)
        found, damaged = _given(Path(config.output.resume))
        _refuse_other_inputs(Path(config.output.output_dir), found, names(config))
        start = Start(asked, _as_if_here(found, Path(config.output.output_dir)), notes=damaged)
    else:
        finished = _finished(Path(config.output.output_dir), asked)
        if finished is not None:
            _refuse_other_content(Path(config.output.output_dir), config)
            return Start(asked, finished=finished)
        newest, damaged = _newest(root_of(config))
        start = Start(asked, newest, notes=damaged)
    if start.checkpoint is None:
        return start
    if problems := changes(asked, start.checkpoint.state["options"], str(start.checkpoint.folder)):
        raise UserError(problems)
    return start


def _refuse_foreign_files(output_dir: Path) -> None:
    """A run removes what an earlier one left, but nothing in a folder where none has been. Raises UserError."""
    left_by_a_run = (output_dir / "run.json").is_file() or "status" in unless_damaged(output_dir / "report.json")
    if left_by_a_run or checkpoint.listed(output_dir / "checkpoints"):
        return
    exports = [f"exports/{kind}" for kind in graphs.ALL_KINDS]
    written = [name for name in (*LEFT_BEHIND, *exports) if (output_dir / name).exists()]
    metrics = output_dir / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size > 0:  # a run that could not begin leaves an empty one
        written.append(metrics.name)
    if written:
        remedy = f"holds {', '.join(written)} of something else than a run, which this run would replace; name another"
        raise UserError(Problem("output_dir", str(output_dir), remedy))


def _refuse_other_content(output_dir: Path, config: Config) -> None:
    """A complete run answers for the data and the models that it was made with alone. Raises UserError."""
    before = unless_damaged(output_dir / "run.json")
    if isinstance(before.get("identity"), dict):
        refuse_changed(config, content_of(config), before)
    elif problems := changes(names(config), before, str(output_dir)):  # left by an older version
        raise UserError(problems)


def _refuse_another_run(output_dir: Path, asked: Mapping[str, Any]) -> None:
    """A run that is resumed from elsewhere must not take over the output folder of another run. Raises UserError."""
    if problems := changes(asked, unless_damaged(output_dir / "run.json"), str(output_dir)):
        raise UserError(problems)


def _refuse_other_inputs(output_dir: Path, found: Checkpoint, now: Mapping[str, Any]) -> None:
    """A run that is resumed from elsewhere must not take over the folder of a run on another model or other data.

    `now`: the present names of model and data, which may have moved since. Raises UserError.
    """
    if found.run_dir.resolve() == output_dir.resolve():
        return
    before, theirs = unless_damaged(output_dir / "run.json"), found.state.get("names") or {}
    remedy = "the run in {} has {!r}, the checkpoint {!r}; name another --output_dir"
    if problems := [
        Problem(name, value, remedy.format(output_dir, before[name], value))
        for name, value in theirs.items()
        if name in before and before[name] not in (value, now.get(name))
    ]:
        raise UserError(problems)


def _as_if_here(found: Checkpoint, output_dir: Path) -> Checkpoint:
    """The checkpoint as it would be in `output_dir`: the lines of metrics.jsonl before it stay with the run that wrote them."""
    if found.run_dir.resolve() == output_dir.resolve():
        return found
    return dataclasses.replace(found, state={**found.state, "metrics_bytes": 0})


def _newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Like `checkpoint.newest`, but raises UserError if there are checkpoints and none is intact: a run that started over
    would delete them."""
    try:
        found, damaged = checkpoint.newest(root)
    except Unread as error:
        raise _refuse_unread("auto", error) from error
    if found is None and damaged:
        why = ", ".join(line.removesuffix("; skipped") for line in damaged)
        remedy = f"no checkpoint is intact ({why}); bring one back, or start over with --resume never"
        raise UserError(Problem("resume", "auto", remedy))
    return found, damaged


def _refuse_unread(asked: str, error: Unread) -> UserError:
    remedy = (
        f"{error}; nothing was changed: try again where it can be read, name an older one with --resume DIR, "
        "or start over with --resume never"
    )
    return UserError(Problem("resume", asked, remedy))


def _given(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint in `folder`, or the newest intact one below it, and a line about each that was skipped."""
    if not folder.exists():
        raise UserError(
            Problem("resume", str(folder), "there is no such folder; say auto, never, or the folder of a run")
        )
    passed_over: list[str] = []
    try:
        if (folder / checkpoint.STATE).exists():
            return checkpoint.read(folder), []
        for root in (folder, folder / "checkpoints"):
            found, damaged = checkpoint.newest(root)
            passed_over += damaged
            if found is not None:
                return found, passed_over
    except Damaged as error:
        raise UserError(Problem("resume", str(folder), f"the checkpoint is damaged: {error}; name another")) from error
    except Unread as error:
        raise _refuse_unread(str(folder), error) from error
    why = f" ({', '.join(line.removesuffix('; skipped') for line in passed_over)})" if passed_over else ""
    raise UserError(Problem("resume", str(folder), f"there is no intact checkpoint{why}; name the folder of one"))


def _finished(output_dir: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a complete run in `output_dir`, or None.

    Raises UserError if that run was another one, OSError if the report cannot be read.
    """
    report = unless_damaged(output_dir / "report.json")
    if report.get("status") != "complete":
        return None
    try:
        before = json.loads((output_dir / "run.json").read_text())
        problems = _answered_by_export(changes(asked, before, str(output_dir)), output_dir)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        remedy = "holds a complete run of unknown options; name another folder, or overwrite it with --resume never"
        problems = [Problem("output_dir", str(output_dir), remedy)]
    if problems:
        raise UserError(problems)
    return report


def _answered_by_export(problems: list[Problem], output_dir: Path) -> list[Problem]:
    """If only the requested exports differ, name the command that makes them from the complete run instead of training again."""
    given = {p.field: p.value for p in problems}
    formats = [kind for kind in given.get("export_formats") or () if kind != "compact"]
    words = (["--export_formats", *formats] if formats else []) + (
        ["--export_dtype", given["export_dtype"]] if given.get("export_dtype") else []
    )
    made_afterwards = bool(formats) and "adapter" not in formats  # compact and adapter are written by the run alone
    if not made_afterwards or not given.keys() <= EXPORT_OPTIONS:
        return problems
    command = shlex.join(["prunadapt", "export", "--run_dir", str(output_dir), *words])
    remedy = f"this run is complete; write other exports of it: {command}"
    return [dataclasses.replace(problem, remedy=remedy) for problem in problems]
