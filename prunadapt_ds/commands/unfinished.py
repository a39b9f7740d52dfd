"""Export an interrupted run as it was at its newest intact checkpoint. Nothing is trained, and the run can still go on.

The model is rebuilt from the backbone and the checkpoint's plan and trainables; it is scored, exported and proven as at the
end of a run. Any number of ranks will do; each holds its shard.
"""

from __future__ import annotations

from pathlib import Path

from prunadapt_ds import checkpoint, distributed, files, label_scale, resources, resume
from prunadapt_ds.checkpoint import Checkpoint, Unread
from prunadapt_ds.ds_config import resolve_ds_config
from prunadapt_ds.entry import owned_folder
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.finish import finish
from prunadapt_ds.setup import setup


def find(run_dir: Path) -> Checkpoint | None:
    """The newest intact checkpoint of a run that is not complete, or None. Prints which newer ones are damaged. For rank 0.

    Raises UserError if there is no such folder, or a checkpoint cannot be read; OSError if the report cannot.
    """
    if not run_dir.is_dir():
        remedy = "is a file" if run_dir.exists() else "is missing: there is no such folder"
        raise UserError(Problem("run_dir", str(run_dir), f"{remedy}; name the --output_dir of a run"))
    if files.unless_damaged(run_dir / "report.json").get("status") == "complete":
        return None
    try:
        newest, damaged = checkpoint.newest(run_dir / "checkpoints")
    except Unread as error:
        raise UserError(Problem("run_dir", str(run_dir), f"{error}; try again where it can be read")) from error
    for line in damaged:
        print(line)
    return newest


def is_exported(run_dir: Path, start: Checkpoint) -> bool:
    """Whether exports/compact was already made from this checkpoint. Collective."""

    def look() -> bool:
        try:
            report = files.unless_damaged(run_dir / "report.json")
            is_there = "compact" in report["exports"] and (run_dir / "plan.json").is_file()
            return is_there and report["time"]["steps"] == start.step
        except (KeyError, TypeError):
            return False

    return distributed.on_rank_0(f"reading {run_dir}", look)


def export(run_dir: Path, start: Checkpoint, dtype: str | None, *, trust_remote_code: bool) -> None:
    """Write exports/compact, plan.json, predictions.jsonl and a report with status "interrupted". Collective."""
    with owned_folder(run_dir):
        saved = start.state
        config = distributed.together(lambda: resume.config_of(run_dir, saved))
        config.model.trust_remote_code = trust_remote_code
        config.train.ds_config = str(resources.folder("ds_configs") / "zero3.json")  # the user's may be for other ranks
        config.train.per_device_eval_batch_size = config.eval_batch_size(saved["memory"]["micro_batch"])
        config.output.export_formats = ["compact"]
        config.output.export_dtype = dtype or config.output.export_dtype
        ds = distributed.together(
            lambda: resolve_ds_config(config, distributed.world_size(), lambda: saved["options"]["bf16"])
        )
        session = setup(config, saved, ds=ds, tracked=False)
        label_scale.refuse_dtype(session.label_scale, dtype)
        resume.restore(session, start, to_train=False)
        report = run_dir / "report.json"
        before = distributed.on_rank_0(f"reading {report}", lambda: files.unless_damaged(report))
        facts = {"status": "interrupted", "world_size": saved["world_size"], **saved.get("place", {})}
        facts |= {name: before.get(name) for name in ("launcher", "nodes", "command")}
        finish(session, facts=facts)
        if distributed.rank() == 0:
            score = session.report["metric"]["exported"]["score"]
            print(f"wrote {run_dir / 'exports' / 'compact'}, as after step {start.step}: score {score:.4f}")
