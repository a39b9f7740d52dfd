"""One cluster for all tests of this folder, and what they train."""

import json
import sys

import pytest

from tests.conftest import ROOT
from tests.slurm import cluster as clusters
from tests.tiny import tiny_folder, tiny_glue


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if why := clusters.missing():
        pytest.skip(why)
    with clusters.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_folder(folder / "bert", "bert")
    tiny_glue(folder / "glue")
    zero3 = {"bf16": {"enabled": False}, "zero_optimization": {"stage": 3}}
    (folder / "ds.json").write_text(json.dumps(zero3))
    return folder


@pytest.fixture(scope="session")
def variables(base):
    """Both nodes are this machine, whose name is not theirs: MASTER_ADDR has to say so."""
    return {
        "MODEL": str(base / "bert"),
        "DATA_DIR": str(base / "glue"),
        "DS_CONFIG": str(base / "ds.json"),
        "VENV": sys.prefix,
        "MASTER_ADDR": "127.0.0.1",
        "RANKS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
