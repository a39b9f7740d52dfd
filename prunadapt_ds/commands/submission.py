"""Predicts GLUE's test sets and writes a submission for the leaderboard: one zip with a file for each set.

Every file has the header "index<TAB>prediction" and a line for each row of the test set, in its order. The task table
(prunadapt_ds/data/tasks.py) lists the sets, how their labels are spelled, and their official files.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunadapt_ds import answers, distributed, files
from prunadapt_ds.data import TASKS, BlindSet, Task, stream_blind, unknown_task
from prunadapt_ds.errors import Problem, PrunadaptError, UserError
from prunadapt_ds.hub import could_be_id

HEADER = "index\tprediction"


@dataclass(frozen=True)
class Source:
    """The folder whose model predicts the test sets of a task. `remark`: printed after its name."""

    task: Task
    folder: str
    remark: str = ""


def run(
    output: Path,
    *,
    data_dir: str,
    run_root: str | None,
    task_models: Sequence[str],
    trust_remote_code: bool,
    max_seq_length: int | None,
    batch_size: int,
) -> None:
    """Predict all sets for which there are a model and a file, check every answer file, and write `output`. Collective.

    Rank 0 reports what is missing. max_seq_length: None for each model's own, from the run that wrote it. Raises UserError,
    before any model is loaded, for invalid folders and files.
    """
    sources = distributed.on_rank_0("looking for runs", lambda: find_sources(run_root, task_models))
    by_task = {source.task.name: source for source in sources}
    present = distributed.on_rank_0("reading the test sets", lambda: check_files(by_task, data_dir))
    distributed.on_rank_0(f"writing {output}", lambda: check_writable(output))
    contents: dict[str, str] = {}
    for source in by_task.values():
        sets = [blind for blind in source.task.blind_sets if blind.submission in present]
        if not sets:
            continue
        _say(f"{source.task.name}: {source.folder}{source.remark}")
        answerer = answers.load(source.folder, trust_remote_code, max_seq_length, batch_size, task=source.task)
        for blind in sets:
            contents[blind.submission] = render(answer(answerer, source.task, blind, data_dir))
            _say(f"  {blind.submission}: {present[blind.submission]} rows")

    def write() -> None:
        for task, blind in blind_sets():
            if blind.submission in contents and (
                wrong := problems(task, contents[blind.submission], present[blind.submission])
            ):
                raise PrunadaptError(f"{blind.submission} would not be accepted by the leaderboard: {wrong[0]}")
        write_zip(output, contents)

    distributed.on_rank_0(f"writing {output}", write)
    for line in remarks(by_task, present):
        _say(line)
    _say(f"wrote {output}")


def blind_sets() -> list[tuple[Task, BlindSet]]:
    """All test sets that the leaderboard requires, each with its task."""
    return [(task, blind) for task in TASKS.values() for blind in task.blind_sets]


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------- sources


def find_sources(run_root: str | None, task_models: Sequence[str]) -> list[Source]:
    """A folder for each task: the one in `task_models`, else the run below `run_root` with the best development score.

    Raises UserError with every invalid entry, and if nothing is found."""
    known = [task.name for task in TASKS.values() if task.blind_sets]
    found: dict[str, Source] = {}
    wrong: list[Problem] = []
    for word in task_models:
        name, _, folder = word.partition("=")
        if not folder:
            wrong.append(
                Problem("task_models", word, "must have the form TASK=DIR, e.g. rte=outputs/rte/exports/compact")
            )
        elif name not in known:
            remedy = unknown_task(name).remedy if name not in TASKS else "has no test set on the leaderboard"
            wrong.append(Problem("task_models", word, remedy))
        elif name in found:
            wrong.append(Problem("task_models", word, f"names {name} twice"))
        elif not Path(folder).is_dir() and not could_be_id(folder):
            wrong.append(Problem("task_models", word, "there is no such folder"))
        else:
            found[name] = Source(TASKS[name], folder)
    if run_root is not None and not Path(run_root).is_dir():
        wrong.append(Problem("run_root", run_root, "there is no such folder"))
    elif run_root is not None:
        for source in _best_runs(Path(run_root)):
            if source.task.name in found:
                continue
            found[source.task.name] = source
            if not Path(source.folder, "config.json").is_file():
                wrong.append(Problem("run_root", run_root, f"{source.folder} is missing; export the run again"))
        if not found and not wrong:
            remedy = "holds no finished run of a GLUE task (report.json in it, or up to three folders below)"
            wrong.append(Problem("run_root", run_root, remedy))
    if wrong:
        raise UserError(wrong)
    return [found[name] for name in known if name in found]


def _best_runs(root: Path) -> list[Source]:
    """For each task, the complete run with the best score on its development sets; ties go to the shallowest, first path."""
    best: dict[str, tuple[float, Path]] = {}
    counts: dict[str, int] = {}
    for depth in range(4):
        for path in sorted(root.glob("*/" * depth + "report.json")):
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
                name, score = report["task"], float(report["metric"]["exported"]["score"])
                if report["status"] != "complete" or not TASKS[name].blind_sets:
                    continue
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not finished, or not a run of ours
            counts[name] = counts.get(name, 0) + 1
            if name not in best or score > best[name][0]:
                best[name] = (score, path.parent)
    found = []
    for name, (score, folder) in best.items():
        of = f", best of {counts[name]} runs" if counts[name] > 1 else ""
        remark = f" (development score {100 * score:.1f}{of})"
        found.append(Source(TASKS[name], str(folder / "exports" / "compact"), remark))
    return found


def check_files(sources: dict[str, Source], data_dir: str) -> dict[str, int]:
    """The number of rows in every test file that exists and has a model. Reads each once; raises UserError for invalid ones."""
    if not Path(data_dir).is_dir():
        raise UserError(
            Problem("data_dir", data_dir, "there is no such folder; give the one that holds CoLA, SST-2, ...")
        )
    present: dict[str, int] = {}
    wrong: list[Problem] = []
    for source in sources.values():
        for blind in source.task.blind_sets:
            if not (Path(data_dir) / blind.path).exists():
                continue
            try:
                present[blind.submission] = sum(1 for _ in stream_blind(source.task, blind, data_dir))
            except UserError as error:
                wrong += error.problems
    if not present and not wrong:
        names = ", ".join(blind.path for source in sources.values() for blind in source.task.blind_sets)
        wrong.append(Problem("data_dir", data_dir, f"has none of {names}"))
    if wrong:
        raise UserError(wrong)
    return present


# ----------------------------------------------------------------------------------------------------------- answers


def answer(answerer: answers.Answerer, task: Task, blind: BlindSet, data_dir: str) -> list[str]:
    """The predictions for one set, in the file's order and in the leaderboard's spelling. Collective."""
    source = answers.chunks(stream_blind(task, blind, data_dir)) if distributed.rank() == 0 else iter(())
    found: list[str] = []
    for chunk in answers.shared(f"reading {blind.path}", source):
        found += spell(task, answerer.logits(chunk))
    return found


def spell(task: Task, logits: Tensor) -> list[str]:
    """N predictions in the leaderboard's spelling. logits: [N, C], columns in the order of the task's labels."""
    if not task.is_regression:
        words = task.submitted or task.label_names
        return [words[i] for i in logits.argmax(dim=1).tolist()]
    assert task.submitted_range is not None
    least, most = task.submitted_range
    return [f"{min(max(value, least), most):.3f}" for value in logits[:, 0].tolist()]


def render(predictions: Sequence[str]) -> str:
    """The text of one file."""
    return "\n".join([HEADER, *(f"{i}\t{word}" for i, word in enumerate(predictions))]) + "\n"


def problems(task: Task, text: str, rows: int) -> list[str]:
    """The reasons why the leaderboard would reject a file for a set of `rows` rows; [] if it would not."""
    lines = text.split("\n")
    if lines[0] != HEADER:
        return [f"the header is {lines[0]!r}"]
    if lines.pop() != "":
        return ["the last line has no newline"]
    found = [] if len(lines) - 1 == rows else [f"{len(lines) - 1} predictions for {rows} rows"]
    for i, line in enumerate(lines[1:]):
        index, tab, word = line.partition("\t")
        if index != str(i) or not tab:
            found.append(f"line {i + 2} is {line!r}, expected index {i}, a tab and a prediction")
        elif not _is_answer(task, word):
            found.append(f"line {i + 2}: {word!r} is not a valid prediction for {task.name}")
    return found


def _is_answer(task: Task, word: str) -> bool:
    if not task.is_regression:
        return word in (task.submitted or task.label_names)
    assert task.submitted_range is not None
    try:
        value = float(word)
    except ValueError:
        return False
    return math.isfinite(value) and task.submitted_range[0] <= value <= task.submitted_range[1]


def check_writable(output: Path) -> None:
    """Raise UserError if no file can be made there: better now than after hours of predictions."""
    try:
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise _unwritable(output, error) from error


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(Problem("output_file", str(output), f"cannot be written ({error.strerror})"))


def write_zip(output: Path, contents: dict[str, str]) -> None:
    """Write the files to the top level of a zip, sorted by name; complete or not at all.

    The same contents give the same bytes. Raises UserError if it cannot be written.
    """
    try:
        with files.whole_file(output, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(contents):
                entry = zipfile.ZipInfo(name)  # with the default date, so that the bytes do not depend on the time
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, contents[name], zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise _unwritable(output, error) from error


def remarks(sources: dict[str, Any], present: dict[str, int]) -> list[str]:
    """Messages about sets that are missing and about files that are not the official ones."""
    lines = []
    for task, blind in blind_sets():
        if blind.submission in present:
            if present[blind.submission] != blind.rows:
                lines.append(
                    f"not official: {blind.path} has {present[blind.submission]:,} rows, the official file {blind.rows:,}"
                )
        else:
            why = f"{blind.path} is not there" if task.name in sources else f"no model of {task.name}"
            lines.append(f"missing: {blind.submission} ({why})")
    if any(line.startswith("missing") for line in lines):
        lines.append(
            f"The leaderboard requires all {len(blind_sets())} files: take the missing ones from its sample submission."
        )
    return lines
