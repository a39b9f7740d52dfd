"""From logits to a task's measures.

A measure is computed once, over all examples. It is never averaged over batches or ranks: the F1 score or the correlation of
a whole set cannot be derived from those of its parts."""

from __future__ import annotations

import functools
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunadapt_ds.errors import Problem, UserError

if TYPE_CHECKING:
    from prunadapt_ds.data.tasks import Task

SCRIPT = Path(__file__).parent / "glue_metric"
Measure = Callable[[np.ndarray, np.ndarray], float]


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(np.mean(labels == predictions))


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def _macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 averaged over the classes that occur among labels or predictions."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # if there is only one class, it warns and correctly returns 0
        return float(matthews_corrcoef(labels, predictions))


def _correlation(name: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson's or Spearman's correlation, or 0 where it is undefined, as for constant predictions."""
    from scipy import stats

    if len(labels) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(getattr(stats, name)(labels, predictions).statistic)
    return value if np.isfinite(value) else 0.0


def _r2(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The share of the labels' variance that predictions explain: 0 for their mean, negative for worse; 0 if they do not vary."""
    variance = float(np.var(labels))
    return 1 - float(np.mean(np.square(labels - predictions))) / variance if variance > 0 else 0.0


MEASURES: dict[str, Measure] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews,
    "pearson": functools.partial(_correlation, "pearsonr"),
    "spearmanr": functools.partial(_correlation, "spearmanr"),
    "r2": _r2,
}
"""Every measure by its name, GLUE's where it has one: (labels [N], predictions [N]) -> a number, at most 1."""


@functools.cache
def load_metric(config_name: str) -> Any:
    """Load the `evaluate` metric of a task, once per process and without the hub.

    Predictions stay in memory and the experiment ID is unique: by default, `evaluate` writes predictions to a cache file on
    which processes of one machine would collide."""
    import evaluate

    experiment = f"{os.getpid()}-{uuid.uuid4().hex}"
    return evaluate.load(str(SCRIPT), config_name, keep_in_memory=True, experiment_id=experiment)


def compute_metrics(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute the task's measures and "score", their mean.

    `logits` [N, C] fp32 (C=1 for regression) and `labels` [N] hold every example of one development set exactly once; MNLI's
    two sets need one call each. Raises UserError if the set is empty or any logit is not finite."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    assert logits.shape == (len(labels), task.num_labels), f"{logits.shape} logits for {labels.shape} labels"
    broken = int((~np.isfinite(logits)).any(axis=1).sum())
    if broken or not len(labels):
        value = f"not finite for {broken} of {len(labels)} examples" if broken else "none"
        raise UserError(Problem("logits", value, "the run diverged; try a lower --learning_rate"))
    predictions = logits[:, 0] if task.is_regression else logits.argmax(axis=1)
    measured = load_metric(task.name).compute(predictions=predictions, references=labels)
    measures = {name: float(measured[name]) for name in task.metrics}
    return {**measures, "score": float(np.mean(list(measures.values())))}


def measures_of(task: Task, logits: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Compute all measures of all development sets and "score", their mean. Names get the set's as prefix if there are several.

    `logits` and `labels` by set, as in `compute_metrics`; for a language model, `logits` holds the sums that
    `compute_perplexity` takes, and `labels` is not used."""
    merged: dict[str, float] = {}
    for name, values in logits.items():
        found = compute_perplexity(values) if task.is_language else compute_metrics(task, values, labels[name])
        merged |= {f"{name}/{k}" if len(logits) > 1 else k: v for k, v in found.items() if k != "score"}
    return {**merged, "score": sum(merged.values()) / len(merged)}


def compute_perplexity(sums: np.ndarray) -> dict[str, float]:
    """Compute the perplexity of a set, also as "score"; lower is better.

    `sums` [N, 2]: each row's summed negative log-likelihood and its number of predicted tokens. Raises UserError if the
    loss is not finite."""
    per_token = float(sums[:, 0].sum() / max(1.0, sums[:, 1].sum()))
    if not np.isfinite(per_token):
        raise UserError(Problem("logits", "not finite", "the run diverged; try a lower --learning_rate"))
    perplexity = float(np.exp(min(per_token, 700.0)))
    return {"perplexity": perplexity, "score": perplexity}
