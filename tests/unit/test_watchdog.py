"""What may take its time is said to the watchdog before, and that it is over afterwards."""

from types import SimpleNamespace

import pytest
import torch

from prunadapt_ds import one_shot, rebuild, resume, token_teacher, watchdog
from prunadapt_ds import session as sessions
from prunadapt_ds.batches import Sampler
from prunadapt_ds.clocks import Clocks

pytestmark = pytest.mark.fast


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """A watchdog that never strikes, of a process in the middle of its steps."""
    monkeypatch.setenv("PRUNADAPT_STUCK_SECONDS", "10000")
    watchdog.start(tmp_path, 0)
    watchdog.beat()
    watchdog.beat()
    yield watchdog._watch
    watchdog.stop()


@pytest.fixture
def seen(watch):
    """Whether the process was resting, each time a stub was called."""
    resting = []
    return resting, lambda *args, **options: resting.append(watch.resting)


def session(**values):
    marks = SimpleNamespace(watched_length=3)
    return SimpleNamespace(clocks=Clocks(on_cpu=True), memory=marks, step=4, device=torch.device("cpu"), **values)


def test_resting_ends_with_its_block_however_that_ends(watch):
    before = watch.longest
    with pytest.raises(ValueError, match="odd"), watchdog.resting():
        assert watch.resting
        watch.last -= 1000
        raise ValueError("odd")
    assert not watch.resting and watch.longest == before, "how long it took says nothing of steps"


def test_a_save_rests_and_then_steps_go_on(watch, seen, tmp_path, monkeypatch):
    resting, stub = seen
    monkeypatch.setattr(resume.snapshot, "collect", lambda session: stub() or ({}, {}))
    monkeypatch.setattr(resume.checkpoint, "write", stub)
    monkeypatch.setattr(resume, "names", lambda config: {})
    monkeypatch.setattr(resume, "fault_point", stub)
    output = SimpleNamespace(output_dir=str(tmp_path), save_total_limit=1)
    tracker = SimpleNamespace(metrics_bytes=lambda: 0)
    resume.save(session(config=SimpleNamespace(output=output), options={"seed": 0}, tracker=tracker))
    assert resting == [False, True, True, False], "begin, collect, write, end"


def test_an_evaluation_rests_for_its_measures(watch, seen, monkeypatch):
    resting, stub = seen
    monkeypatch.setattr(sessions, "measures", stub)
    sessions.evaluate(session(validation_rows={}))
    assert resting == [True] and not watch.resting


def test_a_shrink_rests_and_then_steps_go_on(watch, seen, monkeypatch):
    resting, stub = seen
    monkeypatch.setattr(rebuild, "shrink", stub)
    monkeypatch.setattr(rebuild, "fault_point", stub)
    plan = SimpleNamespace(mask=lambda: None)
    held = {"note_peak": lambda: None, "release_engine": lambda: None, "present": None, "recorder": None}
    rebuild.shrink_model(session(plan=plan, backbone=SimpleNamespace(layout=None), **held))
    assert resting == [False, True, False], "begin, shrink, end"


def test_scoring_shows_life_at_every_step(watch, monkeypatch):
    """However many samples are scored; what is then made of the scores takes its time again."""
    silent = []

    def step(session, step, *, record):
        silent.append(watch.silent)
        watch.silent = 5.0

    monkeypatch.setattr(one_shot, "train_step", step)
    monkeypatch.setattr(one_shot.engines, "set_learning_rates", lambda engine, factor: None)
    recorder = SimpleNamespace(all_reduce=lambda: SimpleNamespace(sums={}, count=watch.resting))
    rows, sampler = SimpleNamespace(pick=list), Sampler(8, 2, 1, 0, 1, 0)
    scored = one_shot.score_samples(
        session(recorder=recorder, sampler=sampler, train_rows=rows, engine=None, losses=[]), list(range(8))
    )
    assert silent == [0.0] * 4 and scored.count is True


def test_a_teacher_s_file_takes_its_time(watch, seen, tmp_path, monkeypatch):
    resting, stub = seen

    class Rows(list):
        def padded_labels(self, batch, length):
            return torch.zeros(1, length)

    def passes(*args):
        watchdog.beat()
        yield [0], {}, torch.zeros(1, 3, 5)

    monkeypatch.setattr(token_teacher, "forward_passes", passes)
    monkeypatch.setattr(token_teacher, "_save", stub)
    monkeypatch.setattr(token_teacher, "_open_all", lambda teacher: None)  # of what was not saved
    token_teacher.write(None, Rows([0]), 2, 1, torch.device("cpu"), tmp_path / "teacher")
    assert resting == [True] and not watch.resting
