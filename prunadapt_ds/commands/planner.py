"""Estimates the memory, communication and time that a run needs, from the model's configuration alone.

`inventory` counts what a model of one shape holds, and `zero_costs` derives what that costs under DeepSpeed. This module does
so for the shapes of a whole run, from dense to the last cut, and for every ds_config.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunadapt_ds import backbone, hub, model_folder, tmp
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.config import Config
from prunadapt_ds.ds_config import DsConfig, resolve_ds_config
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.files import read_object
from prunadapt_ds.inventory import Inventory, Skeleton, between, cut_down, skeleton, take_stock
from prunadapt_ds.models.structure import Structure
from prunadapt_ds.schedule import PruningSchedule
from prunadapt_ds.zero_costs import (
    MASTERS,
    MOMENTS,
    Machine,
    accounted_bytes,
    macs_per_step,
    rank_bytes,
    step_seconds,
    traffic,
)

SCORING = "scoring"  # a dense model, of which nothing is trained


def read_config(name: str, num_labels: int, *, is_language: bool, trust_remote_code: bool = False) -> Any:
    """Read the configuration of a hub ID, a folder or a JSON file.

    Raises UserError if there is none, or if training would refuse it.
    """
    from transformers import AutoConfig

    def refuse(remedy: str) -> UserError:
        return UserError(Problem("model_name_or_path", name, remedy))

    labels = {} if is_language else {"num_labels": num_labels}
    path = Path(model_folder.locate(name))
    if not path.exists() and (path.suffix == ".json" or not hub.could_be_id(name)):
        raise refuse("there is no such file or folder")
    values = read_object(path, refuse) if path.is_file() else None
    if values is not None and not isinstance(values.get("model_type"), str):
        raise refuse(
            "has no model_type, so it is not a model's configuration; name a hub ID, a folder or a config.json"
        )
    offline = None if path.exists() else hub.why_offline(name)
    repository, revision = (str(path), None) if path.exists() else hub.split(name)
    try:
        if values is not None:
            found = AutoConfig.for_model(values.pop("model_type"), **{**values, **labels})
        else:
            found = AutoConfig.from_pretrained(
                repository,
                revision=revision or "main",
                trust_remote_code=trust_remote_code,
                local_files_only=bool(offline),
                **labels,
            )
        why = model_folder.untrainable(found.to_dict())
    except Exception as error:  # transformers raises many types of errors for an invalid configuration
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        remedy = f"no configuration can be read there ({reason}); name a hub ID, a folder or a config.json"
        if offline:
            remedy = f"could not be read from the hub ({offline}), nor is it in the local cache; name a config.json"
        raise refuse(remedy) from error
    if why:
        raise refuse(why)
    return found


def plan(
    model_config: Any,
    config: Config,
    machine: Machine,
    files: Sequence[Path],
    *,
    dtype: str = "bf16",
    num_labels: int = 2,
    train_examples: int = 100_000,
) -> dict[str, Any]:
    """The content of `prunadapt plan --json`. Raises UserError as training would."""
    resolved, problems = {}, []
    for file in files:
        train = dataclasses.replace(config.train, ds_config=str(file))
        try:
            resolved[file.name] = resolve_ds_config(
                dataclasses.replace(config, train=train),
                machine.world_size,
                lambda: dtype == "bf16",
                on_this_machine=False,
            )
        except UserError as error:
            problems += [dataclasses.replace(p, field=f"{file.name}: {p.field}") for p in error.problems]
    if problems:
        raise UserError(problems)
    shapes: dict[Any, list[tuple[str, float, Inventory]]] = {}
    for ds in resolved.values():
        if (key := _shape_key(ds)) in shapes:
            continue
        built = skeleton(copy.deepcopy(model_config), config, ds.torch_dtype)
        if config.train.gradient_checkpointing:
            backbone.check_recomputation(built.model)
        shapes[key] = phases(built, config, ds.values["train_micro_batch_size_per_gpu"], num_labels)
    configs = [
        _outcome(name, ds, shapes[_shape_key(ds)], machine, config)
        for name, ds in sorted(resolved.items(), key=lambda item: (item[1].stage, item[0]))
    ]
    able = [c for c in configs if c["fits"]]
    best = min((c["run_s_per_step"] for c in able), default=0.0)
    names = next(iter(shapes.values()))
    dense, last = names[0][2], names[-1][2]
    first = next(stock for phase, _, stock in names if phase != SCORING)
    export_dtype = config.output.export_dtype or backbone.stored_dtype(model_config)
    per_master, sizes = MASTERS + MOMENTS, next(iter(resolved.values())).values
    is_averaged = config.prune.method == "prunadapt" and config.prune.distill_weight > 0
    return {
        "model": {
            "architecture": model_config.model_type,
            "parameters": dense.exported,
            "blocks": built.structure.dense_cost("params"),
            "trainable": first.trainable,
        },
        "machine": {**dataclasses.asdict(machine), "link": machine.link},
        "run": {
            "method": config.prune.method,
            "target_sparsity": names[-1][1],
            "per_device_train_batch_size": sizes["train_micro_batch_size_per_gpu"],
            "max_seq_length": config.data.max_seq_length,
            "gradient_checkpointing": config.train.gradient_checkpointing,
        },
        "macs_per_step": {
            name: macs_per_step(stock, config, sizes["gradient_accumulation_steps"])
            for name, stock in (("dense", first), ("last", last))
        },
        "export_bytes": last.exported * (4 if export_dtype == "float32" else 2),
        "checkpoint_bytes": {"dense": first.trainable * per_master, "last": last.trainable * per_master},
        "teacher_bytes": {  # in host memory, on every rank; a language teacher's predictions are on disk
            "logits": 0 if config.is_language or not is_averaged else 4 * train_examples * num_labels,
            "mean_weights": MASTERS * first.trainable if is_averaged else 0,
        },
        "configs": configs,
        # The first of those within 1 % of the best, which has the lowest stage and sends the least.
        "fastest": next((c["file"] for c in able if c["run_s_per_step"] <= 1.01 * best), None),
    }


def even_counts(
    structure: Structure, share: float, neuron_multiple: int, kinds: Sequence[str] = ("heads", "neurons")
) -> list[int]:
    """Units left in each sub-layer if those of `kinds` all lose the same share of theirs, down to their floors.

    It stands for a plan whose scores are not known yet.
    """
    kept = []
    for s in structure.sublayers:
        step = neuron_multiple if s.kind == "neurons" else 1
        cut = round(share * s.num_units / step) * step if s.kind in kinds else 0
        kept.append(max(s.floor, s.num_units - cut))
    return kept


def plan_of(structure: Structure, counts: Sequence[int]) -> PruningPlan:
    return PruningPlan(structure, tuple(tuple(range(count)) for count in counts))


def plan_for(structure: Structure, target: float, budget: str, neuron_multiple: int) -> PruningPlan:
    """The even plan with the smallest share cut, in steps of 1/10,000, that meets the target sparsity."""

    def counts(ten_thousandths: int) -> list[int]:
        return even_counts(structure, ten_thousandths / 10_000, neuron_multiple)

    wanted = (1 - target) * structure.dense_cost(budget)
    cut = bisect.bisect_left(range(10_000), -wanted, key=lambda n: -structure.cost(budget, counts(n)))
    return plan_of(structure, counts(cut))


def phases(built: Skeleton, config: Config, batch: int, num_labels: int) -> list[tuple[str, float, Inventory]]:
    """(name, sparsity, inventory) before the first cut and after each. Cuts the skeleton in place.

    Only the last shape is actually cut and counted. Those in between are interpolated linearly, as are their sparsities: when
    all layers lose the same share, every size is linear in the units that are left.
    """
    prune, structure = config.prune, built.structure
    dense = take_stock(built, config, batch, num_labels)
    target = prune.target_sparsity or 0.0
    if prune.method == "tmp":
        cut = plan_of(structure, even_counts(structure, tmp.CUT_FRACTION, prune.neuron_multiple, ("heads",)))
    elif prune.method == "prunadapt" and target:
        cut = plan_for(structure, target, prune.budget, prune.neuron_multiple)
    else:
        return [("dense", 0.0, dense)]
    cut_down(built, cut)
    small = take_stock(built, config, batch, num_labels, cut)
    achieved = cut.sparsity(prune.budget)
    if prune.method == "tmp":
        return [(SCORING, 0.0, dense), ("after the cut", achieved, small)]
    steps = PruningSchedule.from_fractions(1000, prune.prune_start, prune.prune_end, prune.num_decisions, 1.0)
    ways = [steps.sparsity(step) for step in steps.decision_steps]
    halfway = [(f"decision {i}", way * achieved, between(dense, small, way)) for i, way in enumerate(ways, 1)]
    return [("dense", 0.0, dense), *halfway[:-1], ("last", achieved, small)]


def _shape_key(ds: DsConfig) -> tuple[str, int]:
    return ds.dtype, ds.values["train_micro_batch_size_per_gpu"]


def _outcome(
    name: str, ds: DsConfig, shapes: list[tuple[str, float, Inventory]], machine: Machine, config: Config
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for phase, sparsity, stock in shapes:
        parts = rank_bytes(stock, ds, machine, recomputes=config.train.gradient_checkpointing)
        sent = traffic(stock, ds, machine, config)
        rows.append(
            {
                "phase": phase,
                "sparsity": sparsity,
                "device_bytes": parts["device"],
                "host_bytes": parts["host"],
                "device_total": sum(parts["device"].values()),
                "host_total": sum(parts["host"].values()),
                "accounted_bytes": accounted_bytes(stock, ds, machine),
                "sent_bytes": sent,
                "seconds": step_seconds(stock, sent, ds, machine, config),
            }
        )
    most = max(row["device_total"] for row in rows)
    # Assumes that half of the run's steps take as long as the dense ones, and half as long as the last.
    trained = [row["seconds"]["total"] for row in rows if row["phase"] != SCORING]
    seconds = (trained[0] + trained[-1]) / 2
    fits = most <= machine.gpu_memory * (1 - machine.reserve)
    return {"file": name, "stage": ds.stage, "dtype": ds.dtype, "fits": fits, "run_s_per_step": seconds, "phases": rows}
