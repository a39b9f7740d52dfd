"""The whole run, top to bottom: set up, adapt, prune while training, finish.

The only module that calls all the others. Nothing imports it but the launchers.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunadapt_ds import distributed, gates, memory, tmp
from prunadapt_ds import engine as engines
from prunadapt_ds.batches import Batch, Rows, Sampler
from prunadapt_ds.budget import PruningPlan, decide
from prunadapt_ds.config import Config, parse
from prunadapt_ds.errors import PrunadaptError
from prunadapt_ds.evaluate import predict
from prunadapt_ds.finish import finish
from prunadapt_ds.importance import CRITERIA, STATISTICS, Recorder, ScoreAverage, WindowSums
from prunadapt_ds.objective import sample_losses
from prunadapt_ds.resize import resize
from prunadapt_ds.schedule import LearningRateSchedule, PruningSchedule
from prunadapt_ds.session import Session, add_trainables, attach_gates, build_engine, eval_batch, evaluate, setup
from prunadapt_ds.shrink import pays_now, shrink


def main(argv: Sequence[str] | None = None) -> int:
    """Run what `argv` asks for; returns the process's exit code (see errors.py)."""
    try:
        config = parse(argv)
        run(config)
    except PrunadaptError as error:
        if distributed.speaks_of(error):
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
        with session.timed(f"{phase}_phase"), watched(session, step):
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
                "memory/live(bytes)": session.live(),
                **{f"learning_rate/{name}": rate for name, rate in learning_rates.items()},
            },
        )


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
        keep_teacher(session, step)
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
            gone=~session.present.mask(),
        )
        distributed.same_on_all_ranks(f"the pruning plan of step {step}", plan.hash)
        gates.apply_mask(session.model, plan.mask()[session.present.mask()])
    session.plan = plan
    if pays_to_shrink(session, pruning, step):
        with session.timed("shrink"):
            shrink_model(session)
        session.tracker.say(
            f"step {step}: shrunk to {1 - plan.sparsity(prune.budget):.1%} in {session.rebuild_seconds:.1f} s"
        )
    if prune.save_scores:
        samples = [i for s in range(window_start, step) for i in session.sampler.step_samples(s)]
        save_scores(session, window, step, samples)


def pays_to_shrink(session: Session, pruning: PruningSchedule, step: int) -> bool:
    """Whether a smaller engine earns back what rebuilding it costs, from the seconds measured in this run."""
    structure, steps = session.backbone.structure, pruning.decision_steps
    when = session.config.prune.shrink
    if session.plan.hash == session.present.hash or when == "never":
        return False
    if when == "always" or not session.step_times.seconds:
        return when == "always"
    dense = structure.dense_cost("macs")
    later = [s for s in steps if s > step]
    ends = [*later, session.total_steps]
    sizes = [session.plan.cost("macs"), *(round(dense * (1 - pruning.sparsity(s))) for s in later)]
    decisions = [(size, end - start) for size, start, end in zip(sizes, [step, *later], ends, strict=True)]
    cost = session.rebuild_seconds or session.build_seconds
    pays = pays_now(session.present.cost("macs"), decisions, session.step_times.predict, cost)
    return bool(distributed.broadcast_object(pays))  # clocks differ between ranks, the decision must not


def shrink_model(session: Session) -> None:
    """Rebuild the engine around the model that `session.plan` leaves."""
    start = time.perf_counter()
    session.note_peak()
    layout, plan = session.backbone.layout, session.plan
    session.engine = shrink(session.release_engine(), layout, plan, session.present, lambda: build_engine(session))
    session.present = plan
    if session.recorder is not None:
        session.recorder.narrow(plan.mask())
    session.watched_length = 0
    session.rebuild_seconds = distributed.dist_max(time.perf_counter() - start)


def keep_teacher(session: Session, step: int) -> None:
    """The dense model as it is now: its score, and its logits on the training set for distillation."""
    metrics, _ = evaluate(session)
    session.report["metric"]["teacher"] = metrics
    session.tracker.log(step, "teacher", {"eval/score": metrics["score"]})
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


class _Interval:
    """Samples per second since the last call."""

    def __init__(self) -> None:
        self.samples, self.time = 0, time.perf_counter()

    def rate(self, samples: int) -> float:
        now = time.perf_counter()
        rate = (samples - self.samples) / (now - self.time)
        self.samples, self.time = samples, now
        return rate


@contextlib.contextmanager
def watched(session: Session, step: int) -> Iterator[None]:
    """Time a step; on the first with an engine, and on those with longer samples than before, count what autograd saves."""
    length = max(session.train_rows.lengths[i] for i in session.sampler.step_samples(step))
    if length <= session.watched_length:
        start = time.perf_counter()
        yield
        session.step_times.add(session.present.cost("macs"), time.perf_counter() - start)
        return
    saved = memory.SavedActivations()
    with saved.watch():
        yield
    session.activation_bytes = saved.bytes // session.sampler.accumulation_steps
    session.live_bytes["after_shrink" if session.is_shrunk else "dense"] = int(distributed.dist_max(session.live()))
    session.watched_length = length


def mean_loss(losses: list[Tensor], step: int) -> float:
    """Mean over ranks and the given steps. Raises on all ranks alike when it is no number."""
    mean = float(distributed.dist_sum(torch.stack(losses).mean())) / distributed.world_size()
    if mean != mean or abs(mean) == float("inf"):
        raise PrunadaptError(
            f"the loss is {mean} at step {step} or up to {len(losses) - 1} steps before it; try a smaller --learning_rate"
        )
    return mean


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
    with session.timed("shrink"):
        gates.detach(loaded.model)
        resize(loaded.model, loaded.layout, session.plan, editing=engines.rewriting)
        session.present = session.plan
    session.recorder = None
    session.rank_per_layer = selection.rank_per_layer
