"""The whole run, top to bottom: load, adapt, prune while training, export, prove, report.

The only module that calls all the others. Nothing imports it but the launchers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from prunadapt_ds import adapters, backbone, card, distributed, export, gates, memory, report, tmp
from prunadapt_ds import engine as engines
from prunadapt_ds.batches import Batch, Rows, Sampler
from prunadapt_ds.budget import PruningPlan, decide, max_sparsity
from prunadapt_ds.config import Config, parse
from prunadapt_ds.data import TaskData, compute_metrics, load_task, tokenize
from prunadapt_ds.ds_config import DsConfig, resolve_ds_config
from prunadapt_ds.errors import ParityError, Problem, PrunadaptError, UserError
from prunadapt_ds.evaluate import predict, upcast_parameters
from prunadapt_ds.importance import CRITERIA, STATISTICS, Recorder, ScoreAverage, WindowSums
from prunadapt_ds.models.structure import Structure, full_numel
from prunadapt_ds.objective import sample_losses
from prunadapt_ds.schedule import LearningRateSchedule, PruningSchedule
from prunadapt_ds.tracking import Tracker

PARITY_EXAMPLES = 512  # of each validation set, compared in fp32 where the run itself was not
LATENCY = {"batch_size": 32, "seq_length": 128, "repeats": 20}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what `argv` asks for; returns the process's exit code (see errors.py)."""
    try:
        config = parse(argv)
        run(config)
    except PrunadaptError as error:
        if distributed.rank() == 0:
            print(f"error: {error}" if len(str(error).splitlines()) == 1 else f"errors:\n{error}", file=sys.stderr)
        return error.exit_code
    finally:
        distributed.shutdown()
    return 0


def run(config: Config) -> dict[str, Any]:
    """One training run on the calling rank; returns the report, which rank 0 has written to `output_dir`."""
    session = setup(config)
    if config.prune.method == "tmp":
        prune_once(session)
    add_trainables(session)
    if config.prune.score_only:
        score_only(session)
        return session.report
    fit(session)
    finish(session)
    return session.report


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
    plan: PruningPlan
    lora_targets: list[str]
    zero3: Any  # keeps transformers' weak reference to the ds_config alive
    report: dict[str, Any]
    recorder: Recorder | None = None
    rank_per_layer: dict[int, int] = field(default_factory=dict)
    engine: Any = None
    teacher_logits: Tensor | None = None
    activation_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        return self.backbone.model

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output.output_dir)

    def timed(self, name: str) -> _Timer:
        return _Timer(self.seconds, name)


class _Timer:
    """Adds the seconds a block took to a dictionary."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start


# ---------------------------------------------------------------------------------------------------------- setup


def setup(config: Config) -> Session:
    """Everything up to a frozen, sharded model and tokenised data. All ranks fail together or not at all."""
    distributed.init()
    device = distributed.device()
    ds = distributed.together(lambda: resolve_ds_config(config, distributed.world_size()))
    if distributed.rank() != 0:
        datasets.disable_progress_bars()
    data = distributed.together(lambda: load_task(config.data, config.train.seed))
    same_data(data)
    if len(data.train) < distributed.world_size():
        raise UserError(
            Problem("train_file", len(data.train), f"fewer examples than the {distributed.world_size()} ranks")
        )
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
        )
    )

    check_target(config, loaded.structure)
    only_head_inputs = config.prune.method == "tmp"
    lora_targets = adapters.target_modules(loaded.layout, config.lora.target_modules, only_head_inputs=only_head_inputs)

    def rows(dataset: Any) -> Rows:
        tokens = tokenize(dataset, loaded.tokenizer, data.task, config.data.max_seq_length)
        return Rows(tokens, loaded.tokenizer)

    train_rows = rows(data.train)
    sampler = Sampler(
        num_samples=len(train_rows),
        micro_batch_size=ds.values["train_micro_batch_size_per_gpu"],
        accumulation_steps=ds.values["gradient_accumulation_steps"],
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=config.train.seed,
    )
    steps = config.train.max_steps
    total = steps if steps > 0 else max(1, round(config.train.num_train_epochs * sampler.steps_per_epoch))
    if config.train.gradient_checkpointing:
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
        tracker=Tracker(Path(config.output.output_dir), total, enabled=distributed.rank() == 0),
        peak=peak,
        plan=PruningPlan.dense(loaded.structure),
        lora_targets=lora_targets,
        zero3=zero3,
        report=report.empty(),
    )
    announce(session)
    return session


def check_target(config: Config, structure: Structure) -> None:
    """A sparsity beyond what can be cut is said before training, not at the last decision."""
    target, most = config.prune.target_sparsity or 0.0, max_sparsity(structure, config.prune.budget)
    if target > most:
        raise UserError(Problem("target_sparsity", target, f"more than can be cut from this model; at most {most:.4f}"))


def same_data(data: TaskData) -> None:
    """Every rank must hold the same examples: one that fell back to an old cache would train on something else."""
    digest = hashlib.sha256()
    for split in (data.train, *data.validation.values()):
        digest.update(json.dumps(split.to_dict(), sort_keys=True).encode())
    distributed.same_on_all_ranks("the data", digest.hexdigest())


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
    session.tracker.text("config", json.dumps(config.to_dict(), indent=2))
    session.tracker.text("ds_config", json.dumps(ds.values, indent=2))


# ----------------------------------------------------------------------------------------------- what is trained


def add_trainables(session: Session) -> None:
    """LoRA, gates and head, as the method wants them, and the engine around them."""
    config, loaded = session.config, session.backbone
    method = config.prune.method
    if method == "full":
        loaded.model.requires_grad_(True)
    else:
        adapters.add_lora(
            loaded.model,
            loaded.layout,
            session.lora_targets,
            r=config.lora.r,
            lora_alpha=config.lora.lora_alpha,
            lora_dropout=config.lora.lora_dropout,
            rank_per_layer=session.rank_per_layer,
        )
    if method == "tmp":
        train_norms(loaded.model)
    if method == "prunadapt":
        attach_gates(session, config.prune.criterion)
    session.engine = build_engine(session)


def train_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)


def attach_gates(session: Session, criterion: str) -> None:
    """Gates on every sub-layer, recording what `criterion` reads."""
    loaded, config = session.backbone, session.config
    session.recorder = Recorder(
        loaded.structure.num_units,
        activations="activation_abs" in CRITERIA[criterion].reads or config.prune.save_scores,
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
        learning_rate=defaults.get("lr", config.train.learning_rate),
        gate_learning_rate=config.prune.gate_learning_rate,
        weight_decay=defaults.get("weight_decay", config.train.weight_decay),
    )
    return engines.build(session.model, groups, ds.values, ds.adam)


# --------------------------------------------------------------------------------------------------- one step


def train_step(session: Session, step: int, *, record: bool) -> Tensor:
    """One optimizer step over all micro-batches; returns the step's mean loss on this rank's share (scalar tensor)."""
    engine, recorder = session.engine, session.recorder if record else None
    total = torch.zeros((), device=session.device)
    for positions, weight in session.sampler.micro_batches(step):
        batch = session.train_rows.batch(positions, weight).to(session.device)
        loss = forward_backward(session, batch, recorder)
        total += loss / session.sampler.accumulation_steps
        engine.step()
    return total


def forward_backward(session: Session, batch: Batch, recorder: Recorder | None) -> Tensor:
    """Loss and gradients of one micro-batch; the recorder learns with which factor autograd sees each sample."""
    engine = session.engine
    if recorder is not None:
        # DeepSpeed divides by the accumulation steps on top of our weights.
        coefficients = batch.weights / session.sampler.accumulation_steps
        recorder.begin(coefficients, batch.inputs["attention_mask"])
    logits = engine(**batch.inputs).logits
    losses = sample_losses(
        logits,
        batch.labels,
        is_regression=session.data.is_regression,
        teacher_logits=None
        if session.teacher_logits is None
        else session.teacher_logits[batch.index].to(logits.device),
        distill_weight=session.config.prune.distill_weight,
    )
    loss = (losses * batch.weights).sum()
    engine.backward(loss)
    if recorder is not None:
        recorder.end()
    return loss.detach()


# ---------------------------------------------------------------------------------------------------- the loop


def fit(session: Session) -> None:
    """Train; where the schedule decides, score, decide and cut."""
    config = session.config
    pruning = pruning_schedule(session)
    rates = LearningRateSchedule(round(config.train.warmup_ratio * session.total_steps), session.total_steps)
    average = ScoreAverage(config.prune.score_ema)
    window_start, interval, losses = pruning.start_step if pruning else 0, _Interval(), []
    phase = "dense"
    for step in range(session.total_steps):
        phase = pruning.phase(step) if pruning else "dense"
        learning_rates = engines.set_learning_rates(session.engine, rates.factor(step))
        record = pruning is not None and pruning.records_after(step)
        with session.timed(f"{phase}_phase"), watch_first_step(session, step):
            losses.append(train_step(session, step, record=record))
        done = step + 1
        if pruning and pruning.decides_at(done):
            decide_and_cut(session, pruning, average, done, window_start)
            window_start = done
        if config.train.eval_steps and done % config.train.eval_steps == 0:
            session.tracker.log(done, phase, {"eval/score": evaluate(session)[0]["score"]})
        if done % config.train.logging_steps and done != session.total_steps:
            session.tracker.advance(done, phase)
            continue
        loss = mean_loss(losses, done)
        losses.clear()
        session.tracker.log(
            done,
            phase,
            {
                "train/loss": loss,
                "sparsity/target": pruning.sparsity(done) if pruning else 0.0,
                "sparsity/achieved": session.plan.sparsity(config.prune.budget),
                "samples/s": interval.rate(done * session.sampler.samples_per_step),
                "memory/parameters(bytes)": memory.parameter_bytes(session.model),
                **{f"learning_rate/{name}": rate for name, rate in learning_rates.items()},
            },
        )


class _Interval:
    """Samples per second since the last call."""

    def __init__(self) -> None:
        self.samples, self.time = 0, time.perf_counter()

    def rate(self, samples: int) -> float:
        now = time.perf_counter()
        rate = (samples - self.samples) / (now - self.time)
        self.samples, self.time = samples, now
        return rate


def watch_first_step(session: Session, step: int) -> Any:
    """Counts what autograd saves during the first step."""
    if step > 0:
        return contextlib.nullcontext()
    saved = memory.SavedActivations()

    @contextlib.contextmanager
    def watch() -> Any:
        with saved.watch():
            yield
        session.activation_bytes = saved.bytes // session.sampler.accumulation_steps

    return watch()


def mean_loss(losses: list[Tensor], step: int) -> float:
    """Mean over ranks and the given steps. Raises on all ranks alike when it is no number."""
    mean = float(distributed.dist_sum(torch.stack(losses).mean())) / distributed.world_size()
    if mean != mean or abs(mean) == float("inf"):
        raise PrunadaptError(
            f"the loss is {mean} at step {step} or up to {len(losses) - 1} steps before it; try a smaller --learning_rate"
        )
    return mean


def pruning_schedule(session: Session) -> PruningSchedule | None:
    prune = session.config.prune
    if prune.method != "prunadapt" or not prune.target_sparsity:
        return None
    return PruningSchedule.from_fractions(
        session.total_steps, prune.prune_start, prune.prune_end, prune.num_decisions, prune.target_sparsity
    )


def decide_and_cut(
    session: Session, pruning: PruningSchedule, average: ScoreAverage, step: int, window_start: int
) -> None:
    """One all-reduce, one global decision, the same on every rank; the masks follow."""
    prune = session.config.prune
    if step == pruning.decision_steps[0]:
        keep_teacher(session)
    assert session.recorder is not None
    with session.timed("importance"):
        window = session.recorder.all_reduce()
        scores = average.update(CRITERIA[prune.criterion].score(window))
        plan = decide(
            scores,
            session.backbone.structure,
            pruning.sparsity(step),
            budget=prune.budget,
            neuron_multiple=prune.neuron_multiple,
        )
        distributed.same_on_all_ranks(f"the pruning plan of step {step}", plan.hash)
        gates.apply_mask(session.model, plan.mask())
    session.plan = plan
    if prune.save_scores:
        samples = [i for s in range(window_start, step) for i in session.sampler.step_samples(s)]
        save_scores(session, window, step, samples)


def keep_teacher(session: Session) -> None:
    """The dense model as it is now: its score, and its logits on the training set for distillation."""
    metrics, _ = evaluate(session)
    session.report["metric"]["teacher"] = metrics
    if session.config.prune.distill_weight > 0:
        with session.timed("teacher"):
            session.teacher_logits = predict(session.engine, session.train_rows, eval_batch(session), session.device)


def save_scores(session: Session, window: WindowSums, step: int, samples: list[int]) -> None:
    """scores/<step>.safetensors: raw sums [U] of every statistic, the count, and the ids of the samples behind them."""
    if distributed.rank() != 0:
        return
    from safetensors.torch import save_file

    tensors = {name: window.sums[name].clone() for name in STATISTICS}
    tensors |= {"count": torch.tensor([window.count]), "sample_ids": torch.tensor(samples)}
    folder = session.output_dir / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{step}.safetensors")


# ------------------------------------------------------------------------------------- scoring without training


def score_samples(session: Session, samples: list[int]) -> WindowSums:
    """Statistics of these training samples at the present weights: steps are taken at a learning rate of zero."""
    assert session.recorder is not None
    everything, plain = session.train_rows, session.sampler
    session.sampler = Sampler(
        len(samples), plain.micro_batch_size, plain.accumulation_steps, plain.rank, plain.world_size, plain.seed
    )
    session.train_rows = _Subset(everything, samples)  # type: ignore[assignment]
    engines.set_learning_rates(session.engine, 0.0)
    for step in range(session.sampler.steps_per_epoch):
        train_step(session, step, record=True)
    session.sampler, session.train_rows = plain, everything
    return session.recorder.all_reduce()


@dataclass(frozen=True)
class _Subset:
    rows: Rows
    samples: list[int]

    def batch(self, positions: Sequence[int], weight: float) -> Batch:
        return self.rows.batch([self.samples[i] for i in positions], weight)


def score_only(session: Session) -> None:
    """Write the statistics of the whole training set at the initial weights."""
    samples = list(range(len(session.train_rows)))
    save_scores(session, score_samples(session, samples), 0, samples)
    session.report["status"] = "complete"
    session.tracker.close()


def prune_once(session: Session) -> None:
    """TMP: rank heads at the initial weights, cut the least important in one shot, choose LoRA ranks by layer."""
    loaded, config = session.backbone, session.config
    with session.timed("importance"):
        attach_gates(session, "taylor")
        session.engine = build_engine(session)
        count = min(config.prune.tmp_scoring_examples, len(session.train_rows))
        generator = torch.Generator().manual_seed(config.train.seed)
        samples = torch.randperm(len(session.train_rows), generator=generator)[:count].tolist()
        window = score_samples(session, samples)
        engines.destroy(session.engine)
        heads = [s for s in loaded.structure.sublayers if s.kind == "heads"]
        scores = torch.stack([window.sums["grad_abs"][s.span] for s in heads])  # [L, N]
        selection = tmp.select(scores)
        keep = torch.ones(loaded.structure.num_units, dtype=torch.bool)
        for sublayer, kept in zip(heads, selection.keep, strict=True):
            keep[sublayer.span] = kept
        session.plan = PruningPlan.from_mask(loaded.structure, keep)
        distributed.same_on_all_ranks("the heads that TMP keeps", session.plan.hash)
        gates.apply_mask(loaded.model, keep)
    for gate in gates.gates_of(loaded.model):
        gate.requires_grad_(False)
    session.recorder = None
    session.rank_per_layer = selection.rank_per_layer


# ------------------------------------------------------------------------------------------------------ evaluation


def eval_batch(session: Session) -> int:
    return session.config.train.per_device_eval_batch_size


def evaluate(session: Session) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The task's measures of the model as it is, and the logits behind them, by validation set."""
    with session.timed("evaluation"):
        logits = {
            name: predict(session.engine, rows, eval_batch(session), session.device)
            for name, rows in session.validation_rows.items()
        }
        return measures(session, logits), logits


def measures(session: Session, logits: dict[str, Tensor]) -> dict[str, float]:
    """All measures of all validation sets, prefixed by the set's name where there are several, and their mean "score"."""
    several = len(logits) > 1
    merged: dict[str, float] = {}
    for name, values in logits.items():
        found = compute_metrics(session.data, values.numpy(), session.validation_rows[name].labels.numpy())
        merged |= {f"{name}/{k}" if several else k: v for k, v in found.items() if k != "score"}
    return {**merged, "score": sum(merged.values()) / len(merged)}


# ---------------------------------------------------------------------------------------------------------- finish


def finish(session: Session) -> None:
    """Score, export, reload in a fresh process, compare, report."""
    config = session.config
    peak_bytes = int(distributed.dist_max(session.peak.bytes()))
    masked_metrics, masked = evaluate(session)
    reference = parity_reference(session, masked)
    folder = session.output_dir / "exports" / "compact"
    needs_remote_code = export.export(
        session.model,
        session.backbone.layout,
        session.plan,
        session.backbone.tokenizer,
        folder,
        dtype=getattr(torch, config.output.export_dtype),
    )
    fill_report(session, masked_metrics, peak_bytes, needs_remote_code)
    failure = ""
    if distributed.rank() == 0:
        failure = prove(session, folder, needs_remote_code, masked, reference)
    failure = distributed.broadcast_object(failure)
    session.tracker.close()
    if failure:
        raise ParityError(failure)


def parity_reference(session: Session, masked: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 logits of the masked model: those at hand, or for a bf16 run those of the first rows, parameters upcast."""
    if session.ds.dtype == "fp32":
        return masked
    with session.timed("evaluation"), upcast_parameters(session.model):
        return {
            name: predict(session.engine, rows.head(PARITY_EXAMPLES), eval_batch(session), session.device)
            for name, rows in session.validation_rows.items()
        }


def prove(
    session: Session, folder: Path, needs_remote_code: bool, masked: dict[str, Tensor], reference: dict[str, Tensor]
) -> str:
    """Rank 0: reload the export without this package, compare, complete and write the report. Returns what failed."""
    result = session.report
    low_precision = session.config.output.export_dtype != "float32"
    reloaded = export.reload_in_fresh_process(
        folder,
        session.validation_rows,
        needs_remote_code=needs_remote_code,
        batch_size=eval_batch(session),
        device=session.device,
        latency={**LATENCY, "dtype": "bfloat16" if session.ds.dtype == "bf16" else "float32"},
    )
    difference, tolerance, examples = 0.0, export.TOLERANCE, 0
    for name, logits in reference.items():
        found, allowed = export.compare_logits(logits, reloaded.logits[name][: len(logits)])
        difference, tolerance = max(difference, found), max(tolerance, allowed)
        examples += len(logits)
    result["parity"] = {"max_abs_logit_diff": difference, "tolerance": tolerance, "examples": examples}
    result["metric"]["exported"] = measures(session, reloaded.logits)
    result["latency"] |= reloaded.latency or {}
    failed = difference > tolerance and not low_precision
    result["status"] = "failed" if failed else "complete"
    write_predictions(session, masked, reloaded.logits)
    plan = json.dumps(session.plan.to_dict(), sort_keys=True)
    (session.output_dir / "plan.json").write_text(plan)
    (folder / "README.md").write_text(
        card.render(result, session.config.model.model_name_or_path, session.data.label_names, "compact")
    )
    report.write(session.output_dir, result)
    session.tracker.say(report.table(result))
    if failed:
        return f"the export's logits differ by {difference:.2e} from the trained model's; allowed is {tolerance:.2e}"
    return ""


def write_predictions(session: Session, masked: dict[str, Tensor], exported: dict[str, Tensor]) -> None:
    """predictions.jsonl: a line per validation example."""
    with (session.output_dir / "predictions.jsonl").open("w") as file:
        for name, rows in session.validation_rows.items():
            for i, label in enumerate(rows.labels.tolist()):
                line = {"split": name, "index": i, "label": label}
                for kind, logits in (("masked", masked[name][i]), ("exported", exported[name][i])):
                    prediction = float(logits) if session.data.is_regression else int(logits.argmax())
                    line[kind] = {"prediction": prediction, "logits": logits.tolist()}
                file.write(json.dumps(line) + "\n")


def fill_report(session: Session, masked_metrics: dict[str, float], peak_bytes: int, needs_remote_code: bool) -> None:
    """Everything of the report that is known before the export was read back."""
    config, result, plan = session.config, session.report, session.plan
    structure = session.backbone.structure
    seconds = session.seconds
    phases = {name: seconds.get(f"{name}_phase", 0.0) for name in ("dense", "prune", "recover")}
    train_s = sum(phases.values()) + seconds.get("teacher", 0.0) + seconds.get("importance", 0.0)
    steps = session.total_steps
    is_pruning = config.prune.method == "prunadapt"
    trainable = sum(full_numel(p) for p in session.model.parameters() if p.requires_grad)
    frozen_bytes = engines.frozen_shard_bytes(session.model)
    live = memory.parameter_bytes(session.model) + memory.optimizer_bytes(session.engine) + session.activation_bytes
    result |= {
        "task": session.data.task.name,
        "method": config.prune.method,
        "criterion": config.prune.criterion if is_pruning else None,
        "model": config.model.model_name_or_path,
        "seed": config.train.seed,
        "world_size": distributed.world_size(),
        "zero_stage": session.ds.stage,
        "dtype": session.ds.dtype,
        "device": device_name(session.device),
        "versions": versions(),
        "structure": plan.counts(),
        "plan_hash": plan.hash,
    }
    result["metric"]["masked"] = masked_metrics
    result["params"] |= {
        "encoder_dense": structure.dense_cost("params"),
        "encoder_kept": plan.cost("params"),
        "total_dense": structure.dense_cost("params") + structure.other_params,
        "total_kept": plan.cost("params") + structure.other_params,
        "trainable": trainable,
    }
    result["macs"] |= {
        "dense": structure.dense_cost("macs"),
        "kept": plan.cost("macs"),
        "seq_length": structure.seq_length,
    }
    result["sparsity"] |= {
        "target": config.prune.target_sparsity if is_pruning else None,
        "achieved": plan.sparsity(config.prune.budget),
    }
    result["time"] |= {
        "train_s": train_s,
        "dense_phase_s": phases["dense"],
        "prune_phase_s": phases["prune"] if is_pruning else None,
        "recover_phase_s": phases["recover"] if is_pruning else None,
        "teacher_s": seconds.get("teacher"),
        "importance_s": seconds.get("importance"),
        "steps": steps,
        "samples_per_s": steps * session.sampler.samples_per_step / train_s,
    }
    result["memory"]["frozen_shard_bytes"] = int(distributed.dist_max(frozen_bytes))
    result["memory"]["live_tensor_bytes"]["dense"] = int(distributed.dist_max(live))
    result["memory"]["peak_rank_bytes"]["dense_phase"] = peak_bytes
    result["exports"] = {"compact": {"path": str(Path("exports") / "compact"), "needs_remote_code": needs_remote_code}}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")}
