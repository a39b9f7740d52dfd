import itertools

import pytest

from prunadapt_ds.schedule import LearningRateSchedule, PruningSchedule, default_learning_rate

pytestmark = pytest.mark.fast


def test_cubic():
    s = PruningSchedule(10, 30, 4, 0.6)
    assert s.sparsity(10) == 0 and s.sparsity(0) == 0
    assert s.sparsity(20) == pytest.approx(0.6 * (1 - 0.5**3))
    assert s.sparsity(30) == pytest.approx(0.6) and s.sparsity(99) == pytest.approx(0.6)
    assert s.decision_steps == (15, 20, 25, 30)


def test_recording_covers_the_windows_of_all_decisions_and_no_more():
    s = PruningSchedule(10, 30, 4, 0.6)
    assert [step for step in range(40) if s.records_after(step)] == list(range(10, 30))
    assert [s.phase(step) for step in (9, 10, 29, 30)] == ["dense", "prune", "prune", "recover"]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_every_run_length_ends_at_the_target(total):
    s = PruningSchedule.from_fractions(total, 0.25, 0.6, 8, 0.5)
    assert 1 <= len(s.decision_steps) == len(set(s.decision_steps)) <= total
    assert s.sparsity(s.decision_steps[-1]) == 0.5
    assert all(s.records_after(step - 1) for step in s.decision_steps)


def test_learning_rate_factor():
    r = LearningRateSchedule(4, 20)
    assert r.factor(0) == 0.25 and r.factor(3) == 1.0 and r.factor(4) == 1.0
    assert r.factor(12) == pytest.approx(0.5) and r.factor(19) == pytest.approx(1 / 16) and r.factor(20) == 0
    assert LearningRateSchedule(0, 10).factor(0) == 1.0


def test_the_rate_stays_level_until_the_decay_starts():
    r = LearningRateSchedule(2, 20, decay_start=10)
    assert [r.factor(step) for step in (1, 2, 9, 10)] == [1.0] * 4
    assert r.factor(15) == pytest.approx(0.5) and r.factor(20) == 0
    assert [LearningRateSchedule(4, 20, 0).factor(s) for s in range(20)] == [
        LearningRateSchedule(4, 20).factor(s) for s in range(20)
    ]


def test_the_teacher_counts_from_the_first_decision_and_no_more_at_the_end():
    s = PruningSchedule(10, 30, 4, 0.6)  # first decision at 15
    assert s.teacher_factor(15, 55) == 1 and s.teacher_factor(35, 55) == pytest.approx(0.5)
    assert s.teacher_factor(55, 55) == 0 and s.teacher_factor(3, 55) == 1


def test_the_teacher_s_snapshots_end_at_the_first_decision_and_fill_the_window():
    s = PruningSchedule.from_fractions(400, 0.25, 0.6, 8, 0.5)  # first decision after 118 steps
    first = s.decision_steps[0]
    steps = [step for step in range(1, 401) if s.averages_at(step, 0.6)]
    assert steps[-1] == first and steps[0] > first * 0.4 and 9 <= len(steps) <= 12
    assert len({b - a for a, b in itertools.pairwise(steps)}) == 1, "evenly spaced"
    assert not any(s.averages_at(step, 0.0) for step in range(1, 401))


def test_wider_models_get_smaller_rates():
    rates = [default_learning_rate(size, is_full=False) for size in (32, 384, 768, 4096)]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 0.9375e-4])
    assert default_learning_rate(768, is_full=True) == pytest.approx(5e-5)
