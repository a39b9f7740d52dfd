"""The table of tasks. To add a task, add a row to `_ROWS`. Nothing else knows its name, but for slurm/glue_all.sh if it is one
of GLUE's, which a test holds against this table."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunadapt_ds.errors import Problem, UserError

if TYPE_CHECKING:
    from datasets import Dataset

HUB_DATASET = "nyu-mll/glue"
TRAIN = "train"  # key of the training set among a task's sets


@dataclass(frozen=True)
class Split:
    """One development set: its key in `TaskData.validation`, its split on the hub, its official file."""

    key: str
    hub: str
    tsv: str


@dataclass(frozen=True)
class BlindSet:
    """One test set without labels, which the leaderboard scores."""

    submission: str
    """Name of the file with its answers in a submission."""
    path: str
    """Its official file under `--data_dir`."""
    columns: tuple[str, ...]
    """Columns of that file: index, sentence1[, sentence2]. It always has a header, and other columns than train and dev."""
    rows: int
    """Number of rows in the official file."""


@dataclass(frozen=True)
class Task:
    """What loading, labelling and scoring need to know about a task."""

    name: str
    folder: str | None
    """Folder of the official TSV files under `--data_dir`; None if there are none."""
    sentence1: str
    """Column on the hub."""
    sentence2: str | None
    """Column on the hub; None for single sentences."""
    label_names: tuple[str, ...]
    """Names in the order of the hub's integer labels; () for regression."""
    metrics: tuple[str, ...]
    """Keys of `prunadapt_ds.data.metrics.MEASURES`; the score is their mean."""
    tsv_columns: tuple[str, ...] = ()
    """Columns of the official files: sentence1[, sentence2], label. Digits are positions in a file without a header."""
    validation_splits: tuple[Split, ...] = (Split("validation", "validation", "dev.tsv"),)
    blind_sets: tuple[BlindSet, ...] = ()
    """Test sets that a model of this task answers in a submission to the leaderboard."""
    submitted: tuple[str, ...] = ()
    """How the leaderboard spells the labels, in the order of `label_names`; () if it uses the same names."""
    submitted_range: tuple[float, float] | None = None
    """For regression: the range to which submitted numbers are clipped."""
    is_language: bool = False
    """Rows are token sequences with a label for each token; see `language.py`."""

    @property
    def is_regression(self) -> bool:
        return not self.label_names and not self.is_language

    @property
    def num_labels(self) -> int:
        """Outputs of the head: the number of classes, 1 for regression, 0 for a language model, which has none."""
        return 0 if self.is_language else len(self.label_names) or 1

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

_BINARY = ("0", "1")  # how the leaderboard spells the labels of most tasks


def _blind(folder: str, rows: int, *columns: str) -> tuple[BlindSet, ...]:
    return (BlindSet(f"{folder}.tsv", f"{folder}/test.tsv", columns, rows),)


_BLIND_PAIR = ("index", *_PAIR)
_MNLI_BLIND = (
    BlindSet("MNLI-m.tsv", "MNLI/test_matched.tsv", _BLIND_PAIR, 9796),
    BlindSet("MNLI-mm.tsv", "MNLI/test_mismatched.tsv", _BLIND_PAIR, 9847),
    BlindSet("AX.tsv", "diagnostic/diagnostic.tsv", _BLIND_PAIR, 1104),
)

# fmt: off
_ROWS = (
    Task("cola", "CoLA", "sentence", None, ("unacceptable", "acceptable"), _MATTHEWS, ("3", "1"),
         blind_sets=_blind("CoLA", 1063, "index", "sentence"), submitted=_BINARY),
    Task("sst2", "SST-2", "sentence", None, ("negative", "positive"), _ACCURACY, ("sentence", "label"),
         blind_sets=_blind("SST-2", 1821, "index", "sentence"), submitted=_BINARY),
    Task("mrpc", "MRPC", *_PAIR, ("not_equivalent", "equivalent"), _ACCURACY_F1,
         ("#1 String", "#2 String", "Quality"),
         blind_sets=_blind("MRPC", 1725, "index", "#1 String", "#2 String"), submitted=_BINARY),
    Task("stsb", "STS-B", *_PAIR, (), _CORRELATIONS, (*_PAIR, "score"),
         blind_sets=_blind("STS-B", 1379, *_BLIND_PAIR), submitted_range=(0.0, 5.0)),
    Task("qqp", "QQP", "question1", "question2", ("not_duplicate", "duplicate"), _ACCURACY_F1,
         ("question1", "question2", "is_duplicate"),
         blind_sets=_blind("QQP", 390965, "id", "question1", "question2"), submitted=_BINARY),
    Task("mnli", "MNLI", "premise", "hypothesis", ("entailment", "neutral", "contradiction"), _ACCURACY,
         (*_PAIR, "gold_label"), _MNLI_SPLITS, blind_sets=_MNLI_BLIND),
    Task("qnli", "QNLI", "question", "sentence", _ENTAILMENT, _ACCURACY, ("question", "sentence", "label"),
         blind_sets=_blind("QNLI", 5463, "index", "question", "sentence")),
    Task("rte", "RTE", *_PAIR, _ENTAILMENT, _ACCURACY, _PAIR_TSV, blind_sets=_blind("RTE", 3000, *_BLIND_PAIR)),
    Task("wnli", "WNLI", *_PAIR, ("not_entailment", "entailment"), _ACCURACY, _PAIR_TSV,
         blind_sets=_blind("WNLI", 146, *_BLIND_PAIR), submitted=_BINARY),
    Task("sample", None, *_PAIR, ("negative", "positive"), _ACCURACY),
)
# fmt: on
TASKS: dict[str, Task] = {task.name: task for task in _ROWS}
assert len(TASKS) == len(_ROWS), "two rows of the task table have the same name"
GLUE = tuple(task.name for task in _ROWS if task.folder is not None)  # those with official files

OWN_METRICS = {"own_classification": ("accuracy", "macro_f1"), "own_regression": (*_CORRELATIONS, "r2")}
"""Measures for the user's own files, by task name. Correlations alone would praise predictions that are all far off."""


@dataclass(frozen=True)
class TaskData:
    """A loaded task.

    Raw columns: sentence1[, sentence2] (text), label (int64; float64 for regression) and index (int64), the row's position
    0..N-1 in its whole split, even if only a subset was loaded."""

    task: Task
    train: Dataset
    validation: dict[str, Dataset]
    """Key "validation"; MNLI has "matched" and "mismatched"."""


def unknown_task(name: str) -> Problem:
    """The problem to report for a `--task_name` that is not in the table."""
    close = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), TASKS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return Problem("task_name", name, f"unknown task; {hint}known tasks are {', '.join(TASKS)}")


def get_task(name: str) -> Task:
    """The task of that name. Raises UserError, with a "did you mean" if one is close, if there is none."""
    if name not in TASKS:
        raise UserError(unknown_task(name))
    return TASKS[name]
