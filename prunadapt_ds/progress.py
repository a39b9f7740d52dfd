"""What a run reports while it runs: what will happen, and how each logging interval went."""

from __future__ import annotations

import time

import torch

from prunadapt_ds import distributed, memory, outline
from prunadapt_ds import engine as engines
from prunadapt_ds.distillation import distill_weight
from prunadapt_ds.schedule import PruningSchedule
from prunadapt_ds.session import Session


class Interval:
    """Measures samples per second between calls of `rate`, which take the samples seen so far."""

    def __init__(self, samples: int) -> None:
        self.samples, self.time = samples, time.perf_counter()

    def rate(self, samples: int) -> float:
        now = time.perf_counter()
        rate = (samples - self.samples) / (now - self.time)
        self.samples, self.time = samples, now
        return rate


def say_what_will_happen(session: Session, pruning: PruningSchedule | None) -> None:
    total, structure, stage = session.total_steps, session.backbone.structure, session.ds.stage
    start, end = (pruning.start_step, pruning.end_step) if pruning else (total, total)
    phases = outline.phases(session.step, start, end, total)
    counts = engines.trainable_counts(session.model, session.backbone.task_head_names)
    sharding = outline.sharding(stage, distributed.world_size(), session.ds.values["zero_optimization"])
    numbers = structure.dense_cost("params") + structure.other_params
    rate = None if session.ds.adam.get("lr") else session.learning_rate
    session.tracker.say(outline.header(session.config, phases, counts, numbers, sharding, rate))


def log_interval(
    session: Session,
    phase: str,
    pruning: PruningSchedule | None,
    interval: Interval,
    learning_rates: dict[str, float],
) -> None:
    """Log an interval to the tracker, and add it to the report as a row. Collective."""
    step, rate = session.step, interval.rate(session.sampler.samples_before(session.step))
    achieved, live, seconds = (
        session.plan.sparsity(session.config.prune.budget),
        session.live(),
        session.clocks.train_seconds(),
    )
    means = distributed.dist_sum(torch.stack(session.losses).mean(0)) / distributed.world_size()
    loss, distillation, taught = means.tolist()  # taught: the share of these steps that had a teacher
    session.losses.clear()
    session.tracker.log(
        step,
        phase,
        {
            "train/loss": loss,
            "sparsity/target": pruning.sparsity(step) if pruning else 0.0,
            "sparsity/achieved": achieved,
            "samples/s": rate,
            "memory/parameters(bytes)": memory.parameter_bytes(session.model),
            "memory/live(bytes)": live,
            "communication/sent(bytes)": session.sent_in_a_step(),
            "distillation/weight": distill_weight(session, pruning, step - 1),
            **({"distillation/loss": distillation / taught} if taught else {}),
            "time/train(s)": seconds,
            **{f"learning_rate/{name}": value for name, value in learning_rates.items()},
        },
    )
    session.report["progress"].append(
        {"step": step, "phase": phase, "loss": loss, "sparsity": achieved, "samples_per_s": rate}
        | {"live_tensor_bytes": live, "train_s": seconds}
    )
