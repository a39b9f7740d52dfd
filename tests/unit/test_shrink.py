"""When a rebuild pays, and what a decision does about units that are physically gone."""

import itertools

import pytest
import torch

from prunadapt_ds.budget import decide
from prunadapt_ds.clocks import StepTimes
from prunadapt_ds.importance import Recorder
from prunadapt_ds.models.structure import Structure, SubLayer
from prunadapt_ds.rebuild import pays_now

pytestmark = pytest.mark.fast


def cheapest(present, decisions, step_seconds, rebuild_seconds):
    """Every way to rebuild or not at each decision, tried out: (best with a rebuild first, best without)."""
    best = {True: float("inf"), False: float("inf")}
    for choice in itertools.product((True, False), repeat=len(decisions)):
        size, seconds = present, 0.0
        for rebuild, (smaller, steps) in zip(choice, decisions, strict=True):
            size, seconds = (smaller, seconds + rebuild_seconds) if rebuild else (size, seconds)
            seconds += steps * step_seconds(size)
        best[choice[0]] = min(best[choice[0]], seconds)
    return best[True], best[False]


@pytest.mark.parametrize("rebuild_seconds", [0.1, 3, 10, 30, 100, 1000])
@pytest.mark.parametrize("steps", [(10, 10, 10, 100), (50, 1, 1, 1), (1, 1, 1, 400), (0, 5, 80, 20)])
def test_the_rebuilds_are_the_cheapest_of_all_ways(rebuild_seconds, steps):
    decisions = list(zip((80, 60, 45, 40), steps, strict=True))

    def step_seconds(size):
        return 0.2 + size / 100

    with_first, without = cheapest(100, decisions, step_seconds, rebuild_seconds)
    assert pays_now(100, decisions, step_seconds, rebuild_seconds) == (with_first < without)


def test_nothing_left_to_run_pays_nothing():
    assert not pays_now(100, [], lambda size: size, 0)
    assert not pays_now(100, [(50, 0)], lambda size: size, 1)


def test_step_times_are_fitted_to_what_was_measured():
    times = StepTimes()
    for seconds in (1.0, 1.1, 9.0):  # a hiccup does not count
        times.add(100, seconds)
    assert times.predict(50) == pytest.approx(0.55)
    for size in (40, 20):  # a step with a fixed part of 0.6
        for _ in range(100):
            times.add(size, 0.6 + 0.005 * size)
    assert times.predict(40) == pytest.approx(0.8, rel=0.05)
    assert times.predict(10) == pytest.approx(0.65, rel=0.05)


def test_one_odd_step_does_not_speak_for_a_size():
    unheard, once, often = (
        StepTimes({100: [1.0] * 50, 60: [0.6] * 50} | odd).predict(20) for odd in ({}, {40: [0.7]}, {40: [0.7] * 50})
    )
    assert unheard == pytest.approx(0.2) and 0 < once - unheard < (often - unheard) / 2


def test_sizes_near_each_other_decide_little():
    near, far = StepTimes({100: [1.0] * 50, 85: [1.02] * 50}), StepTimes({100: [1.0] * 50, 40: [1.02] * 50})
    assert near.predict(40) < 0.9, "what differs by chance between near sizes does not rule the next rebuild out"
    assert far.predict(20) == pytest.approx(1.0, abs=0.05), "smaller was not faster"
    slower = StepTimes({100: [1.0] * 50, 60: [1.2] * 50})
    assert 1.0 < slower.predict(20) == slower.predict(100) < 1.2, "nor is it ever taken to be slower"


def test_what_recording_adds_tells_nothing_about_sizes():
    dense = {100: [1.0] * 50}
    alone = StepTimes(dense | {50: [0.6] * 9})
    apart = StepTimes(dense, {100: [1.3] * 9, 50: [0.9] * 9})
    saved = alone.predict(100) - alone.predict(50)
    assert apart.predict(100) - apart.predict(50) == pytest.approx(saved, rel=0.1)
    only = StepTimes({}, {100: [1.3] * 9})
    assert only.predict(50) == pytest.approx(0.65), "a run that prunes from its first step on"


def test_first_and_last_steps_are_compared_within_their_kind():
    times = StepTimes()
    assert times.ends(100) == (None, None)
    for size, seconds, records in ((100, 1.0, False), (100, 1.3, True), (50, 0.8, True)):
        times.add(size, seconds, records=records)
    assert times.ends(100) == (1.3, 0.8), "the last size had no other"
    times.add(50, 0.5)
    assert times.ends(100) == (1.0, 0.5)
    assert StepTimes({100: [1.0]}, {50: [0.8]}).ends(100) == (1.0, 0.8), "or of what there is"
    assert StepTimes({100: [1.0], 50: [0.5]}).ends(100) == (1.0, 0.5)
    assert StepTimes({100: [1.0], 50: [0.5]}).ends(200) == (None, 0.5), "other ranks had the dense model"


def test_predictions_do_not_hang_on_the_unit_of_size():
    small, large = (StepTimes({100 * unit: [2.0] * 9, 60 * unit: [1.5] * 9}) for unit in (1, 10**9))
    assert large.predict(30 * 10**9) == pytest.approx(small.predict(30))


def structure():
    sublayers = [SubLayer(0, "heads", 0, 4, 100, 100), SubLayer(0, "neurons", 4, 32, 10, 10)]
    return Structure(tuple(sublayers), 50, 0, 128)


def test_units_that_are_gone_stay_gone():
    scores = torch.rand(36, generator=torch.Generator().manual_seed(0))
    first = decide(scores, structure(), 0.3)
    gone = ~first.mask()
    assert gone.any()
    again = decide(torch.where(gone, 1e9, 1.0), structure(), 0.6, gone=gone)
    assert not (again.mask() & gone).any() and 0.5 < again.sparsity("params") < 0.7, "and count among what is cut"
    assert not (decide(scores, structure(), 0.0001, gone=gone).mask() & gone).any()
    assert decide(scores, structure(), 0.3, gone=gone).hash == first.hash


def test_a_narrowed_recorder_reports_in_the_order_of_the_dense_model():
    recorder = Recorder(5, activations=False)
    recorder.narrow(torch.tensor([True, False, True, True, False]))
    recorder.begin(torch.ones(2), torch.ones(2, 4))
    recorder.add(0, torch.tensor([[1.0], [1.0]]))
    recorder.add(1, torch.tensor([[2.0, 3.0], [2.0, 3.0]]))
    recorder.end()
    window = recorder.all_reduce()
    assert window.sums["grad_abs"].tolist() == [2, 0, 4, 6, 0]
    assert window.sums["grad_sq"].tolist() == [2, 0, 8, 18, 0] and window.count == 2
