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


def test_a_teacher_that_explains_too_little_is_not_followed(tmp_path):
    """Nor is it asked: the run is that of `--distill_weight 0`, and ranks see the same share for every split."""
    tiny_folder(tmp_path / "bert", "bert")
    tiny_data(tmp_path / "data", n_train=37, n_dev=21)
    options = {"target_sparsity": 0.5, "shrink": "always"}
    found = {}
    for name, ranks, more in (
        ("one", 1, {"distill_min_r2": 0.99}),
        ("two", 2, {"distill_min_r2": 0.99}),
        ("off", 2, {"distill_weight": 0}),
        ("led", 2, {}),
    ):
        argv = arguments(tmp_path, tmp_path / name, batch=8 // ranks, **options, **more)
        found[name] = run_ranks(runs.fit, ranks, argv)[0]
    assert found["two"]["losses"] == found["off"]["losses"] != found["led"]["losses"]
    assert found["two"]["plan_hash"] == found["off"]["plan_hash"]
    one, two, off, led = (found[name]["distillation"] for name in ("one", "two", "off", "led"))
    assert one["r2"] == pytest.approx(two["r2"], abs=1e-4) and two["r2"] == pytest.approx(led["r2"], abs=1e-6)
    assert (one["followed"], two["followed"], led["followed"]) == (False, False, True)
    assert off == {"r2": None, "followed": None}
