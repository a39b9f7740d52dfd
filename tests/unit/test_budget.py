"""The decision: budget met, global, deterministic."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadapt_ds.budget import PruningPlan, check_target, decide, max_sparsity
from prunadapt_ds.errors import UserError
from prunadapt_ds.importance import ScoreAverage
from prunadapt_ds.models.structure import Structure, SubLayer, with_outer_floor

pytestmark = pytest.mark.fast


def structure(layers=3, heads=4, neurons=48, head_cost=1000, neuron_cost=60, fixed=500, times=0):
    """`times`: seed of the measured times, which rise in steps and are flat in between."""
    generator = torch.Generator().manual_seed(times)
    sublayers, start = [], 0
    for layer in range(layers):
        for kind, n, cost in (("heads", heads, head_cost), ("neurons", neurons, neuron_cost)):
            macs = 7 * cost if kind == "heads" else 5 * cost
            rises = torch.randint(0, 1000, (n,), generator=generator) * torch.randint(0, 2, (n,), generator=generator)
            ns = (0, *rises.cumsum(0).tolist())
            sublayers.append(SubLayer(layer, kind, start, n, cost, macs, latency=ns))
            start += n
    return Structure(tuple(sublayers), fixed * layers, 10_000, 16, fixed_latency=100 * layers)


def dearest(s, budget, multiple):
    """The most that one item can cost."""
    steps = {"heads": 1, "neurons": multiple}
    return max(
        int((costs[min(n, steps[sub.kind]) :] - costs[: n + 1 - min(n, steps[sub.kind])]).max())
        for sub in s.sublayers
        for n, costs in [(sub.num_units, sub.costs(budget))]
    )


structures = st.builds(
    structure,
    layers=st.integers(1, 5),
    heads=st.integers(1, 6),
    neurons=st.integers(1, 70),
    head_cost=st.integers(1, 5000),
    neuron_cost=st.integers(1, 100),
    fixed=st.integers(0, 2000),
    times=st.integers(0, 10**6),
)
BUDGETS = st.sampled_from(["params", "macs", "latency"])


@settings(max_examples=150, deadline=None)
@given(structures, st.floats(0, 1), st.integers(0, 10**6), BUDGETS, st.integers(1, 16))
def test_budget_is_met_within_one_item(s, fraction, seed, budget, multiple):
    scores = torch.rand(s.num_units, generator=torch.Generator().manual_seed(seed))
    target = fraction * max_sparsity(s, budget)
    plan = decide(scores, s, target, budget=budget, neuron_multiple=multiple)
    assert abs(plan.sparsity(budget) - target) * s.dense_cost(budget) <= dearest(s, budget, multiple) + 1e-6
    for sub, kept in zip(s.sublayers, plan.kept, strict=True):
        if sub.kind == "neurons" and len(kept) != sub.num_units:
            assert len(kept) % multiple == 0
        assert list(kept) == sorted(set(kept))


@settings(max_examples=60, deadline=None)
@given(structures, st.integers(0, 10**6), BUDGETS)
def test_a_higher_score_is_never_cut_before_a_lower_one_of_its_sublayer(s, seed, budget):
    scores = torch.rand(s.num_units, generator=torch.Generator().manual_seed(seed))
    keep = decide(scores, s, 0.5 * max_sparsity(s, budget), neuron_multiple=1, budget=budget).mask()
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
    floors = {"heads": heads, "neurons": neurons}
    floored = [replace(sub, floor=min(floors[sub.kind], sub.num_units)) for sub in s.sublayers if sub.layer == 0]
    s = replace(s, sublayers=(*floored, *(sub for sub in s.sublayers if sub.layer)))
    scores = torch.rand(s.num_units, generator=torch.Generator().manual_seed(seed))
    try:
        counts = decide(scores, s, 0.6 * max_sparsity(s, "params")).counts()[0]
    except UserError:
        return
    assert counts["heads"] >= min(heads, s.sublayers[0].num_units)
    assert counts["neurons"] >= min(neurons, s.sublayers[1].num_units)


def test_outer_layers_keep_their_share():
    s = with_outer_floor(structure(layers=4, heads=4, neurons=16), 0.5, 8)
    counts = decide(torch.ones(s.num_units), s, max_sparsity(s, "params")).counts()
    assert [(c["heads"], c["neurons"]) for c in counts] == [(2, 8), (0, 0), (0, 0), (2, 8)]
    with pytest.raises(UserError, match="at most"):
        decide(torch.ones(s.num_units), s, max_sparsity(structure(layers=4, heads=4, neurons=16), "params"))


@pytest.mark.parametrize("neurons, kept", [(100, 64), (56, 32), (20, 16), (16, 16), (12, 12)])
def test_what_outer_layers_keep_can_be_reached_by_cutting_whole_groups(neurons, kept):
    """The most that is promised before training is what the last decision can cut."""
    s = with_outer_floor(structure(layers=3, heads=4, neurons=neurons), 0.5, 16)
    counts = decide(torch.ones(s.num_units), s, max_sparsity(s, "params"), neuron_multiple=16).counts()
    assert [c["neurons"] for c in counts] == [kept, 0, kept]


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
@given(structures, BUDGETS)
def test_exactly_the_maximum_cuts_everything(s, budget):
    plan = decide(torch.ones(s.num_units), s, max_sparsity(s, budget), budget=budget)
    assert plan.cost(budget) == s.fixed_cost(budget)
    assert budget == "latency" or not plan.mask().any()  # a unit that takes no time may stay


@settings(max_examples=100, deadline=None)
@given(structures, st.integers(0, 10**6), st.floats(1e-6, 1e-2), st.booleans())
def test_no_other_choice_loses_less_for_its_saving(s, seed, price, uniform):
    """The cut that a price per saved nanosecond makes, found sub-layer by sub-layer, is the one made for its saving."""
    scores = torch.rand(s.num_units, generator=torch.Generator().manual_seed(seed)).double()
    kinds = ("heads", "neurons")
    groups = [[t for t in s.sublayers if t.kind == k] for k in kinds] if uniform else [[t] for t in s.sublayers]
    saved = lost = 0.0
    for group in groups:
        losses = sum(torch.cat([torch.zeros(1), scores[t.span].sort().values.cumsum(0)]) for t in group)
        savings = sum(t.costs("latency")[-1] - t.costs("latency").flip(0) for t in group)
        best = int((losses - price * savings).argmin())
        saved, lost = saved + float(savings[best]), lost + float(losses[best])
    target = saved / s.dense_cost("latency")
    plan = decide(scores, s, target, budget="latency", neuron_multiple=1, uniform=uniform)
    assert 1 - plan.cost("latency") / s.dense_cost("latency") == pytest.approx(target)
    assert float(scores[~plan.mask()].sum()) == pytest.approx(lost, abs=1e-9)
    if uniform:
        assert len({(c["heads"], c["neurons"]) for c in plan.counts()}) == 1


def uniformly(s):
    """As a stock configuration that cannot say fewer heads wants it."""
    return replace(s, sublayers=tuple(replace(t, floor={"heads": 4, "neurons": 8}[t.kind]) for t in s.sublayers))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 6), st.integers(4, 8), st.integers(0, 10**6), st.floats(0, 1), st.sampled_from(["params", "macs"])
)
def test_depth_and_width_meet_the_budget(layers, groups, seed, share, budget):
    s = replace(uniformly(structure(layers=layers, neurons=8 * groups, neuron_cost=600)), skips=True)
    scores = torch.rand(s.num_units, generator=torch.Generator().manual_seed(seed))
    target = share * max_sparsity(s, budget)
    plan = decide(scores, s, target, budget=budget, uniform=True)
    left = [c for c in plan.counts() if c["neurons"]]
    assert left and len({(c["heads"], c["neurons"]) for c in left}) == 1 and left[0]["heads"] == 4
    assert plan.skipped == {c["layer"] for c in plan.counts() if not c["heads"]}
    group = len(left) * int(s.sublayers[1].costs(budget)[8])  # eight neurons of every layer
    assert abs(plan.cost(budget) - (1 - target) * s.dense_cost(budget)) <= group / 2 + 1
    with pytest.raises(UserError, match="at most"):
        decide(scores, s, max_sparsity(s, budget) + 0.01, budget=budget, uniform=True)


def test_between_what_widths_reach_and_a_layer_less_the_nearest_is_taken():
    s = replace(uniformly(structure(layers=2, neurons=8)), skips=True)  # nothing of a layer may go but all of it
    for target, left in ((0.2, [(4, 8), (4, 8)]), (0.3, [(0, 0), (4, 8)])):
        counts = decide(torch.ones(s.num_units), s, target, uniform=True).counts()
        assert [(c["heads"], c["neurons"]) for c in counts] == left


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(4, 8), st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([60, 600]))
def test_what_is_gone_stays_gone_and_depth_does_not_overshoot_for_it(layers, groups, seed, share, neuron_cost):
    s = replace(uniformly(structure(layers=layers, neurons=8 * groups, neuron_cost=neuron_cost)), skips=True)
    generator = torch.Generator().manual_seed(seed)
    dense, group = s.dense_cost("params"), layers * int(s.sublayers[1].costs("params")[8])
    gone, present = torch.zeros(s.num_units, dtype=torch.bool), dense
    for part in (0.3, 0.6, 0.8, 0.9, 1.0):
        wanted = (1 - part * share * max_sparsity(s, "params")) * dense
        plan = decide(torch.rand(s.num_units, generator=generator), s, 1 - wanted / dense, gone=gone, uniform=True)
        assert not (plan.mask() & gone).any()
        assert abs(plan.cost("params") - wanted) <= max(group, abs(present - wanted)) + 1
        gone, present = ~plan.mask(), plan.cost("params")


def test_a_layer_stays_where_it_would_overshoot_with_what_is_gone():
    """Of full layers three would do; of layers that have lost a quarter of their neurons it must be four."""
    s = replace(uniformly(structure(layers=4, neurons=128, neuron_cost=150)), skips=True)
    scores, gone = torch.ones(s.num_units), torch.zeros(s.num_units, dtype=torch.bool)
    for sub in s.sublayers:
        scores[sub.span] = 1e-3 if sub.layer == 2 else 1.0
        if sub.kind == "neurons":
            gone[sub.start : sub.start + 32] = True
    wanted = 70_000
    target = 1 - wanted / s.dense_cost("params")
    assert decide(scores, s, target, uniform=True).skipped == {2}
    plan = decide(scores, s, target, gone=gone, uniform=True)
    assert not plan.skipped and abs(plan.cost("params") - wanted) <= 2 * 8 * 150


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([60, 600]))
def test_heads_are_left_in_a_number_that_can_be_said_and_neurons_meet_the_budget(layers, seed, share, neuron_cost):
    s = uniformly(structure(layers=layers, heads=8, neurons=64, neuron_cost=neuron_cost))
    floors = {"heads": 1, "neurons": 8}
    sublayers = (replace(t, floor=floors[t.kind], counts=(1, 2, 4, 8) * (t.kind == "heads")) for t in s.sublayers)
    s = replace(s, sublayers=tuple(sublayers))
    generator, gone = torch.Generator().manual_seed(seed), torch.zeros(s.num_units, dtype=torch.bool)
    dense, most = s.dense_cost("params"), max_sparsity(s, "params")
    for part in (0.5, 1.0):
        target, scores = part * share * most, torch.rand(s.num_units, generator=generator)
        plan = decide(scores, s, target, gone=gone, uniform=True)
        assert not (plan.mask() & gone).any()
        ((heads, neurons),) = {(c["heads"], c["neurons"]) for c in plan.counts()}
        assert heads in (1, 2, 4, 8) and neurons % 8 == 0
        wanted, group = (1 - target) * dense / layers, 8 * neuron_cost
        if part == 0.5 and any(
            group <= wanted - 500 - 1000 * h <= 8 * group for h in (1, 2, 4, 8)
        ):  # neurons can meet it
            assert abs(plan.cost("params") / layers - wanted) <= max(group, 1000) / 2 + 1
        gone = ~plan.mask()
    with pytest.raises(UserError, match="at most"):
        decide(torch.ones(s.num_units), s, most + 0.01, uniform=True)


def test_of_the_numbers_that_can_be_said_the_one_whose_cuts_matter_least_is_taken():
    # Half the heads cost what eight neurons do.
    s = uniformly(structure(layers=2, heads=8, neurons=64, neuron_cost=500))
    sublayers = (replace(t, floor=1, counts=(1, 2, 4, 8)) if t.kind == "heads" else t for t in s.sublayers)
    s = replace(s, sublayers=tuple(sublayers))
    heads = torch.cat([torch.full((t.num_units,), t.kind == "heads") for t in s.sublayers])
    target = 2 * 4000 / s.dense_cost("params")
    for of_heads, left in ((1.5, (8, 56)), (0.5, (4, 64))):
        counts = decide(torch.where(heads, of_heads, 0.4), s, target, uniform=True).counts()
        assert {(c["heads"], c["neurons"]) for c in counts} == {left}


def test_the_least_important_layers_go_where_that_costs_less():
    # Widths alone would do.
    s = replace(uniformly(structure(layers=4, heads=4, neurons=32, neuron_cost=600)), skips=True)
    scores = torch.ones(s.num_units)
    layer = s.dense_cost("params") // 4
    for sub in s.sublayers:
        if sub.layer in (1, 3):
            scores[sub.span] = 0.01 if sub.layer == 1 else 0.02
    assert decide(scores, s, layer / (4 * layer), uniform=True).skipped == {1}
    assert decide(scores, s, 2 * layer / (4 * layer), uniform=True).skipped == {1, 3}
    scores[:] = 1.0
    for sub in s.sublayers:  # half of the neurons do nothing, and every layer has some that matter
        if sub.kind == "neurons":
            scores[sub.start : sub.start + 16] = 0.0
    assert not decide(scores, s, 0.1, uniform=True).skipped
    gone = torch.zeros(s.num_units, dtype=torch.bool)
    gone[[i for sub in s.sublayers if sub.layer == 2 for i in range(sub.start, sub.start + sub.num_units)]] = True
    assert 2 in decide(scores, s, 0.3, uniform=True, gone=gone).skipped, "what is gone does not come back"


def test_what_saves_no_time_alone_stays_until_it_does():
    """Three heads take as long as four; the second layer's are worth a little more each, but each saves."""
    flat, steep = (0, 10, 20, 100, 100), (0, 25, 50, 75, 100)
    sublayers = (SubLayer(0, "heads", 0, 4, 9, 9, latency=flat), SubLayer(1, "heads", 4, 4, 9, 9, latency=steep))
    s = Structure(sublayers, 0, 0, 16, fixed_latency=0)
    scores = torch.tensor([1.0] * 4 + [0.6] * 4)
    assert [len(k) for k in decide(scores, s, 25 / 200, budget="latency").kept] == [4, 3]
    assert [len(k) for k in decide(scores, s, 80 / 200, budget="latency", neuron_multiple=1).kept] == [4, 1]
    scores[:4] = 0.3
    assert [len(k) for k in decide(scores, s, 80 / 200, budget="latency").kept] == [2, 4], "two go together"
    assert [len(k) for k in decide(scores, s, 80 / 200, budget="params").kept] == [1, 4]


@given(structures)
def test_too_much_is_an_error_that_names_a_maximum_which_is_accepted(s):
    most = max_sparsity(s, "params")
    with pytest.raises(UserError) as refused:
        check_target(s, most + 0.01, "params")
    named = float(str(refused.value).rpartition("at most ")[2])
    assert most - 1e-4 <= named <= most
    check_target(s, named, "params")
    if most > 0:
        decide(torch.rand(s.num_units), s, named)


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


def test_a_layer_that_was_skipped_comes_back_when_others_matter_less():
    """Nothing passes while it is skipped, which is no evidence against it."""
    s = replace(uniformly(structure(layers=3)), skips=True)
    scores, average = torch.ones(s.num_units), ScoreAverage(0.5)
    of_first = torch.cat([torch.full((t.num_units,), t.layer == 0) for t in s.sublayers])
    scores[of_first] = 0.5
    plan = decide(average.update(scores, PruningPlan.dense(s).passed()), s, 1 / 3, uniform=True)
    assert plan.skipped == {0} and torch.equal(plan.passed(), ~of_first)
    scores = torch.where(of_first, 0.0, 0.1)
    for _ in range(2):
        plan = decide(average.update(scores, plan.passed()), s, 1 / 3, uniform=True)
    assert 0 not in plan.skipped
