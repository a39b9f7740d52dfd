"""TensorBoard's real server lists what a run writes."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.unit.test_board import written

pytestmark = pytest.mark.ci


def test_the_real_server_lists_it(tmp_path):
    written(tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(tmp_path),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = ask(f"http://127.0.0.1:{port}/data/plugin/", 180)
    finally:
        server.kill()
        server.wait()
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
