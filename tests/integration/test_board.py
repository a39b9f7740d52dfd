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
from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.distributed.test_laws import arguments
from tests.tiny import tiny_data, tiny_folder
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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    tiny_folder(folder / "bert", "bert")
    tiny_data(folder / "data", n_train=40, n_dev=12)
    return folder


def scalars_below(folder):
    """(tag, step) of every scalar in every file of events below a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        (value.tag, event.step)
        for file in folder.rglob("events.*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name in ("", "scalars")
    ]


def test_beside_deepspeed_s_own_monitor_nothing_is_written_twice(base, tmp_path):
    """Its tensorboard block says where ours go, its csv block is its own; engines are rebuilt meanwhile."""
    out = tmp_path / "out"
    argv = arguments(base, out, batch=8, max_steps=10, logging_steps=2, shrink="always", target_sparsity=0.6)
    config = json.loads((out / "ds.json").read_text())
    config |= {
        "tensorboard": {"enabled": True, "output_path": str(tmp_path / "events"), "job_name": "a"},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "b"},
    }
    (out / "ds.json").write_text(json.dumps(config))
    ((code, said),) = run_ranks(runs.whole_run_said, 1, argv)
    assert code == 0, said
    found = scalars_below(tmp_path)
    assert found and len(found) == len(set(found)), sorted(x for x in found if found.count(x) > 1)
    assert ("train/loss", 10) in found and ("efficiency/sent_per_step_MiB", 10) in found
    assert "distillation/loss" in {tag for tag, _ in found}
    assert not [tag for tag, _ in found if tag.startswith("Train/")], "DeepSpeed's, which has its own files"
    assert list((tmp_path / "events" / "a").glob("events.*")) and not (out / "runs").exists()
    assert (tmp_path / "csv" / "b" / "Train_Samples_lr.csv").stat().st_size


def test_the_one_decision_of_tmp_has_its_pictures(base, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = arguments(base, tmp_path / "out", batch=8, max_steps=4, method="tmp")
    assert run_ranks(runs.whole_run, 1, argv) == [0]
    events = EventAccumulator(str(tmp_path / "out" / "runs")).Reload()
    for tag in ("pruning/importance", "pruning/kept"):
        assert [picture.step for picture in events.Images(tag)] == [0]
    assert events.Scalars("pruning/kept_heads")[0].value == 12 - round(43 / 144 * 12)
    assert "distillation/loss" not in events.Tags()["scalars"]


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
