"""Turn options into a session: load data and a frozen, sharded model, and check what must agree before training.

All ranks get through setup together or not at all.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunadapt_ds import (
    adapters,
    backbone,
    distributed,
    ds_config,
    initial_adapter,
    label_scale,
    labels,
    latency,
    memory,
    report,
    watchdog,
)
from prunadapt_ds import engine as engines
from prunadapt_ds.batches import Rows, Sampler, refuse_unknown_tokens
from prunadapt_ds.budget import PruningPlan, check_target
from prunadapt_ds.clocks import Clocks
from prunadapt_ds.config import Config
from prunadapt_ds.data import TaskData, doubts, load_metric, tokenize, tokenize_language
from prunadapt_ds.ds_config import DsConfig, resolve_ds_config
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.importance import ScoreAverage
from prunadapt_ds.inputs import agreed_data, agreed_tokens, model_identity, read_inputs, refuse_changed
from prunadapt_ds.models.layouts import most_tokens, with_floors
from prunadapt_ds.models.structure import Structure
from prunadapt_ds.session import Session
from prunadapt_ds.tracking import Tracker


def setup(
    config: Config, saved: Mapping[str, Any] | None = None, *, ds: DsConfig | None = None, tracked: bool = True
) -> Session:
    """Build a session with tokenised data and a frozen, sharded model. All ranks fail together or not at all.

    `saved`: the state in the checkpoint that the run is resumed from; another backbone or other data are refused.
    `ds`: used instead of `--ds_config`.
    `tracked`: False where nothing is trained, so that the run's metrics.jsonl stays as it is.
    """
    distributed.init()
    device = distributed.device()
    ds = ds or agreed_ds_config(config)
    data = read_inputs(config)
    identity = {"data": agreed_data(data)}
    if not data.task.is_language:  # a language model's rows are not known before tokenisation
        refuse_fewer_than_ranks(len(data.train))
    name = config.lora.adapter_name_or_path
    adapter = distributed.together(lambda: initial_adapter.read(name)) if name is not None else None
    distributed.start_deepspeed()
    torch.manual_seed(config.train.seed)
    zero3 = engines.shard_while_loading(ds.values)
    load_libraries(data)
    peak = memory.PeakMemory(device)
    loaded = distributed.together(lambda: load_model(config, ds, data, adapter))
    identity |= distributed.same_on_all_hosts("the model's files", lambda: model_identity(config, adapter))
    distributed.together(lambda: refuse_changed(config, identity, saved))
    timing = timing_of(config, loaded.model)
    table = latency_table(config, loaded, timing, ds, saved) if config.prune.budget == "latency" else None
    loaded.structure = prunable_structure(config, loaded, table)
    loaded.layout = replace(loaded.layout, skips=loaded.structure.skips)
    only_head_inputs = config.prune.method == "tmp"
    lora_targets = adapters.target_modules(loaded.layout, config.lora.target_modules, only_head_inputs=only_head_inputs)
    if adapter is not None:
        lora_targets = distributed.together(
            lambda: initial_adapter.take_over(adapter, loaded, config.lora, config.given, data.task.label_names),
        )
    # Together: a tokenizer that differs on one host may fail there alone.
    train_rows, validation_rows = distributed.together(
        lambda: (
            rows_of(data.train, config, data, loaded),
            {name: rows_of(split, config, data, loaded) for name, split in data.validation.items()},
        )
    )
    identity |= {"tokens": agreed_tokens(config, [train_rows, *validation_rows.values()], saved)}
    distributed.together(lambda: refuse_fewer_than_ranks(len(train_rows)))
    scale = label_scale.of_training(data, loaded, saved)
    if saved is None:  # later it would be too late to take another
        label_scale.refuse_dtype(scale, config.output.export_dtype)
    if not scale.fits(getattr(torch, loaded.stored_dtype)):
        loaded.notes.append(f"exports are in float32: {loaded.stored_dtype} could not hold these labels' unit")
    train_rows = train_rows.with_labels(scale.standardised(train_rows.labels))
    if loaded.known_classes:
        label_scale.unfold(scale, loaded)
    sampler = sampler_of(config, ds, train_rows)
    steps = config.train.max_steps
    total = steps if steps > 0 else max(1, round(config.train.num_train_epochs * sampler.steps_per_epoch))
    session = Session(
        config=config,
        ds=ds,
        device=device,
        data=data,
        backbone=loaded,
        train_rows=train_rows,
        validation_rows=validation_rows,
        sampler=sampler,
        total_steps=total,
        tracker=tracker_of(config, ds, total, saved, tracked=tracked),
        clocks=Clocks(on_cpu=device.type == "cpu"),
        memory=memory.MemoryMarks(peak),
        plan=PruningPlan.dense(loaded.structure),
        present=PruningPlan.dense(loaded.structure),
        lora_targets=lora_targets,
        zero3=zero3,
        report=report.empty(),
        scores=ScoreAverage(config.prune.score_ema),
        identity=identity,
        timing=timing,
        latency=table,
        initial_adapter=adapter,
        label_scale=scale,
    )
    announce(session)
    return session


def agreed_ds_config(config: Config) -> DsConfig:
    """Resolve `--ds_config` for all ranks, which may be on different kinds of machine: "auto" is bf16 if all are fast at it.

    Collective. Raises UserError on all ranks.
    """
    fast = distributed.true_on_all_ranks(ds_config.fast_bf16())
    return distributed.together(lambda: resolve_ds_config(config, distributed.world_size(), lambda: fast))


def load_libraries(data: TaskData) -> None:
    """Import early what rank 0 needs for measures and plots: it then neither counts as the model's memory nor delays them."""
    if distributed.rank() == 0:
        importlib.import_module("matplotlib.figure")
        if not data.task.is_language:
            load_metric(data.task.name)


def load_model(
    config: Config, ds: DsConfig, data: TaskData, adapter: initial_adapter.InitialAdapter | None = None
) -> backbone.Backbone:
    """Load the frozen backbone, sharded under ZeRO-3, with dropout and recomputation as configured. Raises UserError.

    `adapter`: the one that the run starts from, whose head may take the place of the model's.
    """
    loaded = backbone.load(
        config.model.model_name_or_path,
        num_labels=data.task.num_labels,
        label_names=data.task.label_names,
        is_regression=data.task.is_regression,
        dtype=ds.torch_dtype,
        device=distributed.device(),
        seq_length=config.data.max_seq_length,
        trust_remote_code=config.model.trust_remote_code,
        is_language=data.task.is_language,
    )
    keeps_head = adapter is None or not initial_adapter.heads(adapter, loaded)
    if keeps_head and labels.reorder_head(loaded, loaded.known_classes, data.task.label_names):
        names = ", ".join(loaded.known_classes)
        loaded.notes.append(f"its head knew the classes as {names}, and was reordered to match the task")
    if not config.train.dropout:
        backbone.no_dropout(loaded.model)
    if config.train.gradient_checkpointing:
        backbone.check_recomputation(loaded.model)
        loaded.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return loaded


def prunable_structure(config: Config, loaded: backbone.Backbone, table: dict[str, Any] | None) -> Structure:
    """The model's structure with this run's floors and, with --budget latency, its measured times.

    Raises UserError if the target is beyond what the floors leave to cut.
    """
    prune = config.prune
    structure = with_floors(loaded.family, loaded.structure, loaded.model.config, prune)
    if structure.skips and "padded" in (config.output.export_formats or ()):
        remedy = "zeros cannot represent removed layers, which --uniform may choose; leave out one of the two"
        raise UserError(Problem("export_formats", "padded", remedy))
    if table is not None:
        structure = latency.with_times(structure, loaded.layout, latency.LatencyTable.from_dict(table))
    check_target(structure, prune.target_sparsity or 0.0, prune.budget, prune.target_speedup)
    return structure


def rows_of(dataset: Any, config: Config, data: TaskData, loaded: backbone.Backbone) -> Rows:
    """Tokenise a split. Raises UserError for tokens that the model does not know."""
    longest = config.data.max_seq_length
    if data.task.is_language:
        rows = Rows(tokenize_language(dataset, loaded.tokenizer, longest), loaded.tokenizer)
    else:
        rows = Rows(tokenize(dataset, loaded.tokenizer, longest), loaded.tokenizer)
    refuse_unknown_tokens(config.model.model_name_or_path, loaded.model, rows)
    return rows


def sampler_of(config: Config, ds: DsConfig, train_rows: Rows) -> Sampler:
    """The sampler, which decides which rank sees which sample when."""
    return Sampler(
        num_samples=len(train_rows),
        micro_batch_size=ds.values["train_micro_batch_size_per_gpu"],
        accumulation_steps=ds.values["gradient_accumulation_steps"],
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=config.train.seed,
        lengths=tuple(train_rows.lengths) if config.train.group_by_length else (),
    )


def refuse_fewer_than_ranks(count: int) -> None:
    """Every rank needs a training example of its own. Raises UserError."""
    ranks = distributed.world_size()
    if count < ranks:
        remedy = f"fewer than the {ranks} ranks; start fewer ranks, or give more data"
        raise UserError(Problem("training examples", count, remedy))


def timing_of(config: Config, model: nn.Module) -> dict[str, int]:
    """How latency is measured, for the table and for the report. Raises UserError for more tokens than the model takes."""
    asked = {"batch_size": config.output.latency_batch_size, "seq_length": config.output.latency_seq_length}
    timing = {**latency.SETTING, **{name: number for name, number in asked.items() if number is not None}}
    most = most_tokens(model)
    if most is not None and timing["seq_length"] > most:
        if asked["seq_length"] is not None:
            raise UserError(
                Problem("latency_seq_length", timing["seq_length"], f"the model takes at most {most} tokens")
            )
        timing["seq_length"] = most
    return timing


def latency_table(
    config: Config, loaded: backbone.Backbone, timing: dict[str, int], ds: DsConfig, saved: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The table of --budget latency: rank 0 measures it for all; a resumed run keeps the one it began with."""
    if saved is not None:
        return saved["latency"]
    watchdog.rest()
    device = distributed.device()
    return distributed.on_rank_0(
        "timing blocks of the model",
        lambda: latency.measure(
            loaded.model,
            loaded.layout,
            batch_size=timing["batch_size"],
            seq_length=timing["seq_length"],
            neuron_multiple=config.prune.neuron_multiple,
            dtype=ds.torch_dtype,
            device=device,
            name=distributed.device_name(device),
        ).to_dict(),
    )


def tracker_of(
    config: Config, ds: DsConfig, total_steps: int, saved: Mapping[str, Any] | None, *, tracked: bool
) -> Tracker:
    """Create the tracker; only rank 0's writes. Raises PrunadaptError on all ranks if metrics.jsonl cannot be opened."""
    folder = Path(config.output.output_dir)
    found = [Tracker(folder, total_steps, enabled=False)]

    def open_files() -> None:
        found[0] = Tracker(
            folder,
            total_steps,
            enabled=True,
            records=not config.prune.score_only,
            step=saved["step"] if saved else 0,
            metrics_bytes=saved["metrics_bytes"] if saved else 0,
            board_dir=Path(ds.board_dir) if ds.board_dir else None,
        )

    if tracked:
        distributed.on_rank_0("opening metrics.jsonl", open_files)
    return found[0]


def _cut_rows(session: Session) -> str | None:
    """A note on how many training rows reach the maximum length, or None if hardly any do: what is longer is truncated."""
    if session.data.task.is_language and "text" in session.data.train.column_names:
        return None  # a text is cut into blocks, and all of it is used
    longest, rows = session.config.data.max_seq_length, session.train_rows
    full = sum(length >= longest for length in rows.lengths)
    if full < len(rows) / 100:
        return None
    what = "the beginnings of prompts, then the ends of answers" if session.data.task.is_language else "what follows"
    return f"{full} of {len(rows)} training rows fill --max_seq_length {longest}; longer ones lose {what}"


def announce(session: Session) -> None:
    """Print what will happen, and what the "auto" fields became."""
    config, ds, say = session.config, session.ds, session.tracker.say
    if config.uses_sample:
        say(
            "No task was named, so this is the built-in sample, a generated one: for real work name --model_name_or_path and "
            "--task_name (with --data_dir for local GLUE files), or --train_file and --validation_file."
        )
    if config.data.train_file and not session.data.task.is_language:
        names = session.data.task.label_names
        kind = f"{len(names)} classes ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"
        regression = "labels with decimal points, so this is a regression (for classes, pass --problem_type)"
        stated = "a regression" if config.data.problem_type else regression
        say(f"{config.data.train_file}: {kind if names else stated}")
        for doubt in doubts(session.data, config.data.problem_type):
            say(f"warning: {doubt}")
    resolved = ", ".join(f"{name}={value}" for name, value in ds.resolved.items()) or "nothing"
    say(f"{ds.path}: ZeRO stage {ds.stage}, {ds.dtype}, {distributed.world_size()} ranks; auto: {resolved}")
    for note in session.backbone.notes:
        say(note)
    if longer := _cut_rows(session):
        say(longer)
    say(f"peak learning rate {session.learning_rate:.2g}, {session.total_steps} steps")
    if config.prune.uniform and not session.backbone.family.heads.config_fields:
        whole = "neurons and whole layers are cut" if session.backbone.layout.skips else "neurons are cut"
        name = session.backbone.family.model_type
        say(f"--uniform: {whole}, but no single heads: the stock configuration of {name} cannot state fewer")
    if session.latency is not None and session.latency["clock"] == "cpu":
        say("this machine is busy: blocks were timed in CPU seconds on one thread, not in wall-clock time")
    session.tracker.text("config", json.dumps(config.to_dict(), indent=2))
    session.tracker.text("ds_config", json.dumps(ds.values, indent=2))
