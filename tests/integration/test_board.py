"""TensorBoard's real server lists what a run writes."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

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
