"""What a run holds on to: everything up to an engine that can train, and its evaluation.

All ranks get through setup together or not at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from prunadapt_ds import adapters, backbone, distributed, gates, given_adapter, latency, memory, report, watchdog
from prunadapt_ds import engine as engines
from prunadapt_ds.batches import Rows, Sampler
from prunadapt_ds.budget import PruningPlan, max_sparsity
from prunadapt_ds.config import Config
from prunadapt_ds.data import (
    TaskData,
    compute_metrics,
    compute_perplexity,
    load_language,
    load_task,
    tokenize,
    tokenize_language,
)
from prunadapt_ds.ds_config import DsConfig, resolve_ds_config
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.evaluate import predict
from prunadapt_ds.importance import CRITERIA, FORWARD, Recorder, ScoreAverage
from prunadapt_ds.models.families import most_tokens, uniform_floors
from prunadapt_ds.models.structure import Structure, layers_of, with_outer_floor
from prunadapt_ds.resize import resize
from prunadapt_ds.schedule import default_learning_rate
from prunadapt_ds.shrink import StepTimes
from prunadapt_ds.teacher import WeightAverage
from prunadapt_ds.token_teacher import TokenTeacher
from prunadapt_ds.tracking import Tracker

PHASES = ("dense", "prune", "recover")
# Timers whose sum is train_s.
TRAINING = (*(f"{phase}_phase" for phase in PHASES), "teacher", "importance", "shrink", "checkpoint")


@dataclass
class Session:
    """What a run holds on to from setup to the report."""

    config: Config
    ds: DsConfig
    device: torch.device
    data: TaskData
    backbone: backbone.Backbone
    train_rows: Rows
    validation_rows: dict[str, Rows]
    sampler: Sampler
    total_steps: int
    tracker: Tracker
    peak: memory.PeakMemory
    plan: PruningPlan  # what was decided
    present: PruningPlan  # what the model physically holds
    lora_targets: list[str]
    zero3: Any  # keeps transformers' weak reference to the ds_config alive
    report: dict[str, Any]
    recorder: Recorder | None = None
    rank_per_layer: dict[int, int] = field(default_factory=dict)
    engine: Any = None
    build_seconds: float = 0.0  # of the last engine, by `clock`
    teacher: Tensor | TokenTeacher | None = None  # its logits [N, C] on the training set, or where its words are
    average: WeightAverage = field(default_factory=WeightAverage)  # of the dense phase, until it has become the teacher
    activation_bytes: int = 0
    live_bytes: dict[str, int] = field(default_factory=dict)  # "dense", "after_shrink": most of any rank
    peak_bytes: dict[str, int] = field(default_factory=dict)  # "dense_phase", "after_shrink"
    watched_length: int = 0  # tokens of the longest sample in a step whose activations were counted with this engine
    rebuild_seconds: float = 0.0  # of the last shrink, all of it, by `clock`
    step_times: StepTimes = field(default_factory=StepTimes)
    step_cpu_times: StepTimes = field(default_factory=StepTimes)
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)  # of this process, all threads
    step: int = 0  # optimizer steps done
    scores: ScoreAverage | None = None
    losses: list[Tensor] = field(default_factory=list)  # of this rank's share of the steps since the last log line
    rebuilt: dict[int, bool] = field(default_factory=dict)  # by decision step, whether the clock spoke for a rebuild
    options: dict[str, Any] = field(default_factory=dict)  # by which a run is known again; see resume.py
    identity: dict[str, str] = field(default_factory=dict)  # sha256: "data"; on rank 0 "backbone", "adapter"
    timing: dict[str, int] = field(default_factory=dict)  # how latency is measured: batch_size, seq_length, repeats
    given: given_adapter.GivenAdapter | None = None  # the adapter it starts from
    latency: dict[str, Any] | None = None  # the table of --budget latency, see LatencyTable

    @property
    def model(self) -> Any:
        return self.backbone.model

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output.output_dir)

    @property
    def learning_rate(self) -> float:
        """Peak rate of adapters and head: the ds_config's, or the option's, or the default for this model's width."""
        asked = self.ds.adam.get("lr") or self.config.train.learning_rate
        is_full = self.config.prune.method == "full"
        return asked or default_learning_rate(self.model.config.hidden_size, is_full=is_full)

    @property
    def is_shrunk(self) -> bool:
        return self.present.hash != PruningPlan.dense(self.backbone.structure).hash

    def note_peak(self) -> None:
        """Write down the highest memory of any rank since the engine was built; the next mark starts here. Collective."""
        peak = int(distributed.dist_max(self.peak.bytes()))
        self.peak_bytes["after_shrink" if self.is_shrunk else "dense_phase"] = peak
        self.peak.reset()

    def release_engine(self) -> Any:
        """The engine, which the session forgets: what takes it holds the only reference."""
        engine, self.engine = self.engine, None
        return engine

    def clock(self) -> float:
        """Seconds by which a rebuild is weighed: on a CPU the process's own, as what else runs there stretches all others."""
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    def weighed_times(self) -> StepTimes:
        """What steps took, by `clock`."""
        return self.step_cpu_times if self.device.type == "cpu" else self.step_times

    def live(self) -> int:
        """Bytes this rank holds: parameters, optimizer state, and what the last watched step saved for its backward."""
        return memory.parameter_bytes(self.model) + memory.optimizer_bytes(self.engine) + self.activation_bytes

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what a block takes to `seconds` and `cpu_seconds`."""
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu_start

    def train_seconds(self) -> float:
        """Seconds of training so far: steps, scoring, teacher and rebuilds; no evaluation."""
        return sum(self.seconds.get(name, 0.0) for name in TRAINING)

    def train_cpu_seconds(self) -> float:
        """The same in CPU seconds of this rank: what a busy machine cannot stretch."""
        return sum(self.cpu_seconds.get(name, 0.0) for name in TRAINING)


def setup(
    config: Config, saved: Mapping[str, Any] | None = None, *, ds: DsConfig | None = None, tracked: bool = True
) -> Session:
    """Everything up to a frozen, sharded model and tokenised data. All ranks fail together or not at all.

    `saved`: the state in the checkpoint that the run goes on from; another backbone or other data are refused.
    `ds`: instead of what `--ds_config` says.  `tracked`: leave it out where nothing is trained, to keep the run's metrics.
    """
    distributed.init()
    device = distributed.device()
    ds = ds or distributed.together(lambda: resolve_ds_config(config, distributed.world_size()))
    if distributed.rank() != 0:
        datasets.disable_progress_bars()
    is_language = config.data.task_type == "causal_lm"
    data = distributed.together(
        lambda: load_language(config.data) if is_language else load_task(config.data, config.train.seed)
    )
    identity = {"data": same_data(data)}
    if not is_language:  # whose examples are blocks of tokens, known later
        refuse_fewer_than_ranks(len(data.train))
    distributed.together(lambda: backbone.check(config.model.model_name_or_path))
    adapter = config.lora.adapter_name_or_path
    given = distributed.together(lambda: given_adapter.read(adapter)) if adapter is not None else None
    distributed.start_deepspeed()
    torch.manual_seed(config.train.seed)
    zero3 = engines.shard_while_loading(ds.values)
    peak = memory.PeakMemory(device)
    loaded = distributed.together(
        lambda: backbone.load(
            config.model.model_name_or_path,
            num_labels=data.num_labels,
            label_names=data.label_names,
            is_regression=data.is_regression,
            dtype=torch.bfloat16 if ds.dtype == "bf16" else torch.float32,
            device=device,
            seq_length=config.data.max_seq_length,
            trust_remote_code=config.model.trust_remote_code,
            is_language=is_language,
        )
    )

    if config.prune.uniform:
        loaded.structure = uniform_floors(loaded.family, loaded.structure, config.prune.neuron_multiple)
    loaded.structure = with_outer_floor(loaded.structure, config.prune.keep_in_outer_layers)
    if distributed.rank() == 0:
        identity["backbone"] = backbone.identity(config.model.model_name_or_path)
        identity |= {"adapter": given.identity()} if given is not None else {}
    distributed.together(lambda: refuse_changed(config, identity, saved))
    timing = timing_of(config, loaded.model)
    table = measured(config, loaded, timing, ds, saved) if config.prune.budget == "latency" else None
    if table is not None:
        table_read = latency.LatencyTable.from_dict(table)
        loaded.structure = latency.with_times(loaded.structure, loaded.layout, table_read)
    check_target(config, loaded.structure)
    only_head_inputs = config.prune.method == "tmp"
    lora_targets = adapters.target_modules(loaded.layout, config.lora.target_modules, only_head_inputs=only_head_inputs)
    if given is not None:
        asked = config.given
        lora_targets = distributed.together(lambda: given_adapter.take_over(given, loaded, config.lora, asked))

    def rows(dataset: Any) -> Rows:
        longest = config.data.max_seq_length
        if is_language:
            return Rows(tokenize_language(dataset, loaded.tokenizer, longest), loaded.tokenizer)
        return Rows(tokenize(dataset, loaded.tokenizer, data.task, longest), loaded.tokenizer)

    train_rows = rows(data.train)
    refuse_fewer_than_ranks(len(train_rows))
    sampler = Sampler(
        num_samples=len(train_rows),
        micro_batch_size=ds.values["train_micro_batch_size_per_gpu"],
        accumulation_steps=ds.values["gradient_accumulation_steps"],
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=config.train.seed,
        lengths=tuple(train_rows.lengths) if config.train.group_by_length else (),
    )
    steps = config.train.max_steps
    total = steps if steps > 0 else max(1, round(config.train.num_train_epochs * sampler.steps_per_epoch))
    if not config.train.dropout:
        no_dropout(loaded.model)
    if config.train.gradient_checkpointing:
        if not loaded.model.supports_gradient_checkpointing:
            remedy = f"transformers cannot recompute the blocks of {loaded.family.model_type}; leave it out"
            raise UserError(Problem("gradient_checkpointing", True, remedy))
        loaded.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    session = Session(
        config=config,
        ds=ds,
        device=device,
        data=data,
        backbone=loaded,
        train_rows=train_rows,
        validation_rows={name: rows(split) for name, split in data.validation.items()},
        sampler=sampler,
        total_steps=total,
        tracker=Tracker(
            Path(config.output.output_dir),
            total,
            enabled=tracked and distributed.rank() == 0,
            step=saved["step"] if saved else 0,
            metrics_bytes=saved["metrics_bytes"] if saved else 0,
            board_dir=Path(ds.board_dir) if ds.board_dir else None,
        ),
        peak=peak,
        plan=PruningPlan.dense(loaded.structure),
        present=PruningPlan.dense(loaded.structure),
        lora_targets=lora_targets,
        zero3=zero3,
        report=report.empty(),
        scores=ScoreAverage(config.prune.score_ema),
        identity=identity,
        timing=timing,
        latency=table,
        given=given,
    )
    announce(session)
    return session


def refuse_fewer_than_ranks(count: int) -> None:
    """Every rank needs a training example of its own."""
    ranks = distributed.world_size()
    if count < ranks:
        remedy = f"fewer than the {ranks} ranks; start fewer ranks, or give more data"
        raise UserError(Problem("training examples", count, remedy))


def no_dropout(model: nn.Module) -> None:
    """Switch off the backbone's own dropout: frozen weights need no regulariser, and samples' gradients become exact."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "layerdrop"):  # probabilities of functional dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


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


def measured(
    config: Config, loaded: backbone.Backbone, timing: dict[str, int], ds: DsConfig, saved: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The table of --budget latency: rank 0 measures it for all; a run that goes on keeps the one it began with."""
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
            dtype=torch.bfloat16 if ds.dtype == "bf16" else torch.float32,
            device=device,
            name=distributed.device_name(device),
        ).to_dict(),
    )


def check_target(config: Config, structure: Structure) -> None:
    """A sparsity beyond what can be cut is said before training, not at the last decision."""
    target, most = config.prune.target_sparsity or 0.0, max_sparsity(structure, config.prune.budget)
    if target > most and config.prune.target_speedup is not None:
        remedy = f"more than can be cut from this model; at most {1 / (1 - most):.2f} by what its blocks take here"
        raise UserError(Problem("target_speedup", config.prune.target_speedup, remedy))
    if target > most:
        raise UserError(Problem("target_sparsity", target, f"more than can be cut from this model; at most {most:.4f}"))


def same_data(data: TaskData) -> str:
    """Every rank must hold the same examples: one that fell back to an old cache would train on something else.

    Returns their sha256.
    """
    digest = hashlib.sha256()
    for split in (data.train, *data.validation.values()):
        digest.update(json.dumps(split.to_dict(), sort_keys=True).encode())
    distributed.same_on_all_ranks("the data", digest.hexdigest())
    return digest.hexdigest()


def refuse_changed(config: Config, identity: dict[str, str], saved: Mapping[str, Any] | None) -> None:
    """A run goes on with the backbone, the data and the adapter it began with, wherever they lie now."""
    names = {
        "backbone": ("model_name_or_path", config.model.model_name_or_path),
        "data": _data_option(config),
        "adapter": ("adapter_name_or_path", config.lora.adapter_name_or_path),
    }
    known = names if distributed.rank() == 0 else {"data"}  # of which this rank has a digest
    before = saved["identity"] if saved else identity
    changed = [names[kind] for kind in names if kind in known and before.get(kind) != identity.get(kind)]
    if changed:
        remedy = (
            "its content is not what the checkpoint was made with; bring that back, or start over with --resume never"
        )
        raise UserError([Problem(name, value, remedy) for name, value in changed])


def _data_option(config: Config) -> tuple[str, Any]:
    names = ("train_file", "data_dir", "task_name")
    return next((name, getattr(config.data, name)) for name in names if getattr(config.data, name) or name == names[-1])


def announce(session: Session) -> None:
    """Say what will happen, and what the "auto" fields became."""
    config, ds, say = session.config, session.ds, session.tracker.say
    if config.uses_sample:
        say(
            "Built-in sample: for real work name --model_name_or_path and --task_name "
            "(with --data_dir for local GLUE files), or --train_file and --validation_file."
        )
    resolved = ", ".join(f"{name}={value}" for name, value in ds.resolved.items()) or "nothing"
    say(f"{ds.path}: ZeRO stage {ds.stage}, {ds.dtype}, {distributed.world_size()} ranks; auto: {resolved}")
    for note in session.backbone.notes:
        say(note)
    say(f"peak learning rate {session.learning_rate:.2g}, {session.total_steps} steps")
    if config.prune.uniform and not session.backbone.family.heads.config_fields:
        say(f"--uniform: heads stay; the stock configuration of {session.backbone.family.model_type} cannot say fewer")
    if session.latency is not None and session.latency["clock"] == "cpu":
        say("this machine is busy: blocks were timed by processor seconds on one thread, not by the clock")
    session.tracker.text("config", json.dumps(config.to_dict(), indent=2))
    session.tracker.text("ds_config", json.dumps(ds.values, indent=2))


def add_trainables(session: Session, cut_to: PruningPlan | None = None) -> None:
    """LoRA, gates and head, as the method wants them, and the engine around them.

    `cut_to`: what a dense model must physically become before that, when a run goes on that has shrunk.
    """
    config, loaded = session.config, session.backbone
    method = config.prune.method
    if method == "full":
        loaded.model.requires_grad_(True)
    else:
        adapters.add_lora(
            loaded.model,
            loaded.layout,
            still_there(loaded.model, session.lora_targets),
            r=config.lora.r,
            lora_alpha=config.lora.lora_alpha,
            lora_dropout=config.lora.lora_dropout,
            rank_per_layer=session.rank_per_layer,
        )
    if session.given is not None:
        given_adapter.load(session.given, loaded)
    if config.lora.train_norms:
        train_norms(loaded.model)
    if method == "prunadapt":
        attach_gates(session, config.prune.criterion)
    if cut_to is not None:
        resize(loaded.model, loaded.layout, cut_to, editing=engines.rewriting)
        session.present = cut_to
        if session.recorder is not None:
            session.recorder.narrow(cut_to.mask())
    session.engine = build_engine(session)


def still_there(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the projections that a cut before training has left."""
    modules = dict(model.named_modules())
    return [name for name in names if hasattr(modules.get(name), "weight")]


def train_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            module.requires_grad_(True)


def attach_gates(session: Session, criterion: str) -> None:
    """Gates on every sub-layer, recording what `criterion` reads."""
    loaded, config = session.backbone, session.config
    session.recorder = Recorder(
        loaded.structure.num_units,
        activations=bool(FORWARD.keys() & set(CRITERIA[criterion].reads)) or config.prune.save_scores,
        device=session.device,
        seed=config.train.seed,
    )
    gates.attach(loaded.model, loaded.layout, loaded.structure, session.recorder)


def build_engine(session: Session) -> Any:
    config, ds = session.config, session.ds
    defaults = {k: v for k, v in ds.adam.items() if v is not None}
    groups = engines.parameter_groups(
        session.model,
        session.backbone.head_names,
        learning_rate=session.learning_rate,
        gate_learning_rate=config.prune.gate_learning_rate,
        weight_decay=defaults.get("weight_decay", config.train.weight_decay),
    )
    start = session.clock()
    loaded = session.backbone
    blocks = [] if loaded.family.shares_layers else [block for _, block in layers_of(loaded.model, loaded.layout)]
    engine = engines.build(session.model, groups, ds.values, ds.adam, blocks=blocks)
    engine.train()
    session.build_seconds = distributed.dist_max(session.clock() - start)
    return engine


def eval_batch(session: Session) -> int:
    return session.config.train.per_device_eval_batch_size


def evaluate(session: Session) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The task's measures of the model as it is, and the logits behind them, by validation set."""
    with session.timed("evaluation"):
        logits = {
            name: predict(session.engine, rows, eval_batch(session), session.device)
            for name, rows in session.validation_rows.items()
        }
        watchdog.rest()  # measures may load their libraries first
        return measures(session, logits), logits


def measures(session: Session, logits: dict[str, Tensor]) -> dict[str, float]:
    """All measures of all validation sets, prefixed by the set's name where there are several, and their mean "score"."""
    several = len(session.validation_rows) > 1
    merged: dict[str, float] = {}
    for name in session.validation_rows:
        values = logits[name]
        if session.data.is_language:
            found = compute_perplexity(values.numpy())
        else:
            found = compute_metrics(session.data, values.numpy(), session.validation_rows[name].labels.numpy())
        merged |= {f"{name}/{k}" if several else k: v for k, v in found.items() if k != "score"}
    return {**merged, "score": sum(merged.values()) / len(merged)}
