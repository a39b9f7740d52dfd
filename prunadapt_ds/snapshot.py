"""Turn the state of a run into tensors and JSON for a checkpoint, and restore it on any number of ranks.

Most of it does not depend on how the run is split: whole fp32 masters and moments, the plan, the moving average of scores.
State of single ranks (random states, sums of the open decision window) is stored rank by rank. On as many ranks as before,
each gets its own back and the run continues bit for bit; on another number, rank 0 gets the total of the window's sums.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from prunadapt_ds import distributed, gates, memory, state, token_teacher
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.checkpoint import Checkpoint
from prunadapt_ds.errors import PrunadaptError
from prunadapt_ds.session import Session
from prunadapt_ds.token_teacher import TokenTeacher
from prunadapt_ds.weight_average import WeightAverage


def collect(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors by name, and the rest as JSON, for rank 0 to write; other ranks' lack masters and moments. Collective.

    Raises PrunadaptError on all ranks if the weights are not finite.
    """
    learnt = state.capture(session.engine, keep=distributed.rank() == 0)
    if not distributed.true_on_all_ranks(all(bool(torch.isfinite(t).all()) for t in learnt.masters.values())):
        raise PrunadaptError(f"the weights are not finite after step {session.step}; no checkpoint is written")
    tensors = {f"master/{name}": tensor for name, tensor in learnt.masters.items()}
    for key, moments in learnt.moments.items():
        tensors |= {f"{key}/{name}": tensor for name, tensor in moments.items()}
    if session.scores is not None and session.scores.value is not None:
        tensors["scores"] = session.scores.value
    if session.recorder is not None:
        tensors["window"] = distributed.all_gather_rows(session.recorder.capture()[None]).cpu()  # [ranks, S * U + 1]
    if isinstance(session.teacher, Tensor):
        tensors["teacher"] = session.teacher
    tensors |= {f"average/{name}": total for name, total in session.average.sums.items()}
    for name, states in random_states(session.device).items():
        tensors[f"random/{name}"] = distributed.all_gather_rows(states.to(session.device)[None]).cpu()  # [ranks, bytes]
    of_ranks = distributed.all_gather_objects(
        {"losses": [means.tolist() for means in session.losses], "python": random.getstate(), "numpy": numpy_state()}
    )
    return tensors, {
        "identity": session.identity,
        "latency": session.latency,
        "label_scale": dataclasses.astuple(session.label_scale),
        "world_size": distributed.world_size(),
        "place": place(session),
        "optimizer_steps": learnt.steps,
        "plan": session.plan.kept,
        "present": session.present.kept,
        "rank_per_layer": session.rank_per_layer,
        "ranks": of_ranks,
        "rebuilt": session.rebuilt,
        "average_count": session.average.count,
        "token_teacher": session.teacher.identity if isinstance(session.teacher, TokenTeacher) else None,
        "teacher_metric": session.report["metric"]["teacher"],
        "distillation": session.report["distillation"],
        "progress": session.report["progress"],
        "clocks": session.clocks.saved(),
        "memory": {**session.memory.saved(), "micro_batch": session.sampler.micro_batch_size},
    }


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators by device: uint8 [bytes]."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def seed_this_rank(seed: int, step: int) -> None:
    """Seed this rank's generators for the step that follows `step`: different on every rank, whose samples differ too."""
    own = seed * 1_000_003 + step * 1009 + distributed.rank()
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own % 2**32)


def numpy_state() -> list[Any]:
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
    return [kind, keys.tolist(), *rest]


def place(session: Session) -> dict[str, Any]:
    """The report's fields about where the run trains, which a later export of its checkpoint cannot see. Collective."""
    return {
        "zero_stage": session.ds.stage,
        "device": distributed.device_name(session.device),
        "memory": {
            "frozen_shard_bytes": int(distributed.dist_max(memory.parameter_bytes(session.model, only_frozen=True)))
        },
    }


def restore_plan(session: Session, saved: Mapping[str, Any]) -> PruningPlan | None:
    """Take over the saved decisions; returns the plan that the dense model must be cut to, or None."""
    structure = session.backbone.structure

    def plan(kept: list[list[int]]) -> PruningPlan:
        return PruningPlan(structure, tuple(map(tuple, kept)))

    session.plan, present = plan(saved["plan"]), plan(saved["present"])
    session.rank_per_layer = {int(layer): rank for layer, rank in saved["rank_per_layer"].items()}
    return None if present.hash == PruningPlan.dense(structure).hash else present


def restore(session: Session, start: Checkpoint, *, to_train: bool = True) -> None:
    """Restore a checkpoint into a session whose model has the right shape already. Collective.

    Without `to_train` a language model's teacher, which may be large, stays where it is.
    """
    saved = start.state
    read: dict[str, Tensor] = {}
    distributed.on_rank_0(f"reading {start.folder}", lambda: read.update(start.tensors()))

    def taken(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}

    moments = {key: taken(f"{key}/", read) for key in state.MOMENTS}
    learnt = state.TrainingState(taken("master/", read), moments, saved["optimizer_steps"])
    state.restore(session.engine, learnt)
    del learnt, moments
    tensors = distributed.broadcast_tensors(read if distributed.rank() == 0 else None)
    gates.apply_mask(session.model, session.plan.mask()[session.present.mask()])
    session.step = saved["step"]
    session.teacher = tensors.get("teacher")
    if saved["token_teacher"] and to_train:
        folder = session.output_dir / token_teacher.FOLDER
        distributed.on_rank_0(
            f"copying the teacher to {folder}", lambda: token_teacher.bring(start.run_dir / folder.name, folder)
        )
        session.teacher = distributed.together(lambda: token_teacher.open_again(folder, saved["token_teacher"]))
    session.average = WeightAverage(taken("average/", tensors), saved["average_count"])
    session.report["metric"]["teacher"] = saved["teacher_metric"]
    session.report["distillation"] |= saved.get("distillation") or {}  # missing in older checkpoints
    session.report["progress"] = list(saved["progress"])
    if session.scores is not None:
        session.scores.value = tensors.get("scores")
    session.rebuilt = {int(step): rebuilt for step, rebuilt in saved["rebuilt"].items()}
    restore_of_ranks(session, saved, tensors)
    # Devices may differ between ranks, what they do next must not.
    alike = not to_train or bool(distributed.broadcast_object(measured_alike(session, saved)))
    session.clocks.restore(saved["clocks"], steps=alike)
    if alike:
        session.memory.restore(saved["memory"], is_shrunk=session.is_shrunk)


def measured_alike(session: Session, saved: Mapping[str, Any]) -> bool:
    """Whether seconds of a step and bytes of a rank from before are comparable with those to come, as rank 0 sees it."""
    place = saved.get("place") or {}  # older checkpoints have none
    before = (saved["world_size"], saved["memory"]["micro_batch"], place.get("zero_stage"), place.get("device"))
    now = (distributed.world_size(), session.sampler.micro_batch_size, session.ds.stage)
    return before == (*now, distributed.device_name(session.device))


def restore_of_ranks(session: Session, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Restore the state of single ranks: to each its own, or redistributed if the number of ranks has changed."""
    rank, same = distributed.rank(), saved["world_size"] == distributed.world_size()
    if session.recorder is not None and "window" in tensors:
        window = tensors["window"]
        if same:
            session.recorder.restore(window[rank])
        elif rank == 0:
            session.recorder.restore(window.sum(0))
    losses = torch.tensor([of_rank["losses"] for of_rank in saved["ranks"]])  # [ranks, steps, 3]
    if losses.dim() == 2:  # an older checkpoint, which holds the loss alone
        losses = torch.nn.functional.pad(losses[..., None], (0, 2))
    session.losses = list((losses[rank] if same else losses.mean(0)).to(session.device))
    if not same or f"random/{session.device.type}" not in tensors:
        seed_this_rank(session.config.train.seed, saved["step"])
        return
    mine = saved["ranks"][rank]
    torch.set_rng_state(tensors["random/cpu"][rank].clone())
    if session.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"][rank].clone(), session.device)
    version, internal, gauss = mine["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = mine["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
