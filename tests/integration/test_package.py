"""The wheel, installed where nothing of the checkout is at hand."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.processes import free_port

pytestmark = pytest.mark.full


def call(command, cwd, **environment):
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=keep | environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the tracked files, its sdist, and the wheel that is made of the sdist."""
    folder = tmp_path_factory.mktemp("build")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    backend = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    call([sys.executable, "-c", backend, folder], folder / "source")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder]
    call([*pip, source], folder)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A fresh environment with the wheel; the large libraries come from this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (wheel,) = built.glob("*.whl")
    call([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel], built)
    import torch

    (site / "libraries.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")  # after its own packages
    return folder


def test_the_wheel_holds_all_it_needs(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder, inside in (
        ("prunadapt_ds", "prunadapt_ds"),
        ("ds_configs", "prunadapt_ds/ds_configs"),
        ("slurm", "prunadapt_ds/slurm"),
    ):
        for path in (built / "source" / folder).rglob("*"):
            if path.is_file():
                assert f"{inside}/{path.relative_to(built / 'source' / folder)}" in names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "launcher"))]


def test_the_sdist_is_the_checkout(built):
    """But for what only the repository's own machinery reads."""
    (unpacked,) = (built / "unpacked").iterdir()
    tracked = {p.relative_to(built / "source") for p in (built / "source").rglob("*") if p.is_file()}
    tracked = {p for p in tracked if p.parts[0] != ".ci" and not p.parts[0].endswith((".egg-info", "build"))}
    held = {p.relative_to(unpacked) for p in unpacked.rglob("*") if p.is_file()}
    assert tracked - held == set()
    for name in (
        "docs/index.md",
        "launcher/train.py",
        "slurm/train.sh",
        "constraints.txt",
        "Makefile",
        "tests/tiny.py",
    ):
        assert Path(name) in held
    assert not [p for p in held if p.suffix == ".pyc"]
    assert "](docs/" not in (unpacked / "PKG-INFO").read_text(), "links that an index cannot follow"


def test_a_clean_environment_trains(built, tmp_path):
    """The wheel with what it declares and nothing else, at the versions of constraints.txt; two steps of the built-in sample."""
    venv.create(tmp_path / "venv", with_pip=False)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "venv" / "bin" / "python"]
    call([*pip, "install", "-q", "-c", built / "source" / "constraints.txt", f"{wheel}[sample]"], tmp_path)
    call([*pip, "check"], tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    short = ["--max_steps", "2", "--num_decisions", "1", "--max_eval_samples", "32", "--max_train_samples", "64"]
    call([tmp_path / "venv" / "bin" / "prunadapt", "train", *short], work, OMP_NUM_THREADS="1")
    report = json.loads((work / "outputs" / "report.json").read_text())
    assert report["status"] == "complete" and report["time"]["steps"] == 2
    assert f"torch=={report['versions']['torch'].partition('+')[0]}" in (ROOT / "constraints.txt").read_text().split()


def test_the_installed_command(installed, tmp_path):
    """From another folder: help, doctor, templates, and a run's options with the package's own DeepSpeed configuration."""
    command = installed / "bin" / "prunadapt"
    assert "init-slurm" in call([command, "--help"], tmp_path)
    assert call([command, "--version"], tmp_path).startswith("prunadapt ")
    where = call([installed / "bin" / "python", "-c", "import prunadapt_ds as p; print(p.__file__)"], tmp_path)
    assert str(installed) in where
    assert "no problems found" in call([command, "doctor"], tmp_path)
    call([command, "init-slurm", "jobs"], tmp_path)
    assert (tmp_path / "jobs" / "slurm" / "train.sh").is_file() and (
        tmp_path / "jobs" / "ds_configs" / "zero3.json"
    ).is_file()
    code = (
        "from prunadapt_ds.data import generate, load_metric; assert generate('validation')\n"
        "assert load_metric('mrpc').compute(predictions=[1], references=[1])['accuracy'] == 1\n"
        "from prunadapt_ds.models import modeling_prunadapt as m; import pathlib; assert pathlib.Path(m.__file__).is_file()"
    )
    call([installed / "bin" / "python", "-c", code], tmp_path)


@pytest.mark.parametrize(
    "launcher",
    [
        ["deepspeed", "--num_accelerators", "2", "--master_port", free_port(), "--module"],
        ["torchrun", "--nproc-per-node", "2", "--master_port", free_port(), "-m"],
    ],
)
def test_every_launcher_runs_the_module(launcher, tmp_path):
    out = call([*launcher, "prunadapt_ds", "doctor"], ROOT, OMP_NUM_THREADS="1")
    assert "2 rank(s)" in out and "no problems found" in out
