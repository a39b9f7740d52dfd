"""Loads GLUE from the hub or from a folder with the official TSV files."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunadapt_ds import hub
from prunadapt_ds.data.readers import Columns, read_official_tsv, stream_official_tsv
from prunadapt_ds.data.tasks import HUB_DATASET, TRAIN, BlindSet, Task
from prunadapt_ds.errors import Problem, UserError

MAX_CORRUPT_FRACTION = 0.01
"""A few rows of the official QQP files are truncated; they are skipped, as on the hub. A larger share is an error."""


def load_tsv(task: Task, data_dir: str, *, trains: bool) -> dict[str, Columns]:
    """Load the development sets, by key, and the training set if `trains`, from `data_dir/<task.folder>`.

    Raises UserError with the problems of all files."""
    assert task.folder is not None, f"{task.name} has no official files"
    problems: list[Problem] = []
    loaded: dict[str, Columns] = {}
    files = {TRAIN: "train.tsv"} if trains else {}
    files |= {split.key: split.tsv for split in task.validation_splits}
    for key, name in files.items():
        try:
            loaded[key] = _tsv_columns(task, Path(data_dir) / task.folder / name)
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)
    return loaded


def _tsv_columns(task: Task, path: Path) -> Columns:
    rows = read_official_tsv("data_dir", path)
    header: list[str] = []
    if task.has_header:
        header = rows.pop(0)[1] if rows else []
        missing = [name for name in task.tsv_columns if name not in header]
        if missing:
            raise _file_problem(path, f"columns {missing} are missing; found {header}")
    places = [header.index(name) if header else int(name) for name in task.tsv_columns]
    if not rows:
        raise _file_problem(path, "has no rows; give the official file")
    whole = [(line, row) for line, row in rows if len(row) > max(places) and row[places[-1]]]
    if len(whole) < len(rows):
        bad = next(line for line, row in rows if len(row) <= max(places) or not row[places[-1]])
        count = len(rows) - len(whole)
        if count > MAX_CORRUPT_FRACTION * len(rows):
            raise _file_problem(path, f"line {bad} and {count - 1} more have too few columns or no label; is it a TSV?")
        warnings.warn(f"{path}: left out {count} of {len(rows)} rows with too few columns", stacklevel=2)
    *texts, label = places
    columns: Columns = {f"sentence{i}": [row[place] for _, row in whole] for i, place in enumerate(texts, start=1)}
    columns["label"] = [_tsv_label(task, row[label], path, line) for line, row in whole]
    return columns


def _tsv_label(task: Task, text: str, path: Path, line: int) -> int | float:
    """The label in a cell: official files give either its name or its number. Raises UserError for anything else."""
    try:
        if task.is_regression:
            score = float(text)
            if not math.isfinite(score):
                raise ValueError(text)
            return score
        number = task.label_names.index(text) if text in task.label_names else int(text)
        if 0 <= number < len(task.label_names):
            return number
        expected = f"outside 0..{len(task.label_names) - 1}"
    except ValueError:
        expected = "not a finite number" if task.is_regression else f"none of {', '.join(task.label_names)}"
    raise _file_problem(path, f"line {line}: label {text!r} is {expected}; is it the official {task.name} file?")


def stream_blind(task: Task, blind: BlindSet, data_dir: str) -> Iterator[dict[str, str]]:
    """Yield every row of a test set as sentence1[, sentence2], in order.

    A truncated row is yielded too, with an empty string for each missing text: the leaderboard wants an answer for every row.
    Raises UserError, when it reaches the offending row, if the file's index does not count 0, 1, 2, ... or the file is
    otherwise not the official one.
    """
    path = Path(data_dir) / blind.path
    rows = stream_official_tsv("data_dir", path)
    _, header = next(rows, (0, []))
    missing = [name for name in blind.columns if name not in header]
    if missing:
        raise _file_problem(
            path, f"columns {missing} are missing; found {header}; is it the official {task.name} test set?"
        )
    index, *texts = (header.index(name) for name in blind.columns)
    count = short = 0
    for line, row in rows:
        if index >= len(row) or row[index] != str(count):
            found = row[index] if index < len(row) else None
            raise _file_problem(path, f"line {line}: index {found!r} where {count} was expected; is the file complete?")
        count += 1
        if len(row) <= max(texts):
            short += 1
            if short > MAX_CORRUPT_FRACTION * blind.rows:
                raise _file_problem(path, f"line {line} and {short - 1} before it have too few columns; is it a TSV?")
        yield {f"sentence{i}": row[place] if place < len(row) else "" for i, place in enumerate(texts, start=1)}
    if not count:
        raise _file_problem(path, "has no rows; give the official file")


def _file_problem(path: Path, remedy: str) -> UserError:
    return UserError(Problem("data_dir", str(path), remedy))


def load_hub(task: Task, *, trains: bool) -> dict[str, Any]:
    """Load the development sets, by key, and the training set if `trains`, from the hub, or from the local cache if the hub
    cannot be reached.

    Raises UserError within 5 seconds if neither is available. The datasets library locks its cache, so any number of
    processes may call this at once."""
    import datasets

    reason = None
    if not datasets.config.HF_HUB_OFFLINE:
        reason = hub.unreachable(lambda api, timeout: api.dataset_info(HUB_DATASET, timeout=timeout))
    try:
        with _offline() if reason else contextlib.nullcontext():
            names = {TRAIN: "train"} if trains else {}
            names |= {split.key: split.hub for split in task.validation_splits}
            sets = datasets.load_dataset(HUB_DATASET, task.name, split=list(names.values()))
    # Three libraries and the network raise a dozen unrelated types here; the remedy is the same for all.
    except Exception as error:
        reason = reason or f"{type(error).__name__}: {hub.first_line(error)}"
        remedy = (
            f"could not be loaded from the hub ({reason}); offline, use --data_dir DIR with the official "
            "GLUE files, --train_file and --validation_file with your own, or --task_name sample"
        )
        raise UserError(Problem("task_name", task.name, remedy)) from None
    return dict(zip(names, sets, strict=True))


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Make `datasets` use its cache without asking the hub first; it has no argument for that."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
