"""What TensorBoard gets, read back from the events."""

import json

import pytest
import torch

from prunadapt_ds import board, report
from prunadapt_ds.budget import decide
from prunadapt_ds.models.structure import Structure, SubLayer
from prunadapt_ds.tracking import Tracker

pytestmark = pytest.mark.fast
SUBLAYERS = (SubLayer(0, "heads", 0, 4, 100, 10), SubLayer(0, "neurons", 4, 16, 10, 1))
STRUCTURE = Structure(SUBLAYERS, fixed_params=10, other_params=50, seq_length=8)


def written(folder):
    tracker = Tracker(folder, 10, enabled=True)
    scores = torch.arange(1.0, 21.0)
    plan = decide(scores, STRUCTURE, 0.5)
    tracker.log(2, "dense", {"train/loss": 0.5, "sparsity/achieved": 0.1, "samples/s": 3.0, "learning_rate/gates": 0.1})
    tracker.log(4, "dense", {"memory/live(bytes)": 3 * 2**20, "memory/parameters(bytes)": 2**20})
    tracker.show(lambda w: board.decision(w, step=4, plan=plan, scores=scores, gates=torch.ones(20)))
    tracker.text("config", "{}")
    filled = report.empty()
    filled["metric"]["exported"], filled["time"]["train_s"] = {"score": 0.75}, 3.0
    options = board.options_of({"prune": {"method": "prunadapt", "r": 8, "shrink": "auto"}})
    tracker.show(lambda w: board.result(w, options, board.measures_of(filled), {"r", "shrink"}))
    tracker.close()
    return plan


def test_everything_is_under_its_group(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = written(tmp_path)
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    tags = events.Tags()
    scalars = {"train/loss", "pruning/sparsity", "efficiency/samples_per_second", "train/learning_rate_gates"}
    assert scalars | {"result/score", "pruning/kept_heads"} <= set(tags["scalars"])
    assert {"pruning/importance", "pruning/kept"} == set(tags["images"])
    assert {"pruning/gates", "pruning/log10_scores_heads", "pruning/log10_scores_neurons"} == set(tags["histograms"])
    assert {"config/text_summary", "plan/text_summary"} <= set(tags["tensors"])
    kept = plan.counts()[0]
    assert events.Scalars("pruning/kept_heads")[0].value == kept["heads"]
    assert events.Scalars("result/score")[0].value == 0.75
    assert events.Scalars("efficiency/live_MiB")[0].value == 3.0
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["samples/s"] == 3.0  # names in metrics.jsonl stay
    assert '"memory/live(bytes)": 3145728' in (tmp_path / "metrics.jsonl").read_text()
    for tag in ("pruning/importance", "pruning/kept"):
        assert events.Images(tag)[0].width >= 900, "letters would be ragged"


def test_the_table_of_runs_shows_first_what_tells_runs_apart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    options = {"method": "prunadapt", "budget": "params", "r": 8, "task_name": "rte", "target_sparsity": 0.5}
    tracker = Tracker(tmp_path, 10, enabled=True)
    tracker.show(lambda w: board.result(w, options, {"score": 0.5, "sparsity": None}, {"r", "task_name"}))
    tracker.close()
    contents = EventAccumulator(str(tmp_path / "runs")).Reload().PluginTagToContent("hparams")
    table = HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment
    assert {info.name for info in table.hparam_infos} == set(options)
    assert {info.name for info in table.hparam_infos if info.differs} == {"method", "target_sparsity", "r"}
    assert [info.name.tag for info in table.metric_infos] == ["result/score"]


def test_blocks_of_neurons_are_means_and_heads_are_themselves():
    scores = torch.tensor([1.0, 10, 100, 1000] + [1.0] * 8 + [100.0] * 8)
    tables = board.score_tables(decide(scores, STRUCTURE, 0.0), scores)
    assert tables["heads"].tolist() == [[0, 1, 2, 3]]
    assert tables["neurons"].tolist() == [[0.0] * 8 + [2.0] * 8]


def test_the_layout_names_tags_that_exist(tmp_path):
    metrics = ("train/loss", "eval/score", "sparsity/target", "sparsity/achieved", "samples/s")
    known = {board.tag(m) for m in (*metrics, "memory/live(bytes)", "memory/parameters(bytes)")}
    assert {name for chart in board.LAYOUT["run"].values() for name in chart[1]} <= known


@pytest.mark.parametrize(
    "block, folder",
    [
        ({"enabled": True, "output_path": "events", "job_name": "a"}, "events/a"),
        ({"enabled": True}, None),
        ({"enabled": False, "output_path": "events"}, None),
    ],
)
def test_deepspeed_does_not_write_our_curves_again(tmp_path, block, folder):
    from prunadapt_ds.config import parse
    from prunadapt_ds.ds_config import resolve_ds_config

    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"tensorboard": block, "csv_monitor": {"enabled": True}}))
    ds = resolve_ds_config(parse(["--ds_config", str(path)]), 1)
    assert ds.board_dir == folder and "tensorboard" not in ds.values and ds.values["csv_monitor"] == {"enabled": True}
