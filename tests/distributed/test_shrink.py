"""Shrinking inside a running engine, on real ranks: same losses, same moments, smaller shapes, nothing whole."""

import json

import numpy as np
import pytest
import torch

from prunadapt_ds.schedule import LearningRateSchedule
from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.distributed.test_laws import arguments as law_arguments
from tests.tiny import tiny_data, tiny_folder

pytestmark = pytest.mark.ci
DECISIONS = (4, 6, 7)  # of 12 steps


def arguments(folder, output, **options):
    return law_arguments(folder, output, **{"max_steps": 12, "num_decisions": 3, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("tiny")
    tiny_folder(base / "bert", "bert")
    tiny_data(base / "data", n_train=37, n_dev=21)
    return base


@pytest.fixture(scope="module")
def shrunk(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("shrunk") / "out"
    return run_ranks(runs.shrink_in_training, 2, arguments(folder, output, batch=4, target_sparsity=0.6))


def check(result, rel=1e-4):
    assert {s["state"][0]["steps"] for s in result["seen"]} <= set(DECISIONS)
    for shrink in result["seen"]:
        before, after = shrink["losses"]
        assert after == pytest.approx(before, rel=rel, abs=rel / 10)
        old, new = shrink["state"]
        assert old["steps"] == new["steps"]
        smaller = len(old["masters"].keys() - new["masters"].keys())  # gone with their sub-layer
        for key in ("masters", "exp_avg", "exp_avg_sq"):
            for name, values in new[key].items():
                assert runs.is_slice(values, old[key][name]), f"{key} of {name}"
                smaller += values.shape != old[key][name].shape
        assert smaller > 3
        assert any(np.abs(v).max() > 0 for v in new["exp_avg"].values())


def test_learning_rates_go_on_where_they_were(shrunk):
    lines = [line for line in shrunk[0]["lines"] if "train/loss" in line]
    schedule = LearningRateSchedule(round(0.06 * 12), 12)
    assert [line["learning_rate/gates"] for line in lines] == pytest.approx(
        [1e-2 * schedule.factor(s) for s in range(12)]
    )


def test_steps_that_record_are_timed_apart(shrunk):
    """Steps 4 to 7 of 12 record, of which one has no new engine and no longer samples to be counted."""
    for result in shrunk:
        (between,) = result["timed"]["recording"]
        dense, last = result["timed"]["plain"]
        assert dense == result["dense_size"] > between > last


def test_tensors_in_the_engine_have_the_plan_s_shapes(shrunk):
    for shrink in shrunk[0]["seen"]:
        for row in shrink["counts"]:
            prefix = f"bert.encoder.layer.{row['layer']}."
            if row["heads"]:
                assert shrink["shapes"][prefix + "attention.self.query.base_layer.weight"] == (8 * row["heads"], 32)
                assert shrink["shapes"][prefix + "attention.output.dense.lora_A.default.weight"] == (
                    8,
                    8 * row["heads"],
                )
                assert shrink["shapes"][prefix + "attention.output.prune_gate.delta"] == (row["heads"],)
            else:
                assert prefix + "attention.self.query.base_layer.weight" not in shrink["shapes"]
            if row["neurons"]:
                assert shrink["shapes"][prefix + "intermediate.dense.base_layer.weight"] == (row["neurons"], 32)
                assert shrink["shapes"][prefix + "output.dense.base_layer.weight"] == (32, row["neurons"])
                assert shrink["shapes"][prefix + "intermediate.dense.lora_B.default.weight"] == (row["neurons"], 8)


def test_never_more_than_one_module_is_whole(shrunk):
    for result in shrunk:
        assert result["whole"] and max(modules for modules, _ in result["whole"]) <= 1


def test_frozen_weights_stay_sharded_after_the_shrink(shrunk):
    for result in shrunk:
        assert max(s["frozen_share"] for s in result["seen"]) <= 1 / 2 + 0.02
        assert result["frozen_share"] <= 1 / 2 + 0.02


def test_an_old_engine_leaves_nothing_behind(shrunk):
    for result in shrunk:
        assert [s["engines"] for s in result["seen"]] == [1] * len(result["seen"])


def test_shards_of_what_was_cut_are_gone_whoever_refers_to_them(shrunk):
    for result in shrunk:
        for shrink in result["seen"]:
            assert shrink["left_of_shards"] and not any(shrink["left_of_shards"])


def test_the_dense_parameters_are_gone(folder, tmp_path):
    """Enough steps between decisions for ZeRO-3 to have gone by a trace, whose answers it keeps."""
    found = run_ranks(runs.fit, 1, arguments(folder, tmp_path / "out", max_steps=24, shrink="always", num_decisions=3))[
        0
    ]
    assert len(found["strangers"]) == 3 and not any(found["strangers"])


def test_wide_matrices_stay_sharded_when_they_fall_below_the_threshold(folder, tmp_path):
    tiny_folder(tmp_path / "wide", "bert", hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
    argv = arguments(
        folder, tmp_path / "out", model_name_or_path=tmp_path / "wide", max_steps=8, target_sparsity=0.8, batch=4
    )
    for result in run_ranks(runs.shrink_in_training, 2, argv):
        assert result["numel"] < 256 * 1024, "the cut must bring matrices below the threshold they were above"
        assert max(s["frozen_share"] for s in result["seen"]) <= 1 / 2 + 0.02
        assert result["frozen_share"] <= 1 / 2 + 0.02


def test_ranks_get_smaller_and_the_log_says_so(shrunk):
    dense, after = (shrunk[0]["live_bytes"][key] for key in ("dense", "after_shrink"))
    assert after < dense
    lines = [line for line in shrunk[0]["lines"] if "memory/live(bytes)" in line]
    assert lines[-1]["memory/parameters(bytes)"] < lines[0]["memory/parameters(bytes)"] < lines[0]["memory/live(bytes)"]


def test_shrinking_equals_masking_to_the_end(folder, tmp_path):
    """One decision: what is cut cannot matter afterwards, so that a masked run and a shrunk one are the same run.

    The shrunk one recomputes its blocks, whose weights only hooks of the new engine gather at the right time.
    """
    options = {"batch": 4, "num_decisions": 1, "target_sparsity": 0.6}
    argv = arguments(folder, tmp_path / "a", gradient_checkpointing=True, **options)
    shrunk = run_ranks(runs.shrink_in_training, 2, argv)[0]
    masked = run_ranks(runs.fit, 2, arguments(folder, tmp_path / "b", shrink="never", **options))[0]
    losses = [[line["train/loss"] for line in shrunk["lines"] if "train/loss" in line], masked["losses"]]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3, abs=2e-4)
    torch.testing.assert_close(
        torch.tensor(shrunk["masked"]), torch.tensor(masked["logits"]["validation"]), rtol=1e-2, atol=5e-3
    )


@pytest.mark.parametrize("stage, ranks", [(0, 2), (1, 2), (2, 2), (3, 1)])
def test_every_stage_shrinks(folder, tmp_path, stage, ranks):
    argv = arguments(folder, tmp_path / "out", batch=8 // ranks, stage=stage, target_sparsity=0.6)
    for result in run_ranks(runs.shrink_in_training, ranks, argv):
        check(result)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_that_outlives_a_shrink_leaves_the_next_one_alone(folder, tmp_path, stage):
    argv = arguments(folder, tmp_path / "out", batch=4, stage=stage, target_sparsity=0.6)
    for result in run_ranks(runs.shrink_in_training, 2, argv, True):
        check(result)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_the_optimizer_on_the_host_no_engine_outlives_a_shrink(folder, tmp_path, stage):
    zero = {"offload_optimizer": {"device": "cpu"}}
    argv = arguments(folder, tmp_path / "out", batch=4, stage=stage, zero=zero, target_sparsity=0.6)
    for result in run_ranks(runs.shrink_in_training, 2, argv):
        check(result)
        assert [s["engines"] for s in result["seen"]] == [1] * len(DECISIONS)


@pytest.mark.parametrize("stage, accumulation", [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_masters_are_carried_in_fp32_under_bf16(folder, tmp_path, stage, accumulation):
    """And so are sums of gradients over micro-batches, where DeepSpeed can (stages 2 and 3)."""
    options = {"batch": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    argv = arguments(folder, tmp_path / "out", stage=stage, target_sparsity=0.6, **options)
    path = tmp_path / "out" / "ds.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bf16": {"enabled": True}}))
    for result in run_ranks(runs.shrink_in_training, 2, argv):
        check(result, rel=3e-2)
        assert result["accumulates_in"] == ("torch.float32" if stage >= 2 else "torch.bfloat16" if stage else "None")
        masters = result["seen"][0]["state"][1]["masters"]
        rounded = {n: torch.tensor(v).bfloat16().float().numpy() for n, v in masters.items()}
        assert any(not np.array_equal(v, rounded[n]) for n, v in masters.items()), "more digits than bf16 has"


def test_a_block_without_feed_forward_is_computed_again(folder, tmp_path):
    """Its norm still follows the attention, and no gradient comes from there: recomputing it must drop no weight too early."""
    tiny_folder(tmp_path / "llama", "llama")
    found = []
    for recomputes in (False, True):
        options = {"model_name_or_path": tmp_path / "llama", "target_sparsity": 0.7, "shrink": "always"}
        options["zero"] = {"stage3_max_reuse_distance": 0}  # no block in one piece
        argv = arguments(folder, tmp_path / str(recomputes), gradient_checkpointing=recomputes, batch=8, **options)
        found.append(run_ranks(runs.fit, 1, argv)[0])
    assert any(row["neurons"] == 0 for row in found[0]["counts"])
    assert found[0]["plan_hash"] == found[1]["plan_hash"]
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-4)


@pytest.mark.parametrize("model_type", ["phi3", "opt"])  # the others in the full matrix
def test_every_family_shrinks(folder, tmp_path, model_type):
    tiny_folder(tmp_path / model_type, model_type)
    argv = arguments(folder, tmp_path / "out", model_name_or_path=tmp_path / model_type, target_sparsity=0.7, batch=4)
    check(run_ranks(runs.shrink_in_training, 2, argv)[0])
