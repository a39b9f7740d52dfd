"""TMP's selection rule, and the scores that it is given."""

from types import SimpleNamespace

import pytest
import torch

from prunadapt_ds import one_shot, tmp
from prunadapt_ds.batches import Sampler
from prunadapt_ds.errors import PrunadaptError
from prunadapt_ds.importance import WindowSums

pytestmark = pytest.mark.fast

# Heads cut per layer and the four layers with the higher LoRA rank, as published for BERT-base.
PUBLISHED = {
    "mnli": ([4, 1, 3, 3, 1, 6, 5, 3, 7, 6, 1, 3], [4, 1, 10, 2]),
    "sst2": ([3, 2, 4, 2, 2, 4, 6, 2, 6, 5, 4, 3], [1, 7, 3, 4]),
}


def ranks_with(cut_per_layer, important):
    """A rank matrix [12, 12] that has this many of the 43 lowest ranks in each layer and these layers on top."""
    ranks = torch.full((12, 12), -1)
    low, high = iter(range(43)), iter(range(43, 144))
    others = [layer for layer in range(12) if layer not in important]
    for layer in [*others, *reversed(important)]:  # both the lowest and the other ranks: most important layers last
        count = cut_per_layer[layer]
        ranks[layer, :count] = torch.tensor([next(low) for _ in range(count)])
        ranks[layer, count:] = torch.tensor([next(high) for _ in range(12 - count)])
    return ranks


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_counts(task):
    cut, important = PUBLISHED[task]
    assert sum(cut) == 43
    ranks = ranks_with(cut, important)
    selection = tmp.select_from_ranks(ranks)
    assert (~selection.keep).sum(1).tolist() == cut
    assert set(tmp.important_layers(ranks)) == set(important)
    assert [selection.rank_per_layer[i] for i in important] == [8] * 4
    assert sorted(selection.rank_per_layer.values()) == [4] * 8 + [8] * 4


def test_layers_are_normalised_before_heads_are_compared():
    scores = torch.tensor([[100.0, 300.0], [0.002, 0.001]])
    assert tmp.head_ranks(scores).tolist() == [[0, 3], [2, 1]]
    scaled = scores * torch.tensor([[1.0], [1e6]])
    assert torch.equal(tmp.head_ranks(scores), tmp.head_ranks(scaled))


def test_fractions_for_other_sizes():
    selection = tmp.select(torch.rand(6, 12, generator=torch.Generator().manual_seed(0)))
    assert int((~selection.keep).sum()) == round(43 / 144 * 72)
    assert sorted(selection.rank_per_layer.values()) == [4, 4, 4, 4, 8, 8]


def test_a_layer_keeps_the_heads_it_must():
    """Without floors the first layer would lose all; it keeps its best, and as many heads go as before."""
    ranks = torch.arange(12).view(3, 4)
    assert tmp.select_from_ranks(ranks).keep.sum(1).tolist() == [0, 4, 4]
    keep = tmp.select_from_ranks(ranks, [1, 0, 0]).keep
    assert keep.sum(1).tolist() == [1, 3, 4] and keep[0].tolist() == [False, False, False, True]


def test_scores_that_are_not_finite_end_the_run(monkeypatch):
    monkeypatch.setattr(one_shot, "train_step", lambda *args, **options: None)
    monkeypatch.setattr(one_shot.engines, "set_learning_rates", lambda engine, factor: None)
    sums = {"grad_sq": torch.ones(3), "grad_abs": torch.tensor([1.0, float("nan"), 1.0])}
    session = SimpleNamespace(
        recorder=SimpleNamespace(all_reduce=lambda: WindowSums(sums, 4, seed=0)),
        sampler=Sampler(4, 2, 1, 0, 1, 0),
        train_rows=SimpleNamespace(pick=list),
        engine=None,
    )
    with pytest.raises(PrunadaptError, match="not finite"):
        one_shot.score_samples(session, list(range(4)), lambda: None)
