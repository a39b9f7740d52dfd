"""The tasks as one table. A new task is one row of `TASKS`; nothing else needs to know its name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunadapt_ds.errors import Problem, UserError

if TYPE_CHECKING:
    from datasets import Dataset

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class Split:
    """One development set: its key in `TaskData.validation`, its split on the hub, its official file."""

    key: str
    hub: str
    tsv: str


@dataclass(frozen=True)
class Task:
    """What loading, labelling and scoring need to know about a task."""

    name: str
    folder: str | None
    """Folder of the official TSV files under `--data_dir`; None where there are none."""
    sentence1: str
    """Column on the hub."""
    sentence2: str | None
    """Column on the hub; None for single sentences."""
    label_names: tuple[str, ...]
    """In the order of the hub's integers; () means regression."""
    metrics: tuple[str, ...]
    """Keys of `prunadapt_ds.data.metrics.MEASURES`; the score is their mean."""
    tsv_columns: tuple[str, ...] = ()
    """In the official files: sentence1[, sentence2], label. Digits are places in a file without header."""
    validation_splits: tuple[Split, ...] = (Split("validation", "validation", "dev.tsv"),)

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def has_header(self) -> bool:
        return not self.tsv_columns[0].isdigit()


_PAIR = ("sentence1", "sentence2")
_PAIR_TSV = (*_PAIR, "label")
_MNLI_SPLITS = (
    Split("matched", "validation_matched", "dev_matched.tsv"),
    Split("mismatched", "validation_mismatched", "dev_mismatched.tsv"),
)
_ENTAILMENT = ("entailment", "not_entailment")
_ACCURACY = ("accuracy",)
_MATTHEWS = ("matthews_correlation",)
_ACCURACY_F1 = ("accuracy", "f1")
_CORRELATIONS = ("pearson", "spearmanr")

# fmt: off
_ROWS = (
    Task("cola", "CoLA", "sentence", None, ("unacceptable", "acceptable"), _MATTHEWS, ("3", "1")),
    Task("sst2", "SST-2", "sentence", None, ("negative", "positive"), _ACCURACY, ("sentence", "label")),
    Task("mrpc", "MRPC", *_PAIR, ("not_equivalent", "equivalent"), _ACCURACY_F1,
         ("#1 String", "#2 String", "Quality")),
    Task("stsb", "STS-B", *_PAIR, (), _CORRELATIONS, (*_PAIR, "score")),
    Task("qqp", "QQP", "question1", "question2", ("not_duplicate", "duplicate"), _ACCURACY_F1,
         ("question1", "question2", "is_duplicate")),
    Task("mnli", "MNLI", "premise", "hypothesis", ("entailment", "neutral", "contradiction"), _ACCURACY,
         (*_PAIR, "gold_label"), _MNLI_SPLITS),
    Task("qnli", "QNLI", "question", "sentence", _ENTAILMENT, _ACCURACY, ("question", "sentence", "label")),
    Task("rte", "RTE", *_PAIR, _ENTAILMENT, _ACCURACY, _PAIR_TSV),
    Task("wnli", "WNLI", *_PAIR, ("not_entailment", "entailment"), _ACCURACY, _PAIR_TSV),
    Task("sample", None, *_PAIR, ("negative", "positive"), _ACCURACY),
)
# fmt: on
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}
assert len(TASKS) == len(_ROWS), "two rows of the task table have the same name"

OWN_METRICS = {"own_classification": ("accuracy", "macro_f1"), "own_regression": _CORRELATIONS}
"""Measures for the user's own files, by the name such a task goes by."""


@dataclass(frozen=True)
class TaskData:
    """A loaded task. Raw columns: sentence1[, sentence2] (text), label (int64, float64 for regression) and
    index (int64), the row's place 0..N-1 in its whole split, whatever subset was taken."""

    task: Task
    train: Dataset
    validation: dict[str, Dataset]
    """Key "validation"; MNLI has "matched" and "mismatched"."""
    test: Dataset | None
    label_names: tuple[str, ...]
    num_labels: int
    """Outputs of the head: the number of classes, 1 for regression."""
    is_regression: bool
    is_language: bool = False
    """Rows are token sequences with a label for each token; see `language.py`."""


def unknown_task(name: str) -> Problem:
    """The problem to report for a `--task_name` that is not in the table."""
    close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), TASKS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return Problem("task_name", name, f"unknown task; {hint}known are {', '.join(TASKS)}")


def get_task(name: str) -> Task:
    """The table's row. Raises UserError with a "did you mean" for an unknown name."""
    if name not in TASKS:
        raise UserError(unknown_task(name))
    return TASKS[name]
