"""Measures against scikit-learn and scipy, in the odd cases too, and tokenization."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from scipy import stats
from sklearn import metrics as sk

from prunadapt_ds.data import OWN_METRICS, TASKS, Task, compute_metrics, load_metric, tokenize
from prunadapt_ds.data.metrics import SCRIPT
from prunadapt_ds.errors import UserError

pytestmark = pytest.mark.fast

OWN = {
    "own_classification": Task("own_classification", None, "a", None, ("x", "y", "z"), ("accuracy", "macro_f1")),
    "own_regression": Task("own_regression", None, "a", None, (), ("pearson", "spearmanr", "r2")),
}
REFERENCE = {
    "accuracy": lambda y, p: sk.accuracy_score(y, p),
    "f1": lambda y, p: sk.f1_score(y, p),
    "macro_f1": lambda y, p: sk.f1_score(y, p, average="macro"),
    "matthews_correlation": lambda y, p: sk.matthews_corrcoef(y, p),
    "pearson": lambda y, p: stats.pearsonr(p, y).statistic,
    "spearmanr": lambda y, p: stats.spearmanr(p, y).statistic,
    "r2": lambda y, p: sk.r2_score(y, p),
}


def drawn(task, n, seed):
    """Logits [n, C] that know something of the labels [n]."""
    rng = np.random.default_rng(seed)
    if task.is_regression:
        labels = rng.uniform(0, 5, n).round(2)
        return (labels + rng.normal(0, 2, n)).astype(np.float32)[:, None], labels
    labels = rng.integers(0, task.num_labels, n)
    return (rng.normal(size=(n, task.num_labels)) + np.eye(task.num_labels)[labels]).astype(np.float32), labels


def test_glues_own_measures():
    measures = {name: task.metrics for name, task in TASKS.items()}
    accuracy = dict.fromkeys(("sst2", "mnli", "qnli", "rte", "wnli", "sample"), ("accuracy",))
    others = {
        "cola": ("matthews_correlation",),
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearmanr"),
    }
    assert measures == {**accuracy, **others}
    assert {name: task.metrics for name, task in OWN.items()} == OWN_METRICS


@pytest.mark.parametrize("task", [*TASKS.values(), *OWN.values()], ids=lambda task: task.name)
@pytest.mark.parametrize("n", [7, 257])
def test_agrees_with_scikit_learn(task, n):
    logits, labels = drawn(task, n, seed=n)
    predictions = logits[:, 0].astype(np.float64) if task.is_regression else logits.argmax(1)
    expected = {name: REFERENCE[name](labels, predictions) for name in task.metrics}
    found = compute_metrics(task, logits, labels)
    assert found.pop("score") == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    assert found == pytest.approx(expected, abs=1e-12) and list(found) == list(task.metrics)


def test_known_values():
    """By hand: 3 of 4 right; one true positive, one false positive, no false negative."""
    logits = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    found = compute_metrics(TASKS["mrpc"], logits, np.array([1, 0, 0, 0]))
    assert found == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "score": (0.75 + 2 / 3) / 2})


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("task", [*TASKS.values(), *OWN.values()], ids=lambda task: task.name)
def test_constant_predictions_and_labels_give_a_number_and_no_warning(task, n):
    logits = np.ones((n, task.num_labels), dtype=np.float32)  # argmax 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrong = compute_metrics(task, logits, np.arange(n) if task.is_regression else np.ones(n, dtype=np.int64))
    assert all(np.isfinite(value) for value in wrong.values())
    assert wrong["score"] == pytest.approx(np.mean([wrong.get("r2", 0.0), *[0.0] * (len(task.metrics) - 1)]))
    assert wrong.get("r2", 0.0) <= 0.0  # the labels' mean explains nothing, and any other constant less


def test_outputs_that_are_not_finite_are_not_scored():
    logits = np.zeros((4, 2), dtype=np.float32)
    logits[1, 0] = np.nan
    with pytest.raises(UserError, match=r"not finite for 1 of 4 examples.*diverged"):
        compute_metrics(TASKS["rte"], logits, np.zeros(4, dtype=np.int64))


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        compute_metrics(TASKS["mnli"], np.zeros((4, 2)), np.zeros(4))


def test_the_script_knows_its_configurations():
    assert load_metric("qqp").compute(predictions=[1, 0], references=[1, 1]) == {"accuracy": 0.5, "f1": 2 / 3}
    assert load_metric("qqp") is load_metric("qqp")
    import evaluate

    with pytest.raises(KeyError, match="choose one of cola"):
        evaluate.load(str(SCRIPT), "glue", keep_in_memory=True)


def test_processes_may_score_at_once_with_an_empty_offline_cache(tmp_path):
    program = (
        "from prunadapt_ds.data import load_metric\n"
        "m = load_metric('mrpc')\n"
        "print([m.compute(predictions=[i % 2] * 40, references=[1] * 40)['accuracy'] for i in range(20)])"
    )
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}

    def run(_):
        return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run, range(2)):
            assert result.returncode == 0, result.stderr
            assert result.stdout.splitlines()[-1] == str([0.0, 1.0] * 10)
    assert not list(tmp_path.rglob("*.arrow"))  # predictions never touch the disk


@pytest.fixture(scope="module")
def tokenizer():
    """A word-level BERT tokenizer of twenty numbered words."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=32)


def numbered(*lengths):
    return [" ".join(f"w{i}" for i in range(length)) for length in lengths]


def test_tokenize_keeps_labels_and_index_and_does_not_pad(tokenizer):
    rows = {"sentence1": numbered(3, 1), "sentence2": numbered(2, 5), "label": [1, 0], "index": [40, 7]}
    out = tokenize(Dataset.from_dict(rows), tokenizer, 32)
    assert set(out.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels", "index"}
    assert out["labels"][:] == [1, 0] and out["index"][:] == [40, 7]
    assert [len(ids) for ids in out["input_ids"]] == [3 + 2 + 3, 1 + 5 + 3]
    assert out[0]["token_type_ids"] == [0] * 5 + [1] * 3 and out[0]["attention_mask"] == [1] * 8
    direct = tokenizer(rows["sentence1"], rows["sentence2"])["input_ids"]
    assert out["input_ids"][:] == direct


def test_tokenize_cuts_the_longer_of_a_pair(tokenizer):
    rows = {"sentence1": numbered(12), "sentence2": numbered(2), "label": [0], "index": [0]}
    out = tokenize(Dataset.from_dict(rows), tokenizer, 10)
    assert tokenizer.decode(out[0]["input_ids"]).split() == [
        "[CLS]",
        *numbered(5)[0].split(),
        "[SEP]",
        "w0",
        "w1",
        "[SEP]",
    ]


def test_tokenize_single_sentences_and_float_labels(tokenizer):
    rows = {"sentence1": numbered(4), "label": [2.5], "index": [0]}
    out = tokenize(Dataset.from_dict(rows), tokenizer, 32)
    assert out["labels"][:] == [2.5] and len(out[0]["input_ids"]) == 6


@pytest.mark.parametrize(("texts", "length"), [(2, 4), (1, 2), (2, 33), (2, 0), (2, -1)])
def test_lengths_the_model_cannot_take(texts, length, tokenizer):
    rows = {**{f"sentence{i + 1}": numbered(4) for i in range(texts)}, "label": [0], "index": [0]}
    with pytest.raises(UserError, match=f"max_seq_length={length}: must be at least"):
        tokenize(Dataset.from_dict(rows), tokenizer, length)


def test_tokenize_leaves_nothing_in_the_cache(tokenizer):
    rows = {"sentence1": numbered(4), "sentence2": numbered(4), "label": [0], "index": [0]}
    assert tokenize(Dataset.from_dict(rows), tokenizer, 32).cache_files == []


def test_same_input_same_output(tokenizer):
    config = SimpleNamespace(rows={"sentence1": numbered(4, 2), "label": [0, 1], "index": [0, 1]})
    first, second = (tokenize(Dataset.from_dict(config.rows), tokenizer, 16).to_dict() for _ in range(2))
    assert first == second
