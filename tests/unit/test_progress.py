"""What a terminal shows while a run goes on, and what a log gets."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios

import pytest

from prunadapt_ds.tracking import duration
from tests.conftest import ROOT

pytestmark = pytest.mark.fast
RUN = """
import sys, time
from pathlib import Path
from prunadapt_ds.tracking import Tracker
tracker = Tracker(Path(sys.argv[1]), 1000, enabled=True, step=900)
for step in range(901, 905):
    time.sleep(0.2)
    tracker.advance(step, "recover")
tracker.log(904, "recover", {"train/loss": 0.25, "sparsity/achieved": 0.5, "memory/live(bytes)": 2**20})
tracker.log(904, "recover", {"eval/score": 0.75})
time.sleep(0.2)
tracker.advance(905, "recover")
tracker.close()
"""


@pytest.fixture
def shown(tmp_path):
    """What the run writes to a terminal, and to a file where `log` is one instead of standard output."""

    def run(log):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        with open(tmp_path / "log", "w") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, str(tmp_path / "out")],
                cwd=ROOT,
                stdout=file if log else theirs,
                stderr=theirs,
            )
        os.close(theirs)
        written = b""
        while select.select([ours], [], [], 100)[0]:
            try:
                part = os.read(ours, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            written += part
        os.close(ours)
        assert process.wait(100) == 0, written.decode()
        return written.decode(), (tmp_path / "log").read_text()

    return run


def test_the_bar_goes_on_where_the_run_did_and_keeps_what_it_shows(shown):
    text, _ = shown(log=False)
    last = [line for line in text.split("\r") if "905/1000" in line][-1]
    assert "loss 0.25  sparsity 0.5  MiB 1  score 0.75" in last, last
    rates = [float(rate) for rate in re.findall(r"([\d.]+)step/s", text)]
    assert rates and max(rates) < 50, "steps of an earlier process are none of this one's"
    assert "step 904/1000" not in text, "the bar is enough"


def test_a_log_has_its_lines_beside_a_terminal_with_the_bar(shown):
    text, log = shown(log=True)
    assert "905/1000" in text
    first, second = log.splitlines()
    assert first.startswith("step 904/1000  recover  loss 0.25  sparsity 0.5  MiB 1  left 0:")
    assert second.startswith("step 904/1000  recover  score 0.75  left 0:")


def test_what_is_left_is_said_in_hours():
    assert [duration(s) for s in (7, 187, 7387, 97387)] == ["0:07", "3:07", "2:03:07", "1 d 3:03:07"]
