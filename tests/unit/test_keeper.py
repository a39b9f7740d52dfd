"""When a run saves, stops and gives up, step by step, in one process. And how a stuck process ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prunadapt_ds import keeper as keepers
from prunadapt_ds import train
from prunadapt_ds.config import parse
from prunadapt_ds.errors import Interrupted, PrunadaptError
from prunadapt_ds.keeper import Keeper
from prunadapt_ds.pulse import Pulse
from prunadapt_ds.signals import STOP_SIGNALS, StopSignals
from tests.conftest import ROOT

pytestmark = pytest.mark.fast


@pytest.fixture
def run(monkeypatch):
    """A keeper whose saving takes `save_takes` seconds of a clock that steps of one second move."""

    class Run:
        def __init__(self):
            output = SimpleNamespace(checkpoint_steps=None, output_dir="out", resume="auto")
            self.now, self.save_takes, self.saved = 1000.0, 0.25, []
            self.session = SimpleNamespace(
                step=0,
                total_steps=1000,
                device=torch.device("cpu"),
                tracker=SimpleNamespace(problem=""),
                engine=SimpleNamespace(was_step_applied=lambda: True),
                config=SimpleNamespace(output=output, prune=SimpleNamespace(score_only=False)),
                train_rows=SimpleNamespace(places=range(100, 200)),  # a subset's, in the whole split
            )
            monkeypatch.setattr(keepers.time, "monotonic", lambda: self.now)
            monkeypatch.setattr(keepers.resume, "save", self.save)
            self.keeper = Keeper(self.session, StopSignals())

        def save(self, session):
            self.now += self.save_takes
            self.saved.append(session.step)
            return Path("out", "checkpoints", f"step-{session.step}")

        def step(self, losses=(0.5, 0.7), settle=False):
            self.session.step += 1
            self.now += 1
            self.keeper.step_done([([3, 9], torch.tensor(losses))], settle=settle)
            self.keeper.save_if_due()

        def steps(self, count):
            for _ in range(count):
                self.step()

    return Run()


def test_by_default_saving_takes_a_hundredth_of_the_time_at_most(run):
    run.steps(500)
    assert len(run.saved) == 8 and run.saved[0] == 62, "every minute, and a step or two until all know"
    run.save_takes = 4
    before = len(run.saved)
    run.steps(499)
    assert len(run.saved) - before == 2, "once to find out, then 400 seconds apart"


def test_a_step_that_deepspeed_left_out_ends_the_run(run):
    run.steps(3)
    run.session.engine.was_step_applied = lambda: False
    with pytest.raises(PrunadaptError, match="a gradient is not a finite number at step 4, although the losses are"):
        run.step(settle=True)


def test_a_metrics_file_that_could_not_be_written_at_the_last_step(run):
    run.session.total_steps = 3
    run.steps(3)
    run.session.tracker.problem = "metrics.jsonl: the disk is full"
    with pytest.raises(PrunadaptError, match="the disk is full"):
        run.keeper.stop_if_asked()


def test_at_the_steps_that_were_asked_for_and_at_the_end(run):
    run.session.config.output.checkpoint_steps = 300
    run.steps(1000)
    assert run.saved == [300, 600, 900, 1000]


def test_a_stop_is_a_checkpoint_at_the_next_step(run):
    run.steps(5)
    run.keeper.signals.name = "SIGUSR1"
    run.step()
    assert not run.saved
    with pytest.raises(Interrupted, match=r"stopped by SIGUSR1 after step 7 of 1000.*step-7; the same command"):
        run.step()
    assert run.saved == [7]


@pytest.mark.parametrize("resume", ["elsewhere/checkpoints/step-3", "never"])
def test_a_run_that_was_told_where_to_begin_goes_on_from_its_own_checkpoints(run, resume):
    """The same command would go back to where it was told to begin, or begin anew."""
    run.session.config.output.resume = resume
    run.keeper = Keeper(run.session, StopSignals(), SimpleNamespace(folder=Path("elsewhere", "checkpoints", "step-3")))
    run.keeper.signals.name = "SIGUSR1"
    with pytest.raises(Interrupted, match=r"elsewhere/checkpoints/step-3; the same command with --resume auto goes on"):
        run.keeper.stop_if_asked()


def test_after_the_last_step_a_stop_needs_no_step(run):
    run.keeper.stop_if_asked()
    run.keeper.signals.name = "SIGTERM"
    with pytest.raises(Interrupted):
        run.keeper.stop_if_asked()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_is_known_one_step_later_with_its_step_and_samples(run, bad):
    run.session.config.output.checkpoint_steps = 4
    run.steps(4)
    run.step((0.5, bad))
    with pytest.raises(PrunadaptError, match=r"at step 5, on training samples 109 \(counted from 0\).*step-4"):
        run.step((bad, bad))
    assert run.saved == [4]


@pytest.mark.parametrize("every, settle", [(2, False), (None, True)], ids=["saved", "decided upon"])
def test_a_bad_loss_is_known_before_it_is_saved_or_decided_upon(run, every, settle):
    run.session.config.output.checkpoint_steps = every
    run.step()
    with pytest.raises(PrunadaptError, match="at step 2"):
        run.step((float("nan"), 1.0), settle)
    assert not run.saved


def test_what_rank_0_could_not_write_ends_the_run(run):
    run.step()
    run.session.tracker.problem = "metrics.jsonl cannot be written: no space"
    run.step()
    with pytest.raises(PrunadaptError, match="no space"):
        run.step()


def test_a_pulse_is_read_once():
    pulse = Pulse(2, torch.device("cpu"))
    assert pulse.read() is None
    flags = torch.tensor([1.0, 0.0])
    pulse.send(flags)
    flags.zero_()
    assert pulse.read() == [1.0, 0.0] and pulse.read() is None


def test_signals_are_noted_and_given_back():
    signals, before = StopSignals(), signal.getsignal(signal.SIGTERM)
    signals.listen()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.name == "SIGTERM", "the first one counts"
    finally:
        signals.forget()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("process_ends", [True, False])
def test_a_notebook_gets_its_signals_back_and_a_program_ends_in_peace(tmp_path, process_ends):
    """Also after a stop: the launcher of a program may send its signal again, and a notebook goes on."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with train.owned(parse(["--output_dir", str(tmp_path)]), process_ends) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.name == "SIGTERM"
        assert (signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]) is not process_ends
        assert (signal.getsignal(signal.SIGINT) is before[signal.SIGINT]) is not process_ends
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("speaks", [True, False], ids=["rank 0", "another rank"])
def test_a_ctrl_c_is_answered_at_once_and_the_second_ends_the_process(speaks):
    code = (
        "import os, signal\n"
        "from prunadapt_ds.signals import StopSignals\n"
        f"signals = StopSignals(speaks={speaks})\n"
        "signals.listen()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print(signals.name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGINT and done.stdout == "SIGTERM\n"
    assert done.stderr == ("\nstopping after this step; once more to leave now\n" if speaks else "")


STUCK = """
import os, sys, time
os.environ["PRUNADAPT_STUCK_SECONDS"] = "1"
from pathlib import Path
from prunadapt_ds import watchdog
watchdog.start(Path(sys.argv[1]), 3)
for _ in range(8):
    time.sleep(0.01)
    watchdog.beat()
if sys.argv[2] == "resting":
    watchdog.rest()
    time.sleep(3)
    sys.exit(0)
def here():
    time.sleep(60)
here()
"""


@pytest.mark.parametrize("how, code", [("stuck", 1), ("resting", 0)])
def test_a_stuck_process_says_where_and_ends(tmp_path, how, code):
    done = subprocess.run(
        [sys.executable, "-c", STUCK, tmp_path, how], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == code, done.stderr
    if how == "stuck":
        assert "error: rank 3 has made no progress for" in done.stderr
        assert "in here" in (tmp_path / "stuck-rank-3.txt").read_text()
    else:
        assert not list(tmp_path.iterdir())
