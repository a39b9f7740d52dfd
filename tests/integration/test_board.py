"""TensorBoard's real server lists what a run writes."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.test_board import written

pytestmark = pytest.mark.ci


@contextlib.contextmanager
def server(folder):
    """TensorBoard's real server on a folder; yields its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_the_real_server_lists_it(tmp_path):
    written(tmp_path)
    with server(tmp_path) as address:
        found = ask(f"{address}/data/plugin/", 180)
    assert {"train/loss", "pruning/sparsity"} <= set(found["scalars"]["runs"])
    assert {"pruning/importance", "pruning/kept"} <= set(found["images"]["runs"])
    assert "pruning/gates" in found["histograms"]["runs"]
    assert "config/text_summary" in found["text"]["runs"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_tensorboard_answers_on_this_machine_alone(tmp_path):
    """The target itself, on outputs/ of another folder; it names its port."""
    written(tmp_path / "outputs")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "-o", ".venv/.installed", "tensorboard"]
    keep = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PATH": path}, **keep)
    try:
        address = next(filter(None, (re.search(r"TensorBoard \S+ at (\S+)/ ", line) for line in process.stderr)))[1]
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
        assert address.startswith("http://127.0.0.1:")
        assert "train/loss" in ask(f"{address}/data/plugin/", 180)["scalars"]["runs"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(base, patience):
    """The tags of every plugin, once the server has read the events."""
    deadline = time.monotonic() + patience
    while True:
        try:
            found = {}
            for plugin in ("scalars", "images", "histograms", "text"):
                with urllib.request.urlopen(base + plugin + "/tags", timeout=10) as reply:
                    found[plugin] = json.load(reply)
            if all(found.values()):
                return found
        except OSError:
            pass
        assert time.monotonic() < deadline, "the server did not answer in time"
        time.sleep(0.5)
