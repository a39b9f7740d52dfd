"""The state of a run, the engine around its model, and the evaluation of that model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds import (
    adapters,
    backbone,
    distributed,
    gates,
    initial_adapter,
    inventory,
    label_scale,
    memory,
    state,
    watchdog,
    zero_costs,
)
from prunadapt_ds import engine as engines
from prunadapt_ds.batches import Rows, Sampler
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.clocks import Clocks
from prunadapt_ds.config import Config
from prunadapt_ds.data import TaskData, measures_of
from prunadapt_ds.ds_config import DsConfig
from prunadapt_ds.faults import fault_point
from prunadapt_ds.importance import CRITERIA, FORWARD, Recorder, ScoreAverage
from prunadapt_ds.initial_adapter import InitialAdapter
from prunadapt_ds.label_scale import OWN_UNIT, LabelScale
from prunadapt_ds.logits import predict
from prunadapt_ds.memory import MemoryMarks
from prunadapt_ds.models.structure import layers_of
from prunadapt_ds.report import LIVE_PARTS
from prunadapt_ds.schedule import default_learning_rate
from prunadapt_ds.shrink import resize_sharded
from prunadapt_ds.token_teacher import TokenTeacher
from prunadapt_ds.tracking import Tracker
from prunadapt_ds.weight_average import WeightAverage


@dataclass
class Session:
    """Everything that a run holds from setup to the report."""

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
    clocks: Clocks
    memory: MemoryMarks
    plan: PruningPlan  # what was decided
    present: PruningPlan  # what the model physically holds
    lora_targets: list[str]
    zero3: Any  # keeps transformers' weak reference to the ds_config alive
    report: dict[str, Any]
    recorder: Recorder | None = None
    rank_per_layer: dict[int, int] = field(default_factory=dict)
    engine: Any = None
    teacher: Tensor | TokenTeacher | None = None  # its logits [N, C] on the training set, or its files of tokens
    average: WeightAverage = field(default_factory=WeightAverage)  # of the dense phase, until it has become the teacher
    step: int = 0  # optimizer steps done
    scores: ScoreAverage | None = None
    losses: list[Tensor] = field(default_factory=list)  # [3] of each step since the last log line, see step.train_step
    rebuilt: dict[int, bool] = field(default_factory=dict)  # by decision step, whether timing favoured a rebuild
    options: dict[str, Any] = field(default_factory=dict)  # by which a run is recognised; see earlier_run.py
    identity: dict[str, str] = field(default_factory=dict)  # sha256: "data", "tokens", "backbone", "adapter"
    timing: dict[str, int] = field(default_factory=dict)  # how latency is measured: batch_size, seq_length, repeats
    initial_adapter: InitialAdapter | None = None  # that the run starts from
    label_scale: LabelScale = OWN_UNIT  # in which train_rows' labels and the model's answers are
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
    def eval_batch_size(self) -> int:
        return self.config.eval_batch_size(self.sampler.micro_batch_size)

    @property
    def is_shrunk(self) -> bool:
        return self.present.hash != PruningPlan.dense(self.backbone.structure).hash

    def note_peak(self) -> None:
        """Record the highest memory of any rank since the last mark; the next one starts here. Collective."""
        self.memory.note_peak(is_shrunk=self.is_shrunk)

    def release_engine(self) -> Any:
        """Return the engine and drop the session's reference to it, so that the caller holds the only one."""
        engine, self.engine = self.engine, None
        return engine

    def live_parts_now(self) -> dict[str, int]:
        """Bytes this rank holds: parameters, optimizer state, and the most that a watched step saved for its backward."""
        held = memory.parameter_bytes(self.model), state.optimizer_bytes(self.engine), self.memory.activation_bytes
        return dict(zip(LIVE_PARTS, held, strict=True))

    def live(self) -> int:
        """The sum of `live_parts_now`."""
        return sum(self.live_parts_now().values())

    def sent_in_a_step(self) -> int:
        """Bytes that a rank sends to others in an optimizer step of the current model, by the planner's formulas."""
        return zero_costs.sent_bytes(inventory_of(self), self.ds, distributed.world_size(), self.config)

    def note_live(self) -> None:
        """Record what the ranks hold now, and what one sends in a step. Collective."""
        self.memory.note_live(self.live_parts_now(), self.sent_in_a_step(), is_shrunk=self.is_shrunk)


def add_trainables(session: Session, cut_to: PruningPlan | None = None) -> None:
    """Add LoRA and gates as the method requires, and build the engine. Collective.

    `cut_to`: the plan to which the model is cut before that, if a run that has shrunk is resumed.
    """
    config, loaded = session.config, session.backbone
    targets = still_there(loaded.model, session.lora_targets)
    adapters.prepare(loaded.model, loaded.layout, targets, config, session.rank_per_layer)
    if session.initial_adapter is not None:
        brings_head = initial_adapter.load(session.initial_adapter, loaded, session.data.task.label_names)
        if brings_head:
            label_scale.unfold(session.label_scale, loaded)
    if config.prune.method == "prunadapt":
        attach_gates(session, config.prune.criterion)
    if cut_to is not None:
        resize_sharded(loaded.model, loaded.layout, cut_to)
        session.present = cut_to
        if session.recorder is not None:
            session.recorder.narrow(cut_to.mask())
    session.engine = build_engine(session)


def still_there(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the projections that a cut before training has left in the model."""
    modules = dict(model.named_modules())
    return [name for name in names if hasattr(modules.get(name), "weight")]


def attach_gates(session: Session, criterion: str) -> None:
    """Attach gates to every sub-layer, with a recorder of what `criterion` reads."""
    loaded, config = session.backbone, session.config
    session.recorder = Recorder(
        loaded.structure.num_units,
        activations=config.prune.save_scores
        or config.prune.score_only
        or bool(FORWARD.keys() & set(CRITERIA[criterion].reads)),
        device=session.device,
        seed=config.train.seed,
    )
    gates.attach(loaded.model, loaded.layout, loaded.structure, session.recorder)


def build_engine(session: Session) -> Any:
    config, ds = session.config, session.ds
    defaults = {k: v for k, v in ds.adam.items() if v is not None}
    groups = engines.parameter_groups(
        session.model,
        session.backbone.task_head_names,
        learning_rate=session.learning_rate,
        gate_learning_rate=config.prune.gate_learning_rate,
        weight_decay=defaults.get("weight_decay", config.train.weight_decay),
    )
    start = session.clocks.now()
    blocks = [block for _, block in own_blocks(session.backbone)]
    fault_point(f"build-{session.step}")
    engine = engines.build(session.model, groups, ds.values, ds.adam, blocks=blocks)
    engine.train()
    session.clocks.build = distributed.dist_max(session.clocks.now() - start)
    return engine


def own_blocks(loaded: backbone.Backbone) -> list[tuple[int, nn.Module]]:
    """The blocks that run once per pass, with their index; none if layers are shared."""
    return [] if loaded.family.shares_layers else list(layers_of(loaded.model, loaded.layout))


def inventory_of(session: Session) -> dict[str, inventory.Size]:
    """Sizes of the parameters that the model holds now, by name."""
    return inventory.sizes(session.model, own_blocks(session.backbone), session.backbone.layout.layers)


def evaluate(session: Session) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the task's measures of the model as it is, and what `answers` gave for the validation sets. Collective."""
    with session.clocks.timed("evaluation"):
        logits = answers(session, session.validation_rows)
        with watchdog.resting():  # rank 0 may take long over many examples
            return distributed.on_rank_0("measuring", lambda: measures(session, logits)), logits


def answers(session: Session, sets: Mapping[str, Rows]) -> dict[str, Tensor]:
    """What `logits.predict` gives for the rows of each set, in the labels' own unit. Collective."""
    found = {
        name: predict(session.engine, rows, session.eval_batch_size, session.device) for name, rows in sets.items()
    }
    return {name: session.label_scale.restored(logits) for name, logits in found.items()}


def measures(session: Session, logits: dict[str, Tensor]) -> dict[str, float]:
    """The task's measures of logits by validation set. For one rank: the others need not load the libraries."""
    rows = session.validation_rows
    return measures_of(
        session.data.task, {n: logits[n].numpy() for n in rows}, {n: rows[n].labels.numpy() for n in rows}
    )
