"""What a run says that its ranks send, beside what DeepSpeed counts, and the seconds that it says it took."""

import json

import pytest

from prunadapt_ds import report as reports
from prunadapt_ds.schedule import PruningSchedule
from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.distributed.test_laws import arguments
from tests.tiny import tiny_data, tiny_folder

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("traffic")
    tiny_folder(base / "bert", "bert", hidden_size=128, intermediate_size=512)
    tiny_data(base / "data", n_train=40, n_dev=12)
    return base


@pytest.mark.parametrize(
    "stage, accumulation",
    [(3, 2), (2, 2), (1, 2), (0, 2), *(pytest.param(stage, 1, marks=pytest.mark.full) for stage in range(4))],
)
def test_what_is_sent_is_what_deepspeed_counts(folder, tmp_path, stage, accumulation):
    """Of two ranks: what they gather, and what they reduce, at some stages after every micro-batch."""
    argv = arguments(folder, tmp_path / "out", stage=stage, gradient_accumulation_steps=accumulation)
    for found in run_ranks(runs.sent_in_a_step, 2, argv):
        assert found["sent"] == pytest.approx(found["said"], rel=0.1 if stage == 3 else 0.001), found
        assert (found["said"] > found["whole"] / 2) == (stage == 3)


def test_a_run_writes_it_down_and_it_falls_with_the_model(folder, tmp_path):
    out = tmp_path / "out"
    argv = arguments(folder, out, target_sparsity=0.6, shrink="always", max_steps=8)
    assert run_ranks(runs.whole_run, 2, argv) == [0, 0]
    report = json.loads((out / "report.json").read_text())
    reports.validate(report)
    sent, lines = (
        report["communication"]["sent_bytes"],
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
    )
    written = [line["communication/sent(bytes)"] for line in lines if "train/loss" in line]
    assert written[0] == sent["dense"] > 1.3 * sent["after_shrink"] and written[-1] == sent["after_shrink"]
    parts, live = report["memory"]["live_parts_bytes"], report["memory"]["live_tensor_bytes"]
    for kind in ("dense", "after_shrink"):
        assert all(parts[kind].values()) and sum(parts[kind].values()) == pytest.approx(live[kind], rel=0.05)
    taught = [line for line in lines if "distillation/loss" in line]
    assert taught and all(line["distillation/loss"] >= 0 for line in taught)
    schedule = PruningSchedule.from_fractions(8, 0.25, 0.6, 2, 0.6)
    weights = [0.5 * schedule.teacher_factor(line["step"] - 1, 8) for line in taught]
    assert [line["distillation/weight"] for line in taught] == pytest.approx(weights) and weights[0] > weights[-1] > 0
    assert not any("distillation/loss" in line for line in lines if line["phase"] == "dense")
    assert report["nodes"] == 1 and report["time"]["checkpoint_s"] > 0 and report["versions"]["prunadapt_ds"]


def test_all_that_a_user_waits_for_is_training_or_evaluation(folder, tmp_path):
    """Also pictures of decisions, lines of the log and waiting for other ranks, which differ from what other programs do."""
    argv = arguments(folder, tmp_path / "out", target_sparsity=0.6, max_steps=6, num_decisions=2, logging_steps=2)
    ((uncounted, counted),) = run_ranks(runs.uncounted, 1, argv)
    assert uncounted < runs.SLOWER < counted
