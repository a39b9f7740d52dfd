"""Set before torch and DeepSpeed are imported, by this process and every rank it starts."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402


def pytest_configure(config):
    """`pytest` alone runs the fast tier; tests named on the command line run whatever their tier."""
    if not config.option.markexpr and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.option.markexpr = "fast"


TIERS = ("fast", "ci", "full", "slurm", "gpu")


def pytest_itemcollected(item):
    """A test of no tier would run in none."""
    if not any(item.get_closest_marker(tier) for tier in TIERS):
        raise pytest.UsageError(f"{item.nodeid} has no tier; mark it with one of {', '.join(TIERS)}")


@pytest.fixture
def glue_dir():
    """Real GLUE in the official layout, where this machine has it."""
    folder = Path(os.environ.get("PRUNADAPT_GLUE_DIR", ROOT.parent / "shared" / "glue"))
    if not folder.is_dir():
        pytest.skip("no GLUE files here; set PRUNADAPT_GLUE_DIR to a folder with the official TSVs")
    return folder
