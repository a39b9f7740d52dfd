"""The built-in task keeps its promises: the same everywhere, balanced, and not solved by counting words."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from prunadapt_ds.data import generate, load_task
from prunadapt_ds.data.sample import PEOPLE, SIZES, THINGS, verdict_words

pytestmark = pytest.mark.fast

SHA256 = "15db406e6bea642349c22faf8c270a55f8b0fb89313f81a0ebc1220245b3bb32"
PRINT_HASH = """
import hashlib, json
from prunadapt_ds.data.sample import generate
rows = [generate("train"), generate("validation")]
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""


def sha256(rows):
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def test_the_rows_are_what_they_always_were():
    assert sha256([generate("train"), generate("validation")]) == SHA256


def test_another_process_with_another_hash_seed_makes_the_same_rows():
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", PRINT_HASH],
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == SHA256


@pytest.mark.parametrize("split", SIZES)
def test_balanced_distinct_and_short(split):
    rows = generate(split)
    pairs = list(zip(rows["sentence1"], rows["sentence2"], strict=True))
    assert len(pairs) == len(set(pairs)) == len(rows["label"]) == SIZES[split]
    assert sum(rows["label"]) * 2 == SIZES[split]
    assert all(10 <= len(f"{a} {b}".split()) <= 30 for a, b in pairs)
    assert all(a[0].isupper() and a.endswith(".") and "{" not in a + b for a, b in pairs)


def test_word_lists_are_disjoint_and_validation_has_words_of_its_own():
    lists = [words for group in (PEOPLE, THINGS) for words in (group.favourable, group.unfavourable)]
    everything = [word for words in lists for word in words]
    assert len(everything) == len(set(everything))
    for group in (PEOPLE, THINGS):
        for favourable in (True, False):
            train, validation = (set(verdict_words(group, favourable, split)) for split in SIZES)
            assert train and validation and not train & validation
    held_out = {word for g in (PEOPLE, THINGS) for f in (True, False) for word in verdict_words(g, f, "validation")}
    said = set(" ".join(generate("train")["sentence1"]).lower().replace(",", " ").replace(".", " ").split())
    assert not said & held_out


@pytest.mark.parametrize("ngrams", [(1, 1), (1, 2)])
@pytest.mark.parametrize("apart", [False, True], ids=["joined", "sentences apart"])
def test_a_bag_of_words_reaches_at_most_65_percent(ngrams, apart):
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, dev = generate("train"), generate("validation")
    vectorizer = CountVectorizer(ngram_range=ngrams).fit(train["sentence1"] + train["sentence2"])

    def features(rows):
        first, second = (vectorizer.transform(rows[name]) for name in ("sentence1", "sentence2"))
        return hstack([first, second]) if apart else first + second

    model = LogisticRegression(max_iter=2000).fit(features(train), train["label"])
    assert model.score(features(dev), dev["label"]) <= 0.65


def test_it_is_what_an_empty_configuration_loads():
    names = "task_name data_dir train_file validation_file max_train_samples max_eval_samples"
    config = SimpleNamespace(**dict.fromkeys(names.split()))
    data = load_task(config, seed=3)
    assert data.task.name == "sample" and data.task.num_labels == 2
    assert data.train["sentence1"][:] == generate("train")["sentence1"]
    assert data.validation["validation"]["label"][:] == generate("validation")["label"]
