"""The teacher's mean weights are lent to a running engine, which afterwards is what it was."""

import pytest

from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.distributed.test_laws import arguments
from tests.tiny import tiny_data, tiny_folder

pytestmark = pytest.mark.ci


@pytest.mark.parametrize("stage, ranks", [(3, 2), (0, 1)])
def test_the_engine_gets_the_mean_and_its_own_weights_back(tmp_path, stage, ranks):
    tiny_folder(tmp_path / "bert", "bert")
    tiny_data(tmp_path / "data", n_train=37, n_dev=21)
    argv = arguments(tmp_path, tmp_path / "out", stage=stage, batch=8 // ranks)
    for found in run_ranks(runs.lend_averages, ranks, argv):
        assert found["moved"] > 1e-4
        assert found["off_mean"] < 1e-6
        assert found["same_after"]
