"""Scoring without training, and TMP's one-shot cut before training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from prunadapt_ds import board, distributed, gates, tmp, watchdog
from prunadapt_ds import engine as engines
from prunadapt_ds.batches import Sampler
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.errors import PrunadaptError
from prunadapt_ds.faults import fault_point
from prunadapt_ds.importance import WindowSums, save_sums
from prunadapt_ds.session import Session, attach_gates, build_engine
from prunadapt_ds.shrink import resize_sharded
from prunadapt_ds.step import train_step


def score_samples(session: Session, samples: list[int], stop_if_asked: Callable[[], None] = lambda: None) -> WindowSums:
    """Collect the statistics of these training samples at the current weights, in steps with a learning rate of zero.

    `stop_if_asked` is called after every step. Collective.
    """
    assert session.recorder is not None
    plain = session.sampler
    scored = copy.copy(session)
    scored.sampler = Sampler(
        len(samples), plain.micro_batch_size, plain.accumulation_steps, plain.rank, plain.world_size, plain.seed
    )
    scored.train_rows, scored.losses = session.train_rows.pick(samples), []
    engines.set_learning_rates(session.engine, 0.0)
    for step in range(scored.sampler.steps_per_epoch):
        train_step(scored, step, record=True)
        fault_point(f"score-{step}")
        watchdog.beat()
        stop_if_asked()
    watchdog.rest()  # what follows is slow: writing the scores, or cutting and building an engine
    window = session.recorder.all_reduce()
    if not all(bool(sums.isfinite().all()) for sums in window.sums.values()):
        raise PrunadaptError("the statistics of the initial weights are not finite: a loss or a gradient overflowed")
    return window


def score_only(session: Session, stop_if_asked: Callable[[], None]) -> None:
    """Write the statistics of the whole training set at the initial weights."""
    samples = list(range(len(session.train_rows)))
    places = session.train_rows.places.tolist()
    save_sums(score_samples(session, samples, stop_if_asked), session.output_dir / "scores", 0, places)
    session.report["status"] = "complete"
    session.tracker.say(
        f"wrote the statistics of {len(samples)} samples to {session.output_dir / 'scores' / '0.safetensors'}"
    )
    session.tracker.close()


def show(session: Session, window: WindowSums) -> None:
    """Show the only decision in TensorBoard, at step 0, with all gates at 1: nothing has trained them yet."""
    scores, gates_now = window.mean("grad_abs"), torch.ones(session.plan.structure.num_units)
    session.tracker.show(
        lambda writer: board.decision(writer, step=0, plan=session.plan, scores=scores, gates=gates_now)
    )


def prune_once(session: Session) -> None:
    """TMP: rank heads at the initial weights, cut the least important in one shot, choose LoRA ranks by layer."""
    loaded, config = session.backbone, session.config
    with session.clocks.timed("importance"):
        attach_gates(session, "taylor")
        session.engine = build_engine(session)
        count = min(config.prune.tmp_scoring_examples, len(session.train_rows))
        generator = torch.Generator().manual_seed(config.train.seed)
        samples = torch.randperm(len(session.train_rows), generator=generator)[:count].tolist()
        window = score_samples(session, samples)
        engines.destroy(session.release_engine())
        heads = [s for s in loaded.structure.sublayers if s.kind == "heads"]
        scores = torch.stack([window.sums["grad_abs"][s.span] for s in heads])  # [L, N]
        selection = tmp.select(scores, [s.floor for s in heads])
        keep = torch.ones(loaded.structure.num_units, dtype=torch.bool)
        for sublayer, kept in zip(heads, selection.keep, strict=True):
            keep[sublayer.span] = kept
        session.plan = PruningPlan.from_mask(loaded.structure, keep)
        distributed.same_on_all_ranks("the heads that TMP keeps", session.plan.hash)
    show(session, window)
    with session.clocks.timed("shrink"):
        gates.detach(loaded.model)
        session.note_peak()
        resize_sharded(loaded.model, loaded.layout, session.plan)
        session.present = session.plan
    session.recorder = None
    session.rank_per_layer = selection.rank_per_layer
