"""Tracker and report."""

import copy
import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from prunadapt_ds import report, setup
from prunadapt_ds.config import parse
from prunadapt_ds.errors import PrunadaptError
from prunadapt_ds.tracking import Tracker

pytestmark = pytest.mark.fast


def filled():
    r = report.empty()
    r |= {"status": "complete", "task": "mrpc", "method": "prunadapt", "model": "some/encoder", "seed": 0}
    for kind in ("teacher", "masked", "exported"):
        r["metric"][kind] = {"accuracy": 0.8123, "f1": 0.87, "score": 0.84}
    r["params"] |= {"encoder_dense": 1000, "encoder_kept": 400}
    r["macs"] |= {"dense": 4_000_000, "kept": 2_000_000, "seq_length": 128}
    r["latency"] |= {"dense_ms": 10.0, "exported_ms": 5.0, "batch_size": 32}
    r["structure"] = [{"layer": 0, "heads": 3, "neurons": 40}]
    r["exports"] = {"compact": {"path": "exports/compact", "needs_remote_code": True}}
    return r


def test_speed_that_was_asked_for_and_measured():
    assert report.speedup(filled()) == "" and "Speed-up" not in report.markdown(filled()) + report.table(filled())
    r = filled()
    r["latency"] |= {"target_speedup": 2.0, "table_speedup": 2.011, "speedup": 1.934}
    for text in (report.markdown(r), report.table(r)):
        text = " ".join(text.split())
        assert "Speed-up: 2.00 requested, 2.01 predicted" in text and "1.93 measured" in text


def test_one_request_is_timed_beside_a_batch():
    """Once, if that is the batch; reports of older versions do not say."""
    rows = {name: cells for name, *cells in report.costs(filled())}
    assert rows["latency (ms), batch 1"] == ["-", "-"] and rows["latency (ms), batch 32"] == ["10.0", "5.0 (50.0%)"]
    older, single = filled(), filled()
    del older["latency"]["dense_ms_batch_1"], older["latency"]["exported_ms_batch_1"]
    assert report.costs(older) == report.costs(filled())
    single["latency"] |= {"batch_size": 1, "dense_ms_batch_1": 2.0, "exported_ms_batch_1": 1.5}
    assert [name for name, *_ in report.costs(single) if name.startswith("latency")] == ["latency (ms), batch 1"]
    single["latency"]["batch_size"] = 8
    assert ("latency (ms), batch 1", "2.0", "1.5 (75.0%)") in report.costs(single)


def test_keys_are_null_never_absent(tmp_path):
    report.validate(report.empty())
    report.write(tmp_path, report.empty())
    assert json.loads((tmp_path / "report.json").read_text()) == report.empty()
    assert (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("path", [("status",), ("time", "train_s"), ("memory", "peak_rank_bytes", "dense_phase")])
def test_a_missing_or_unknown_key_is_refused(tmp_path, path):
    broken = copy.deepcopy(filled())
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    inner["surprise"] = inner.pop(path[-1])
    with pytest.raises(ValueError) as caught:
        report.write(tmp_path, broken)
    assert f"{path[-1]} is missing" in str(caught.value) and "surprise is unknown" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "part, value, named",
    [
        ("metric", {"teacher": 3, "masked": None, "exported": None}, "metric.teacher"),
        ("metric", {"teacher": None, "masked": {"f1": 1.0}, "exported": None}, "metric.masked"),
        ("structure", [{"layer": 0, "heads": 1}], r"structure\[0\].neurons"),
        ("exports", {"compact": {"path": "x"}}, "exports.compact.needs_remote_code"),
    ],
)
def test_parts_with_free_keys_are_checked_inside(part, value, named):
    with pytest.raises(ValueError, match=named):
        report.validate(filled() | {part: value})


def test_what_json_cannot_say_is_null(tmp_path):
    r = filled()
    r["time"]["train_s"], r["metric"]["masked"]["f1"] = float("inf"), float("nan")
    report.write(tmp_path, r)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["time"]["train_s"] is None and read["metric"]["masked"]["f1"] is None
    assert "nan" not in (tmp_path / "report.md").read_text()


def test_table_says_what_the_report_says():
    text = report.table(filled())
    assert all(len(line) <= 100 for line in text.splitlines())
    for figure in ("81.23", "87.00", "84.00", "400 (40.0%)", "2 (50.0%)", "5.0 (50.0%)"):
        assert figure in text, figure
    assert "40.0%" in report.markdown(filled())
    assert "teacher / dense" not in text + report.markdown(filled())


def test_the_headline_says_what_was_kept():
    r = filled()
    r["metric"]["exported"] = {"accuracy": 0.8, "score": 0.63}
    r["time"] |= {"train_s": 12.0, "steps": 9}
    assert report.headline(r)[:3] == [
        ("score", "63.0", "teacher: 84.0, 75.0% kept"),
        ("parameters", "40%", "of the dense model's, blocks only"),
        ("MACs", "50%", "of the dense model's"),
    ]
    assert "- **63.0** score (teacher: 84.0, 75.0% kept)\n- **40%** parameters" in report.markdown(r)
    r["metric"]["teacher"] = {"score": -0.1}
    assert report.headline(r)[0] == ("score", "63.0", "teacher: -10.0"), "no share of what is not positive"
    r["metric"] |= {"teacher": {"score": 5.0}, "exported": {"score": 6.0}}
    assert report.headline(r | {"task": "causal_lm"})[0] == ("perplexity", "6.0", "teacher: 5.0, 1.20 times that")
    r["metric"]["teacher"] = None
    assert report.headline(r)[0][2] == "exported model"


def test_nothing_is_said_of_what_a_run_did_not_do():
    r = filled()
    assert "The teacher comes from" in report.markdown(r)
    r["distillation"] = {"r2": 0.034, "followed": False}
    assert "It was not used, because its R2 on training examples was only 3.4%" in report.markdown(r)
    r["metric"]["teacher"] = None
    assert report.notes(r) == [] and "teacher comes" not in report.markdown(r) and "differ" not in report.markdown(r)
    r["parity"] |= {"max_abs_logit_diff": 1e-6, "tolerance": 1e-4, "examples": 300}
    (note,) = report.notes(r)
    assert "differ by at most 1.00e-06 in their logits, computed in fp32, on 300 examples (tolerance: 1.00e-04)" in note


def test_memory_is_taken_apart():
    r = filled()
    assert report.live_parts(r) == [] and "Live memory per" not in report.markdown(r)
    r["memory"]["live_parts_bytes"] = {
        "dense": {"parameters": 2**22, "optimizer": 2**21, "activations": 2**20},
        "after_shrink": {"parameters": 2**21, "optimizer": 2**20, "activations": 2**19},
    }
    report.validate(r)
    assert "| parameters | 4.0 | 2.0 (50.0%) |\n| optimizer | 2.0 | 1.0 (50.0%) |\n| activations |" in report.markdown(
        r
    )


@pytest.mark.parametrize(
    "model, name",
    [
        ("org/name", "org/name"),
        ("/data/x/bert", "bert"),
        ("./a/b/", "b"),
        ("models/mine/bert", "bert"),
        ("bert", "bert"),
    ],
)
def test_a_folder_is_called_by_its_own_name(model, name):
    assert report.short_model(model) == name
    assert report.markdown(filled() | {"model": model}).startswith(f"# mrpc: prunadapt on {name}\n")


def test_the_launcher_and_the_versions_are_named():
    r = filled() | {"world_size": 8, "launcher": "srun", "nodes": 2}
    r["versions"] |= {"python": "3.12.1", "prunadapt_ds": "0.1.0"}
    text = report.markdown(r)
    assert "8 rank(s) by srun on 2 node(s)" in text and "python 3.12.1, prunadapt_ds 0.1.0" in text


def test_tracker_writes_all_three(tmp_path, capsys):
    tracker = Tracker(tmp_path, 10, enabled=True)
    tracker.log(5, "dense", {"train/loss": 0.5, "samples/s": float("nan")})
    tracker.say("hello")
    tracker.text("config", "{}")
    tracker.close()
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 5, "phase": "dense", "train/loss": 0.5, "samples/s": None
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "step 5/10" in printed and "loss 0.5" in printed and "hello" in printed
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert "train/loss" in events.Tags()["scalars"]


def steps_in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [e.step for e in EventAccumulator(str(folder / "runs")).Reload().Scalars("train/loss")]


def test_metrics_go_on_where_the_checkpoint_was(tmp_path):
    """No line twice, none lost, in the file as in TensorBoard."""
    tracker = Tracker(tmp_path, 10, enabled=True)
    for step in (1, 2, 3):
        tracker.log(step, "dense", {"train/loss": step})
        if step == 2:
            size = tracker.metrics_bytes()
    tracker.close()
    tracker = Tracker(tmp_path, 10, enabled=True, step=2, metrics_bytes=size)
    for step in (3, 4):
        tracker.log(step, "dense", {"train/loss": step})
    tracker.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4] == steps_in_tensorboard(tmp_path)


def test_a_run_goes_on_when_tensorboard_s_folder_vanishes(tmp_path, capsys):
    tracker = Tracker(tmp_path, 1000, enabled=True)
    while (tmp_path / "runs").exists():  # the writer's thread may put a file into it meanwhile
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    (tmp_path / "runs").write_text("a file")
    for step in range(200):
        tracker.log(step, "dense", {"train/loss": 1.0})
        if step == 100:
            time.sleep(0.5)  # its thread has stumbled by now
    tracker.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 200
    printed = capsys.readouterr().out
    assert printed.count("TensorBoard logging stopped") == 1


def test_a_run_goes_on_where_tensorboard_has_no_folder(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    tracker = Tracker(tmp_path, 10, enabled=True)
    tracker.log(1, "dense", {"train/loss": 1.0})
    tracker.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert capsys.readouterr().out.count("TensorBoard logging is off: ") == 1


def test_metrics_that_cannot_be_opened_are_every_rank_s_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    config, ds = parse(["--output_dir", str(tmp_path)]), SimpleNamespace(board_dir=None)
    with pytest.raises(PrunadaptError, match=r"opening metrics.jsonl failed: .*Is a directory"):
        setup.tracker_of(config, ds, 10, None, tracked=True)
    assert not setup.tracker_of(config, ds, 10, None, tracked=False).enabled


def test_metrics_that_cannot_be_written_are_told(tmp_path):
    tracker = Tracker(tmp_path, 10, enabled=True)
    tracker._file.close()
    tracker._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    tracker.log(1, "dense", {"train/loss": 1.0})
    assert "metrics.jsonl" in tracker.problem and "No space left" in tracker.problem
    tracker.close()


def test_other_ranks_write_nothing(tmp_path):
    tracker = Tracker(tmp_path / "out", 10, enabled=False)
    tracker.log(1, "dense", {"train/loss": 1.0})
    tracker.advance(1, "dense")
    tracker.say("x")
    tracker.text("x", "y")
    tracker.close()
    assert not (tmp_path / "out").exists()


def test_matched_and_mismatched_are_both_reported():
    from prunadapt_ds.data import TASKS
    from prunadapt_ds.session import measures

    logits = torch.eye(3)
    sets = {"matched": torch.tensor([0, 1, 2]), "mismatched": torch.tensor([0, 0, 0])}
    session = SimpleNamespace(
        data=SimpleNamespace(task=TASKS["mnli"], is_regression=False, is_language=False, num_labels=3),
        validation_rows={name: SimpleNamespace(labels=labels) for name, labels in sets.items()},
    )
    found = measures(session, dict.fromkeys(sets, logits))
    assert found == pytest.approx({"matched/accuracy": 1.0, "mismatched/accuracy": 1 / 3, "score": 2 / 3})
