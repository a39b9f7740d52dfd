"""Keep an interrupted run's state, and go on from it; the files by which a run is recognised."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prunadapt_ds import checkpoint, distributed, files, graphs, snapshot, token_teacher, watchdog
from prunadapt_ds.checkpoint import Checkpoint
from prunadapt_ds.config import SECTIONS, Config
from prunadapt_ds.earlier_run import BY_CONTENT, LATENCY, LEFT_BEHIND, names, options, root_of
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.faults import fault_point
from prunadapt_ds.session import Session, add_trainables

REBUILDS = "rebuilds.json"


def asked_of(session: Session) -> dict[str, Any]:
    return session.options or options(session.config, session.ds)


def config_of(run_dir: Path, saved: Mapping[str, Any]) -> Config:
    """The configuration of the run whose checkpoint holds the state `saved`, for the current number of ranks.

    Options that do not change what is computed have their defaults; model and data are where the run found them when it wrote
    the checkpoint. Raises UserError if nothing says where that was.
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


def begin(session: Session) -> None:
    """Start from scratch: remove what an earlier run left in the folder, so that it is not taken for this run's. Collective."""

    def clear() -> None:
        for _, folder in checkpoint.listed(root_of(session.config)):
            files.discard(folder)
        checkpoint.sweep(root_of(session.config))
        (root_of(session.config) / REBUILDS).unlink(missing_ok=True)
        files.discard(session.output_dir / token_teacher.FOLDER)
        graphs.discard_exports(session.output_dir)
        for sums in (session.output_dir / "scores").glob("*.safetensors"):
            sums.unlink()
        for name in LEFT_BEHIND:
            (session.output_dir / name).unlink(missing_ok=True)
        _write_options(session)  # in place of an earlier run's: without one the rest would be taken for somebody else's

    distributed.on_rank_0("clearing the output folder", clear)
    write_latency(session)


def _write_options(session: Session) -> None:
    """Write run.json, by which the run is recognised. For rank 0."""
    stated = {**asked_of(session), **names(session.config), "identity": session.identity}
    stated |= {"label_scale": dataclasses.astuple(session.label_scale)}
    files.replace(session.output_dir / "run.json", json.dumps(stated, indent=2, sort_keys=True) + "\n")


def keep_options(session: Session) -> None:
    """Write run.json if a run goes on in another folder than the one it began in. Collective."""

    def write() -> None:
        if not (session.output_dir / "run.json").exists():
            _write_options(session)

    distributed.on_rank_0("writing run.json", write)


def write_latency(session: Session) -> None:
    """Write latency.json, the measured table, for people: a resumed run reads it from its checkpoint. Collective."""
    if session.latency is not None:
        text = json.dumps(session.latency, indent=1) + "\n"
        distributed.on_rank_0("writing latency.json", lambda: files.replace(session.output_dir / LATENCY, text))


def note_rebuilds(session: Session) -> None:
    """Record the decisions to rebuild: a run that is interrupted before its next checkpoint must repeat them. Collective."""
    distributed.on_rank_0(
        "writing the decisions to rebuild",
        lambda: files.replace(root_of(session.config) / REBUILDS, json.dumps(session.rebuilt)),
    )


def noted_rebuilds(config: Config) -> dict[int, bool]:
    """The recorded decisions by step; none if the file is missing or damaged."""
    try:
        noted = json.loads((root_of(config) / REBUILDS).read_text())
        return {int(step): bool(rebuilt) for step, rebuilt in noted.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def save(session: Session) -> Path:
    """Write a checkpoint of the run as it is; returns its folder. Collective.

    Raises PrunadaptError on all ranks if the weights are not finite, or the checkpoint cannot be written.
    """
    root = root_of(session.config)
    fault_point(f"checkpoint-{session.step}/begin")
    with session.clocks.timed("checkpoint"), watchdog.resting():
        tensors, saved = snapshot.collect(session)
        saved |= {"options": asked_of(session), "names": names(session.config)}

        def write() -> None:
            saved["metrics_bytes"] = session.tracker.metrics_bytes()
            checkpoint.write(root, session.step, tensors, saved, session.config.output.save_total_limit)

        distributed.on_rank_0(f"writing the checkpoint of step {session.step} below {root}", write)
    fault_point(f"checkpoint-{session.step}/end")
    return root / f"{checkpoint.PREFIX}{session.step}"


def restore(session: Session, start: Checkpoint, *, to_train: bool = True) -> None:
    """Give a new session's model the shape and the training state that it had at a checkpoint. Collective.

    to_train: whether training goes on, which needs the teacher.
    """
    add_trainables(session, cut_to=snapshot.restore_plan(session, start.state))
    snapshot.restore(session, start, to_train=to_train)
    session.rebuilt = distributed.broadcast_object(noted_rebuilds(session.config)) | session.rebuilt
    write_latency(session)
