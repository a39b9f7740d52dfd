"""Ranks as plain processes, each with the variables that a launcher would set for it."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from prunadapt_ds import launchers
from tests.conftest import ROOT

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """One rank: its exit code, all it said, and seconds from its start to when its end was seen."""

    code: int
    text: str
    seconds: float

    @property
    def errors(self):
        return [line for line in self.text.splitlines() if line.startswith("error")]


def environment(**more):
    return {**{k: v for k, v in os.environ.items() if k not in LAUNCHED}, "PYTHONPATH": str(ROOT), **more}


def free_port():
    return str(launchers.free_port())


def deepspeed(*words):
    """The command of DeepSpeed's launcher."""
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", free_port(), *words]


PORT = free_port()  # of ranks that are told no other


def place(rank, **more):
    """Variables of one of two ranks on this host; None takes one away."""
    usual = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": PORT,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    return {k: v for k, v in {**usual, **more}.items() if v is not None}


def run(words, *variables, timeout=200):
    """`python *words` once for each of `variables`, all at a time; none may end with a traceback."""
    start, pipes = time.monotonic(), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *map(str, words)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=environment(**{"OMP_NUM_THREADS": "1", **given}), **pipes)
        for given in variables
    ]
    found = []
    try:
        for process in started:
            text, _ = process.communicate(timeout=timeout)
            assert "Traceback" not in text, text
            found.append(Ended(process.returncode, text, time.monotonic() - start))
    finally:
        for process in started:
            process.kill()
    return found
