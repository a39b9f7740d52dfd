"""Gathers the reports of `ROOT/<task>/seed<n>/` into one table of GLUE, with a reason for every run that failed or is missing.

As on the leaderboard, a task's score is the mean of its measures (for MNLI over both development sets), and GLUE's score is
the mean over tasks. It is marked as an average of all tasks only if every run is complete.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunadapt_ds import files
from prunadapt_ds.data.tasks import GLUE
from prunadapt_ds.errors import Problem, UserError, exit_code_of
from prunadapt_ds.options import Help, Parser, as_called

KINDS = ("teacher", "masked", "exported")


@dataclass(frozen=True)
class Cell:
    """One run. status: complete, failed, interrupted or missing. reason: why it is not complete.

    scores: by kind of model, at most 1; None if the run has no such model."""

    task: str
    seed: int
    status: str
    reason: str = ""
    scores: dict[str, float | None] | None = None
    measures: dict[str, float] | None = None
    kept: float | None = None  # share of the encoder's parameters
    speedup: float | None = None


def read_cell(root: Path, task: str, seed: int) -> Cell:
    """Read the folder of one run."""
    folder = root / task / f"seed{seed}"
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        status = report["status"]
        if status == "complete" and not _failed_since(folder):
            return _complete(task, seed, report)
    except FileNotFoundError:
        status = ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        return Cell(task, seed, "failed", f"report.json cannot be read: {type(error).__name__}: {error}")
    code = _text(folder / "exit_code").strip()
    if not folder.is_dir():
        return Cell(task, seed, "missing", "was never started")
    if code == "running":
        return Cell(task, seed, "missing", "was started but never ended: look at the job's log")
    if code == "75" or (not code and status == "interrupted"):
        return Cell(task, seed, "interrupted", "stopped with a checkpoint: start it again to resume")
    reason = _last_error(_text(folder / "log.txt"))
    return Cell(task, seed, "failed", (f"exit code {code}: " if code else "") + (reason or "look at log.txt"))


def _failed_since(folder: Path) -> bool:
    """Whether a later job, with other options for example, failed in the folder of a complete run. The report is not its own."""
    code = folder / "exit_code"
    try:
        is_newer = code.stat().st_mtime_ns > (folder / "report.json").stat().st_mtime_ns
    except OSError:
        return False
    return is_newer and _text(code).strip() not in ("", "0", "running")


def _complete(task: str, seed: int, report: dict[str, Any]) -> Cell:
    metric, params = report["metric"], report["params"]
    scores = {kind: metric[kind]["score"] if metric[kind] else None for kind in KINDS}
    measures = {name: value for name, value in (metric["exported"] or {}).items() if name != "score"}
    kept = params["encoder_kept"] / params["encoder_dense"]
    numbers = [*scores.values(), *measures.values(), kept, report["latency"]["speedup"]]
    if not all(number is None or isinstance(number, (int, float)) for number in numbers):
        raise TypeError("a figure is not a number")
    return Cell(task, seed, "complete", "", scores, measures, kept, report["latency"]["speedup"])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _last_error(log: str) -> str:
    """The program's own last error message, else the last line of a traceback, else SLURM's last error message.

    Of the last job alone: a folder's log has all jobs that ran there, each below a line of slurm/common.sh.
    """
    lines = [line.strip() for line in log.splitlines()]
    starts = [i for i, line in enumerate(lines) if line.startswith("start of job ")]
    lines = lines[starts[-1] + 1 :] if starts else lines
    for pattern in (r"errors?:", r"(\w+\.)*\w*(Error|Exception)\b", r"(srun|slurmstepd): error"):
        for i in range(len(lines) - 1, -1, -1):
            if re.match(pattern, lines[i]):
                listed = "; ".join(line for line in lines[i + 1 : i + 4] if re.match(r"[\w.]+=", line))
                return listed if lines[i] == "errors:" else lines[i].removeprefix("error: ")
    return ""


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of `values`; None if there are none or one of them is None."""
    found = list(values)
    present = [value for value in found if value is not None]
    return statistics.fmean(present) if found and len(present) == len(found) else None


def summary(cells: Sequence[Cell], tasks: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Scores per task, over its complete seeds, and averages over tasks. "average" is null unless every cell is complete."""
    by_task: dict[str, Any] = {}
    for task in tasks:
        done = [c for c in cells if c.task == task and c.scores]
        row: dict[str, Any] = {"seeds": len(done), "of": len(seeds)}
        for kind in KINDS:
            row[kind] = mean(c.scores[kind] for c in done if c.scores)
        exported = [s for c in done if c.scores and (s := c.scores["exported"]) is not None]
        row["deviation"] = statistics.stdev(exported) if len(exported) > 1 else None
        names = list(dict.fromkeys(name for c in done for name in c.measures or {}))
        row["measures"] = {name: mean((c.measures or {}).get(name) for c in done) for name in names}
        row["kept"], row["speedup"] = mean(c.kept for c in done), mean(c.speedup for c in done)
        by_task[task] = row
    whole = all(c.status == "complete" for c in cells)
    average = {kind: mean(row[kind] for row in by_task.values()) if whole else None for kind in KINDS}
    there = {kind: mean(row[kind] for row in by_task.values() if row["seeds"]) for kind in KINDS}
    return {
        "tasks": by_task,
        "average": average,
        "average_of_what_is_there": there,
        "is_all_of_glue": whole and set(tasks) == set(GLUE),
        "cells": [asdict(c) for c in cells],
    }


def _number(value: float | None, scale: float = 100, digits: int = 1) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def markdown(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "| task | seeds | teacher | masked | exported | measures of the export | parameters kept, % | speed-up |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for task, row in found["tasks"].items():
        lacking = [c["status"] for c in found["cells"] if c["task"] == task and c["status"] != "complete"]
        seeds = f"{row['seeds']} of {row['of']}" + (f" ({', '.join(sorted(set(lacking)))})" if lacking else "")
        exported = _number(row["exported"]) + (
            f" ± {_number(row['deviation'])}" if row["deviation"] is not None else ""
        )
        measures = ", ".join(f"{name} {_number(value)}" for name, value in row["measures"].items()) or "-"
        cells = (task, seeds, _number(row["teacher"]), _number(row["masked"]), exported, measures)
        lines.append(f"| {' | '.join(cells)} | {_number(row['kept'])} | {_number(row['speedup'], 1, 2)} |")
    complete = found["average"]["exported"] is not None
    average = found["average"] if complete else found["average_of_what_is_there"]
    name = "**average**" if complete else "average of complete runs, **not of all**"
    if complete and not found["is_all_of_glue"]:
        name = "**average** of these tasks"
    lines.append(f"| {name} | | {' | '.join(_number(average[kind]) for kind in KINDS)} | | | |")
    failed = [c for c in found["cells"] if c["status"] != "complete"]
    if failed:
        lines += ["", "Not in the table:", ""]
        lines += [f"- {c['task']}, seed {c['seed']}: {c['status']}. {c['reason'].replace('|', '/')}" for c in failed]
    return "\n".join(lines) + "\n"


def gather_tensorboard(root: Path, cells: Iterable[Cell]) -> None:
    """Copy the event files of all runs into one folder that TensorBoard can read and that can be moved."""
    for task in GLUE:
        for copy in (root / "tensorboard").glob(f"{task}-seed*"):
            shutil.rmtree(copy)
    for c in cells:
        events = root / c.task / f"seed{c.seed}" / "runs"
        if events.is_dir():
            shutil.copytree(events, root / "tensorboard" / f"{c.task}-seed{c.seed}")


def gather(root: Path, tasks: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Write glue.json, glue.md and tensorboard/ to `root`. Returns the content of glue.json.

    Raises UserError for an unknown task and if `root` does not exist or cannot be written.
    """
    tasks, seeds = list(dict.fromkeys(tasks)), list(dict.fromkeys(seeds))  # duplicates count once
    problems = [Problem("tasks", t, f"not a GLUE task; known are {', '.join(GLUE)}") for t in tasks if t not in GLUE]
    if not os.path.isdir(root):
        problems.append(Problem("root", str(root), "there is no such folder"))
    if problems:
        raise UserError(problems)
    cells = [read_cell(root, task, seed) for task in tasks for seed in seeds]
    found = summary(cells, tasks, seeds)
    try:
        with files.owner_writes_alone():
            files.replace(root / "glue.json", json.dumps(found, indent=2) + "\n")
            files.replace(root / "glue.md", markdown(found))
            gather_tensorboard(root, cells)
    except OSError as error:
        raise UserError(Problem("root", str(root), f"cannot be written ({error.strerror or error})")) from error
    return found


_EXAMPLE = "prunadapt glue-table outputs/glue --tasks rte mrpc --seeds 0 1 2"


def main(argv: Sequence[str] | None = None) -> int:
    """Write and print the table. Returns 0 if every cell is complete, 1 if not, 2 after a user error."""
    parser = Parser(description=__doc__, epilog=f"example: {as_called(_EXAMPLE)}", formatter_class=Help)
    parser.add_argument("root", type=Path, help="folder that contains <task>/seed<n>/report.json")
    parser.add_argument("--tasks", nargs="+", default=list(GLUE), metavar="TASK", help="[all nine]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="[0]")

    def work() -> int:
        options = parser.parsed(argv)
        return show(options.root, options.tasks, options.seeds)

    return exit_code_of(work)


def show(root: Path, tasks: Sequence[str], seeds: Sequence[int]) -> int:
    """Gather and print the table. Returns the exit code. Raises UserError like `gather`."""
    found = gather(root, tasks, seeds)
    print(markdown(found))
    print(
        f"written: {root}/glue.json, glue.md; "
        f"tensorboard --logdir {shlex.quote(f'{root}/tensorboard')} --host 127.0.0.1"
    )
    return 0 if all(c["status"] == "complete" for c in found["cells"]) else 1
