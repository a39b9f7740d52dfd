"""Grouping by length: the same samples for every split, all of them once, less padding."""

import random

import pytest
import torch
from datasets import Dataset

from prunadapt_ds.batches import Rows, Sampler
from prunadapt_ds.objective import losses_and_distillation, pseudo_r2, sample_losses, trust
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.fast
_DRAW = random.Random(0)
LENGTHS = tuple(_DRAW.randint(5, 120) for _ in range(203))


def steps(world_size=1, accumulation=1, lengths=LENGTHS):
    ranks = [
        Sampler(203, 16 // world_size // accumulation, accumulation, r, world_size, 3, lengths)
        for r in range(world_size)
    ]
    for step in range(2 * ranks[0].steps_per_epoch):
        yield sorted(i for r in ranks for chunk, weight in r.micro_batches(step) if weight for i in chunk)


@pytest.mark.parametrize("world_size, accumulation", [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_a_step_has_the_same_samples_for_every_split(world_size, accumulation):
    assert list(steps()) == list(steps(world_size, accumulation))


def test_every_sample_comes_once_an_epoch_and_epochs_differ():
    all_steps = list(steps())
    first, second = all_steps[:13], all_steps[13:]
    for epoch in (first, second):
        assert sorted(i for step in epoch for i in step) == list(range(203))
        assert [len(step) for step in epoch] == [16] * 12 + [11]
    assert first != second


@pytest.mark.parametrize("size", [16, 203, 500])
def test_samples_are_counted_as_they_come(size):
    sampler, seen = Sampler(203, size, 1, 0, 1, 3, LENGTHS), 0
    for step in range(30):
        assert sampler.samples_before(step) == seen
        seen += len(sampler.step_samples(step))


def test_rows_are_those_of_the_dataset_in_one_array():
    examples = [{"input_ids": [i] * n, "attention_mask": [1] * n, "labels": i} for i, n in enumerate((3, 0, 5, 1, 2))]
    language = [{**row, "labels": [-100, *row["input_ids"]]} for row in examples]
    chosen = [4, 1, 2]
    for given in (examples, language):
        rows = Rows(Dataset.from_list(given).select(chosen), None)
        assert [rows.row(i)["input_ids"] for i in range(3)] == [given[i]["input_ids"] for i in chosen]
        assert rows.lengths == [2, 0, 5] and rows.pick([2, 0]).row(0) == rows.row(2)
        labels = rows.labels.tolist() if rows.token_labels is None else list(rows.token_labels)
        assert labels == [given[i]["labels"] for i in chosen]
        assert len(rows.head(2)) == 2 and rows.tokens["input_ids"].values.dtype == "int32"


def test_padding_stays_within_what_the_model_takes(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.model_max_length = 30
    lengths = (3, 17, 25, 30)
    rows = Rows(
        Dataset.from_list([{"input_ids": [7] * n, "attention_mask": [1] * n, "labels": 0} for n in lengths]), tokenizer
    )
    for positions, width in (([0], 8), ([0, 1], 24), ([2], 30), ([0, 3], 30)):
        inputs = rows.inputs(positions)
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (len(positions), width)
        assert inputs["attention_mask"].sum(1).tolist() == [lengths[i] for i in positions]


def test_rows_know_their_places_in_the_whole_split():
    examples = [{"input_ids": [i], "attention_mask": [1], "labels": i, "index": 10 * i} for i in range(5)]
    rows = Rows(Dataset.from_list(examples).select([4, 1, 2]), None)
    assert rows.places.tolist() == [40, 10, 20] and rows.pick([2, 0]).places.tolist() == [20, 40]
    assert Rows(Dataset.from_list(examples).remove_columns("index"), None).places.tolist() == [0, 1, 2, 3, 4]


def test_samples_of_like_length_share_a_step():
    def padded(lengths):
        return sum(max(LENGTHS[i] for i in step) * len(step) for step in steps(lengths=lengths))

    assert padded(LENGTHS) < 0.8 * padded(())


def test_a_teacher_is_followed_as_far_as_it_is_right():
    teacher = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 0.0]])
    labels = torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(trust(teacher, labels, False), torch.tensor([0.9999, 0.0001, 0.5]), atol=1e-4, rtol=0)
    assert trust(teacher[:, :1], labels, True).tolist() == [1, 1, 1]
    logits = torch.randn(3, 2)
    alone = sample_losses(logits, labels, is_regression=False)
    led = sample_losses(logits, labels, is_regression=False, teacher=teacher, distill_weight=1.0)
    torch.testing.assert_close(led[1], alone[1], atol=1e-2, rtol=1e-2)
    assert abs(led[2] - alone[2]) > 1e-2
    assert losses_and_distillation(logits, labels, None, is_regression=False, distill_weight=0.3)[1] is None


def test_the_loss_is_what_its_formula_says():
    """(1 - w p) * cross entropy + w p * KL(teacher || student), with p the teacher's probability of the label; of regression
    (1 - w) * squared error to the label + w * squared error to the teacher."""
    from math import exp, log

    w, labels = 0.3, torch.tensor([1, 0])
    logits, teacher = torch.tensor([[0.2, 1.1], [-0.4, 0.9]]), torch.tensor([[1.5, 0.5], [0.1, 0.3]])
    losses, apart = losses_and_distillation(logits, labels, teacher, is_regression=False, distill_weight=w)

    def softmax(row):
        return [exp(x) / sum(map(exp, row)) for x in row]

    for b, label in enumerate(labels.tolist()):
        s, t = softmax(logits[b].tolist()), softmax(teacher[b].tolist())
        kl = sum(q * (log(q) - log(p)) for p, q in zip(s, t, strict=True))
        assert apart[b].item() == pytest.approx(kl, abs=1e-6)
        assert losses[b].item() == pytest.approx((1 - w * t[label]) * -log(s[label]) + w * t[label] * kl, abs=1e-6)
    grades, said, taught = torch.tensor([2.0, 3.0]), torch.tensor([[1.0], [5.0]]), torch.tensor([[1.5], [2.5]])
    losses, apart = losses_and_distillation(said, grades, taught, is_regression=True, distill_weight=w)
    assert apart.tolist() == pytest.approx([0.25, 6.25])
    assert losses.tolist() == pytest.approx([0.7 * 1 + 0.3 * 0.25, 0.7 * 4 + 0.3 * 6.25])


def test_what_a_teacher_explains_is_mcfadden_s_r2_and_of_regression_r2():
    from sklearn.metrics import log_loss, r2_score

    labels = torch.tensor([0, 2, 2, 1, 2, 0, 2, 2])
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(3)[labels]
    frequencies = torch.bincount(labels) / 8
    expected = 1 - log_loss(labels, logits.softmax(-1)) / log_loss(labels, frequencies.expand(8, 3))
    assert pseudo_r2(logits, labels, False) == pytest.approx(expected, abs=1e-6) and 0 < expected < 1
    assert pseudo_r2(frequencies.log().expand(8, 3), labels, False) == pytest.approx(0, abs=1e-6)
    assert pseudo_r2(9 * torch.eye(3)[(labels + 1) % 3], labels, False) < -1, "sure of what is wrong"
    grades, guesses = torch.tensor([0.0, 1.0, 4.0, 5.0]), torch.tensor([[0.5], [1.0], [3.0], [5.5]])
    assert pseudo_r2(guesses, grades, True) == pytest.approx(r2_score(grades, guesses.squeeze(-1)), abs=1e-6)
    assert pseudo_r2(guesses, torch.ones(4), True) == 0 == pseudo_r2(logits, torch.ones(8, dtype=torch.long), False)


@pytest.mark.parametrize("label", [lambda i: i // 50, lambda i: i % 2], ids=["sorted", "alternating"])
def test_a_sample_of_rows_has_all_kinds(label):
    examples = [{"input_ids": [1] * (i + 1), "attention_mask": [1] * (i + 1), "labels": label(i)} for i in range(100)]
    rows = Rows(Dataset.from_list(examples), None)
    some = rows.sample(20)
    assert len(some) == 20 == len(set(some.lengths)) and 5 <= some.labels.sum() <= 15
    assert some.labels.tolist() == [label(length - 1) for length in some.lengths], "labels stay with their rows"
    assert some.lengths == rows.sample(20).lengths, "on every rank"
    assert rows.sample(100).lengths == rows.sample(1000).lengths == rows.lengths and rows.head(3).lengths == [1, 2, 3]
