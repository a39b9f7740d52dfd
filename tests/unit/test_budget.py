"""The decision: budget met, global, deterministic."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadapt_ds.budget import PruningPlan, decide, max_sparsity
from prunadapt_ds.errors import UserError
from prunadapt_ds.models.structure import Structure, SubLayer, with_outer_floor

pytestmark = pytest.mark.fast


def structure(layers=3, heads=4, neurons=48, head_cost=1000, neuron_cost=60, fixed=500):
    sublayers, start = [], 0
    for layer in range(layers):
        for kind, n, cost in (("heads", heads, head_cost), ("neurons", neurons, neuron_cost)):
            sublayers.append(SubLayer(layer, kind, start, n, cost, 7 * cost if kind == "heads" else 5 * cost))
            start += n
    return Structure(tuple(sublayers), fixed * layers, 10_000, 16)


structures = st.builds(
    structure,
    layers=st.integers(1, 5),
    heads=st.integers(1, 6),
    neurons=st.integers(1, 70),
    head_cost=st.integers(1, 5000),
    neuron_cost=st.integers(1, 100),
    fixed=st.integers(0, 2000),
)


@settings(max_examples=150, deadline=None)
@given(structures, st.floats(0, 1), st.integers(0, 10**6), st.sampled_from(["params", "macs"]), st.integers(1, 16))
def test_budget_is_met_within_one_item(s, fraction, seed, budget, multiple):
    scores = torch.rand(s.num_units, generator=torch.Generator().manual_seed(seed))
    target = fraction * max_sparsity(s, budget)
    plan = decide(scores, s, target, budget=budget, neuron_multiple=multiple)
    costs = s.unit_costs(budget)
    item = max(int(costs.max()), multiple * int(costs[-1]))
    assert abs(plan.sparsity(budget) - target) * s.dense_cost(budget) <= item
    for sub, kept in zip(s.sublayers, plan.kept, strict=True):
        if sub.kind == "neurons" and len(kept) != sub.num_units:
            assert len(kept) % multiple == 0
        assert list(kept) == sorted(set(kept))


@settings(max_examples=60, deadline=None)
@given(structures, st.integers(0, 10**6))
def test_a_higher_score_is_never_cut_before_a_lower_one_of_its_sublayer(s, seed):
    scores = torch.rand(s.num_units, generator=torch.Generator().manual_seed(seed))
    keep = decide(scores, s, 0.5 * max_sparsity(s, "params"), neuron_multiple=1).mask()
    for sub in s.sublayers:
        kept, cut = scores[sub.span][keep[sub.span]], scores[sub.span][~keep[sub.span]]
        assert not len(kept) or not len(cut) or kept.min() >= cut.max()


@settings(max_examples=60, deadline=None)
@given(structures, st.integers(0, 10**6))
def test_equal_scores_are_cut_by_index(s, seed):
    levels = torch.randint(0, 3, (s.num_units,), generator=torch.Generator().manual_seed(seed)).double()
    target = 0.5 * max_sparsity(s, "params")
    plan = decide(levels, s, target, neuron_multiple=1)
    assert plan.hash == decide(levels.clone().float(), s, target, neuron_multiple=1).hash
    keep = plan.mask()
    for sub in s.sublayers:
        for level in range(3):
            kept = keep[sub.span][levels[sub.span] == level].tolist()
            assert kept == sorted(kept), "of equal units the first go first"


@settings(max_examples=60, deadline=None)
@given(structures, st.integers(0, 10**6), st.integers(0, 3), st.integers(0, 20))
def test_floors_are_kept(s, seed, heads, neurons):
    floors = {(0, "heads"): heads, (0, "neurons"): neurons}
    scores = torch.rand(s.num_units, generator=torch.Generator().manual_seed(seed))
    try:
        counts = decide(scores, s, 0.6 * max_sparsity(s, "params"), floors=floors).counts()[0]
    except UserError:
        return
    assert counts["heads"] >= min(heads, s.sublayers[0].num_units)
    assert counts["neurons"] >= min(neurons, s.sublayers[1].num_units)


def test_outer_layers_keep_their_share():
    s = with_outer_floor(structure(layers=4, heads=4, neurons=16), 0.5)
    counts = decide(torch.ones(s.num_units), s, max_sparsity(s, "params")).counts()
    assert [(c["heads"], c["neurons"]) for c in counts] == [(2, 8), (0, 0), (0, 0), (2, 8)]
    with pytest.raises(UserError, match="at most"):
        decide(torch.ones(s.num_units), s, max_sparsity(structure(layers=4, heads=4, neurons=16), "params"))


def test_ranking_is_global_over_layers_and_kinds():
    s = structure(layers=2, heads=2, neurons=16)
    scores = torch.ones(s.num_units)
    for sub in s.sublayers:  # layer 1 is unimportant, per cost, in both of its kinds
        scores[sub.span] = sub.params_per_unit * (0.1 if sub.layer else 1.0)
    counts = decide(scores, s, 0.4).counts()
    assert counts[0] == {"layer": 0, "heads": 2, "neurons": 16}
    assert counts[1]["heads"] < 2 and counts[1]["neurons"] < 16


def test_heads_and_neurons_are_weighed_by_their_cost():
    s = structure(layers=1, heads=2, neurons=16, head_cost=1000, neuron_cost=60)
    scores = torch.ones(s.num_units)
    scores[:2] = 500.0  # more than a group of neurons (8 * 60), but half as much per parameter
    scores[2:] = 60.0
    counts = decide(scores, s, 1000 / s.dense_cost("params")).counts()[0]
    assert counts == {"layer": 0, "heads": 1, "neurons": 16}


@settings(max_examples=200, deadline=None)
@given(structures, st.sampled_from(["params", "macs"]))
def test_exactly_the_maximum_cuts_everything(s, budget):
    assert not decide(torch.ones(s.num_units), s, max_sparsity(s, budget), budget=budget).mask().any()


def test_too_much_is_an_error_that_names_the_maximum():
    s = structure()
    with pytest.raises(UserError, match=f"{max_sparsity(s, 'params'):.4f}"):
        decide(torch.rand(s.num_units), s, 0.999)


def test_plan_json_and_hash():
    s = structure(layers=1, heads=2, neurons=8)
    mask = torch.ones(10, dtype=torch.bool)
    mask[1] = False
    plan = PruningPlan.from_mask(s, mask)
    assert plan.to_dict()["units"][0] == {"layer": 0, "kind": "heads", "dense": 2, "kept": [0]}
    assert torch.equal(plan.mask(), mask)
    import hashlib

    canonical = json.dumps(plan.to_dict(), sort_keys=True, separators=(",", ":")).encode()
    assert plan.hash == hashlib.sha256(canonical).hexdigest()
    assert plan.hash != PruningPlan.dense(s).hash
    assert PruningPlan.dense(s).sparsity("params") == 0
