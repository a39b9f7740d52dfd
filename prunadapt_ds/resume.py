"""Save what a run has learnt, and go on from it on any number of ranks.

What a checkpoint holds does not depend on how the run is split: whole fp32 masters and moments, the plan, the averages of
scores. What is each rank's own (random states, sums of the open decision window) is kept rank by rank: on as many ranks as
before every one gets its own back and the run goes on bit for bit; on another number the sums go to rank 0 together.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from prunadapt_ds import checkpoint, distributed, files, gates, state, token_teacher
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.checkpoint import Checkpoint, Damaged
from prunadapt_ds.config import SECTIONS, Config
from prunadapt_ds.ds_config import resolve_ds_config
from prunadapt_ds.errors import Problem, PrunadaptError, UserError
from prunadapt_ds.session import Session, add_trainables
from prunadapt_ds.shrink import StepTimes
from prunadapt_ds.teacher import WeightAverage
from prunadapt_ds.token_teacher import TokenTeacher
from prunadapt_ds.watchdog import milestone

# Options that may change while a run is interrupted, because they do not change what it computes ...
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
# ... because what they name is compared instead of the name ...
BY_CONTENT = {"model_name_or_path", "adapter_name_or_path", "data_dir", "train_file", "validation_file"}
# ... or because what becomes of them together with the ds_config is.
RESOLVED = {
    "ds_config",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "learning_rate",
    "weight_decay",
}
LATENCY = "latency.json"
LEFT_BEHIND = ("report.json", "report.md", "plan.json", "predictions.jsonl", "run.json", LATENCY)
REBUILDS = "rebuilds.json"
STEP_TIMES_KEPT = 1000  # of each size


@dataclass
class Start:
    """How a run begins: from nothing, from a checkpoint, or not at all because its work is done."""

    options: dict[str, Any]  # what was asked for, as it is now: a ds_config may be edited while a run goes on
    checkpoint: Checkpoint | None = None
    finished: dict[str, Any] | None = None  # the report of the same run, complete
    notes: list[str] = field(default_factory=list)

    @property
    def saved(self) -> dict[str, Any] | None:
        return self.checkpoint.state if self.checkpoint else None


def root_of(config: Config) -> Path:
    return Path(config.output.output_dir) / "checkpoints"


def options(config: Config) -> dict[str, Any]:
    """What was asked for, by option, as far as it decides what the run computes."""
    ds = resolve_ds_config(config, distributed.world_size())
    given = {name: value for section in config.to_dict().values() for name, value in section.items()}
    found = {name: value for name, value in given.items() if name not in FREE | BY_CONTENT | RESOLVED}
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
    given = {name: value for section in config.to_dict().values() for name, value in section.items()}
    return {name: given[name] for name in sorted(BY_CONTENT)}


def config_of(run_dir: Path, saved: Mapping[str, Any]) -> Config:
    """The configuration of the run whose checkpoint holds the state `saved`, on as many ranks as there are now.

    What does not change what was computed is at its default; model and data are where the checkpoint's part of the run
    found them. Raises UserError where nothing says so.
    """
    stated = {
        **saved["options"],
        **(saved.get("names") or files.read_object(run_dir / "run.json", _refuse_run(run_dir))),
    }
    sections = {
        name: section(**{f.name: stated[f.name] for f in dataclasses.fields(section) if f.name in stated})
        for name, section in SECTIONS.items()
    }
    config = Config(**sections, given=frozenset(BY_CONTENT))
    config.train.per_device_train_batch_size = max(1, stated["train_batch_size"] // distributed.world_size())
    config.output.output_dir = str(run_dir)
    return config


def _refuse_run(run_dir: Path) -> Callable[[str], UserError]:
    return lambda remedy: UserError(Problem("run_dir", str(run_dir), remedy))


def changes(now: Mapping[str, Any], before: Mapping[str, Any], where: str) -> list[Problem]:
    """A problem for every option that is not what it was."""
    remedy = "the run in {} began with {!r}; give that, name another --output_dir, or start over with --resume never"
    return [
        Problem(name, value, remedy.format(where, before[name]))
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def find(config: Config) -> Start:
    """What `--resume` says about what lies in the output folder. All ranks get the same; UserError on all.

    Only rank 0 looks, so that no two ranks can find different things.
    """
    return distributed.on_rank_0("reading the output folder", lambda: _find(config))


def _find(config: Config) -> Start:
    asked = options(config)
    if config.output.resume == "never" or config.prune.score_only:
        return Start(asked)
    if config.output.resume != "auto":
        start = Start(asked, _given(Path(config.output.resume)))
    else:
        finished = _finished(Path(config.output.output_dir), {**asked, **names(config)})
        if finished is not None:
            return Start(asked, finished=finished)
        newest, damaged = checkpoint.newest(root_of(config))
        start = Start(asked, newest, notes=damaged)
    if start.checkpoint is None:
        return start
    if problems := changes(asked, start.checkpoint.state["options"], str(start.checkpoint.folder)):
        raise UserError(problems)
    return start


def _given(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, or the newest of those below it."""
    try:
        if (folder / checkpoint.STATE).exists():
            return checkpoint.read(folder)
    except Damaged as error:
        raise UserError(Problem("resume", str(folder), f"the checkpoint is damaged: {error}; name another")) from error
    for root in (folder, folder / "checkpoints"):
        if (found := checkpoint.newest(root)[0]) is not None:
            return found
    raise UserError(Problem("resume", str(folder), "there is no intact checkpoint; name the folder of one"))


def _finished(output_dir: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a complete run in `output_dir`; UserError if that run was another one."""
    try:
        report = json.loads((output_dir / "report.json").read_text())
        if report["status"] != "complete":
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    try:
        before = json.loads((output_dir / "run.json").read_text())
        problems = changes(asked, before, str(output_dir))
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        remedy = "holds a complete run of unknown options; name another folder, or overwrite it with --resume never"
        problems = [Problem("output_dir", str(output_dir), remedy)]
    if problems:
        raise UserError(problems)
    return report


def begin(session: Session) -> None:
    """Start from nothing: what an earlier run left in the folder goes, before it can be taken for this one's."""

    def clear() -> None:
        for _, folder in checkpoint.listed(root_of(session.config)):
            checkpoint.discard(folder)
        (root_of(session.config) / REBUILDS).unlink(missing_ok=True)
        shutil.rmtree(session.output_dir / token_teacher.FOLDER, ignore_errors=True)
        for name in LEFT_BEHIND:
            (session.output_dir / name).unlink(missing_ok=True)
        text = json.dumps(
            {**(session.options or options(session.config)), **names(session.config)}, indent=2, sort_keys=True
        )
        files.replace(session.output_dir / "run.json", text + "\n")  # by which the run is known again

    distributed.on_rank_0("clearing the output folder", clear)
    write_latency(session)


def write_latency(session: Session) -> None:
    """latency.json: the measured table, for people. A run that goes on reads it from its checkpoint."""
    if session.latency is not None:
        text = json.dumps(session.latency, indent=1) + "\n"
        distributed.on_rank_0("writing latency.json", lambda: files.replace(session.output_dir / LATENCY, text))


def note_rebuilds(session: Session) -> None:
    """Write down what clocks have decided: a run that is interrupted before the next checkpoint repeats it."""
    distributed.on_rank_0(
        "writing the decisions to rebuild",
        lambda: files.replace(root_of(session.config) / REBUILDS, json.dumps(session.rebuilt)),
    )


def noted_rebuilds(config: Config) -> dict[int, bool]:
    """By step; nothing where the file is not there or not whole."""
    try:
        noted = json.loads((root_of(config) / REBUILDS).read_text())
        return {int(step): bool(rebuilt) for step, rebuilt in noted.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


# ------------------------------------------------------------------------------------------------------- save


def save(session: Session) -> Path:
    """Write a checkpoint of the run as it is. Collective; PrunadaptError on all ranks where it cannot be written."""
    root = root_of(session.config)
    with session.timed("checkpoint"):
        milestone(f"checkpoint-{session.step}/begin")
        tensors, saved = collect(session)

        def write() -> None:
            saved["metrics_bytes"] = session.tracker.metrics_bytes()
            checkpoint.write(root, session.step, tensors, saved, session.config.output.save_total_limit)

        distributed.on_rank_0(f"writing the checkpoint of step {session.step} below {root}", write)
    milestone(f"checkpoint-{session.step}/end")
    return root / f"{checkpoint.PREFIX}{session.step}"


def collect(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the rest as JSON. Collective."""
    learnt = state.capture(session.engine)
    if not all(bool(torch.isfinite(t).all()) for t in learnt.masters.values()):
        raise PrunadaptError(f"the weights are no numbers after step {session.step}; no checkpoint is made of them")
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
        {"losses": [float(loss) for loss in session.losses], "python": random.getstate(), "numpy": numpy_state()}
    )
    return tensors, {
        "options": session.options or options(session.config),
        "names": names(session.config),
        "identity": session.identity,
        "latency": session.latency,
        "world_size": distributed.world_size(),
        "optimizer_steps": learnt.steps,
        "plan": session.plan.kept,
        "present": session.present.kept,
        "rank_per_layer": session.rank_per_layer,
        "ranks": of_ranks,
        "rebuilt": session.rebuilt,
        "average_count": session.average.count,
        "token_teacher": isinstance(session.teacher, TokenTeacher),
        "teacher_metric": session.report["metric"]["teacher"],
        "progress": session.report["progress"],
        "clocks": clocks(session),
        "memory": memory_marks(session),
    }


def random_states(device: torch.device) -> dict[str, Tensor]:
    """uint8 [bytes] of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def numpy_state() -> list[Any]:
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
    return [kind, keys.tolist(), *rest]


def clocks(session: Session) -> dict[str, Any]:
    def recent(times: StepTimes) -> dict[int, list[float]]:
        return {size: taken[-STEP_TIMES_KEPT:] for size, taken in times.seconds.items()}

    return {
        "seconds": session.seconds,
        "cpu_seconds": session.cpu_seconds,
        "step_times": recent(session.step_times),
        "step_cpu_times": recent(session.step_cpu_times),
        "build": session.build_seconds,
        "rebuild": session.rebuild_seconds,
    }


def memory_marks(session: Session) -> dict[str, Any]:
    return {
        "live": session.live_bytes,
        "peak": session.peak_bytes,
        "now": distributed.dist_max(session.peak.bytes()),
        "micro_batch": session.sampler.micro_batch_size,
        "activations": session.activation_bytes,
        "watched_length": session.watched_length,
    }


# ---------------------------------------------------------------------------------------------------- restore


def plans(session: Session, saved: Mapping[str, Any]) -> PruningPlan | None:
    """Take over what was decided; returns what the dense model must be cut to, if it must."""
    structure = session.backbone.structure

    def plan(kept: list[list[int]]) -> PruningPlan:
        return PruningPlan(structure, tuple(map(tuple, kept)))

    session.plan, present = plan(saved["plan"]), plan(saved["present"])
    session.rank_per_layer = {int(layer): rank for layer, rank in saved["rank_per_layer"].items()}
    return None if present.hash == PruningPlan.dense(structure).hash else present


def rebuild(session: Session, start: Checkpoint) -> None:
    """Make a new session's model what it was at a checkpoint: its shape, and what training had learnt. Collective."""
    add_trainables(session, cut_to=plans(session, start.state))
    restore(session, start)


def restore(session: Session, start: Checkpoint) -> None:
    """Put back what training had learnt into a session whose model has the right shape. Collective."""
    saved = start.state
    tensors = distributed.broadcast_tensors(start.tensors() if distributed.rank() == 0 else None)

    def below(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    moments = {key: below(f"{key}/") for key in state.MOMENTS}
    state.restore(session.engine, state.TrainingState(below("master/"), moments, saved["optimizer_steps"]))
    gates.apply_mask(session.model, session.plan.mask()[session.present.mask()])
    write_latency(session)
    session.step = saved["step"]
    session.teacher = tensors.get("teacher")
    if saved["token_teacher"]:
        session.teacher = distributed.together(
            lambda: token_teacher.open_again(session.output_dir / token_teacher.FOLDER)
        )
    session.average = WeightAverage(below("average/"), saved["average_count"])
    session.report["metric"]["teacher"] = saved["teacher_metric"]
    session.report["progress"] = list(saved["progress"])
    if session.scores is not None:
        session.scores.value = tensors.get("scores")
    noted = distributed.broadcast_object(noted_rebuilds(session.config))
    session.rebuilt = noted | {int(step): rebuilt for step, rebuilt in saved["rebuilt"].items()}
    restore_of_ranks(session, saved, tensors)
    restore_marks(session, saved)


def restore_of_ranks(session: Session, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """What was each rank's own: given back to it, or shared out where the number of ranks is another."""
    rank, same = distributed.rank(), saved["world_size"] == distributed.world_size()
    if session.recorder is not None and "window" in tensors:
        window = tensors["window"]
        if same:
            session.recorder.restore(window[rank])
        elif rank == 0:
            session.recorder.restore(window.sum(0))
    losses = torch.tensor([of_rank["losses"] for of_rank in saved["ranks"]])  # [ranks, steps]
    session.losses = list((losses[rank] if same else losses.mean(0)).to(session.device))
    if not same or f"random/{session.device.type}" not in tensors:
        seed = session.config.train.seed * 1_000_003 + saved["step"] * 1009 + rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        return
    mine = saved["ranks"][rank]
    torch.set_rng_state(tensors["random/cpu"][rank].clone())
    if session.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"][rank].clone(), session.device)
    version, internal, gauss = mine["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = mine["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def restore_marks(session: Session, saved: Mapping[str, Any]) -> None:
    """Clocks and memory go on as one run's."""
    times, marks = saved["clocks"], saved["memory"]
    session.seconds = dict(times["seconds"])
    session.cpu_seconds = dict(times["cpu_seconds"])
    for name in ("step_times", "step_cpu_times"):
        getattr(session, name).seconds = {int(size): list(taken) for size, taken in times[name].items()}
    session.build_seconds, session.rebuild_seconds = times["build"], times["rebuild"]
    session.live_bytes, session.peak_bytes = dict(marks["live"]), dict(marks["peak"])
    session.peak.reset()
    session.peak.before = int(marks["now"])
    if marks["micro_batch"] == session.sampler.micro_batch_size:
        session.activation_bytes, session.watched_length = marks["activations"], marks["watched_length"]
