"""The table of many runs: averages as the leaderboard takes them, and nothing that failed passed over."""

import json
import os

import pytest

from prunadapt_ds import report as reports
from prunadapt_ds.commands.glue_table import gather, main, markdown
from prunadapt_ds.data.tasks import GLUE
from tests.conftest import ROOT  # noqa: F401  (the environment)

pytestmark = pytest.mark.fast


def run(root, task, seed, score=None, *, status="complete", code="0", log="", kept=50):
    """What one run leaves behind; without a score only a log and an exit code."""
    folder = root / task / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(log)
    if code is not None:
        (folder / "exit_code").write_text(f"{code}\n")
    if score is None:
        return folder
    report = reports.empty() | {"status": status, "task": task, "seed": seed}
    report["metric"] |= {kind: {"accuracy": score, "score": score} for kind in ("masked", "exported")}
    report["metric"]["teacher"] = {"accuracy": 0.9, "score": 0.9}
    report["params"] |= {"encoder_dense": 100, "encoder_kept": kept}
    report["latency"]["speedup"] = 2.0
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "runs").mkdir()
    (folder / "runs" / "events.out.tfevents.1").write_bytes(b"x")
    return folder


def test_each_task_counts_once_whatever_its_seeds(tmp_path):
    run(tmp_path, "rte", 0, 0.5)
    run(tmp_path, "rte", 1, 0.7)
    run(tmp_path, "cola", 0, 0.2)
    run(tmp_path, "cola", 1, 0.4, kept=30)
    found = gather(tmp_path, ["rte", "cola"], [0, 1])
    assert found["average"]["exported"] == pytest.approx((0.6 + 0.3) / 2)
    assert found["tasks"]["rte"]["deviation"] == pytest.approx(0.1414, abs=1e-3)
    assert found["tasks"]["cola"]["kept"] == pytest.approx(0.4) and found["average"]["teacher"] == pytest.approx(0.9)
    text = (tmp_path / "glue.md").read_text()
    assert "**average** of these tasks" in text and "45.0" in text and "Not in the table" not in text
    assert {p.name for p in (tmp_path / "tensorboard").iterdir()} == {
        f"{t}-seed{s}" for t in ("rte", "cola") for s in (0, 1)
    }


def test_what_is_named_twice_counts_once_and_what_is_not_a_copy_stays(tmp_path):
    run(tmp_path, "rte", 0, 0.5)
    notes, old = tmp_path / "tensorboard" / "notes.txt", tmp_path / "tensorboard" / "cola-seed7" / "events"
    old.parent.mkdir(parents=True)
    for file in (notes, old):
        file.write_text("precious")
    found = gather(tmp_path, ["rte", "rte"], [0, 0])
    assert found["tasks"]["rte"]["of"] == 1 and len(found["cells"]) == 1
    assert notes.read_text() == "precious" and not old.exists() and (tmp_path / "tensorboard" / "rte-seed0").is_dir()


def test_all_nine_are_glue(tmp_path):
    for i, task in enumerate(GLUE):
        run(tmp_path, task, 0, i / 10)
    found = gather(tmp_path, GLUE, [0])
    assert found["is_all_of_glue"] and found["average"]["exported"] == pytest.approx(0.4)
    assert "| **average** | |" in markdown(found)


@pytest.mark.parametrize(
    "made, status, reason",
    [
        (
            {"code": "2", "log": "x\nerror: data_dir='d': no such file\nsrun: error: task 0"},
            "failed",
            "exit code 2: data_dir=",
        ),
        ({"code": "2", "log": "errors:\na='1': b\nc='2': d\nsrun: error: x"}, "failed", "a='1': b; c='2': d"),
        (
            {"code": "1", "log": "Traceback\n  File\ntorch.OutOfMemoryError: CUDA out\n"},
            "failed",
            "torch.OutOfMemoryError: CUDA",
        ),
        ({"code": "137", "log": "slurmstepd: error: Detected 1 oom_kill\n"}, "failed", "oom_kill"),
        (
            {"code": "3", "score": 0.5, "status": "failed", "log": "error: the export's logits differ"},
            "failed",
            "logits differ",
        ),
        (
            {"code": "137", "log": "error: data_dir='d': mended since\nstart of job 8\nslurmstepd: error: oom_kill\n"},
            "failed",
            "exit code 137: slurmstepd: error: oom_kill",
        ),
        ({"code": "75", "log": ""}, "interrupted", "checkpoint"),
        ({"code": "75", "score": 0.5, "status": "interrupted"}, "interrupted", "checkpoint"),
        ({"code": "running", "log": "step 1/9"}, "missing", "never ended"),
        ({"code": "1", "log": ""}, "failed", "look at log.txt"),
    ],
)
def test_what_is_not_complete_is_marked_with_its_reason(tmp_path, made, status, reason, capsys):
    run(tmp_path, "rte", 0, **made)
    run(tmp_path, "wnli", 0, 0.5)
    assert main([str(tmp_path), "--tasks", "rte", "wnli"]) == 1
    (cell,) = [c for c in json.loads((tmp_path / "glue.json").read_text())["cells"] if c["task"] == "rte"]
    assert cell["status"] == status and reason in cell["reason"] and cell["scores"] is None
    text = (tmp_path / "glue.md").read_text()
    assert f"- rte, seed 0: {status}." in text and "**not of all**" in text and f"0 of 1 ({status})" in text
    assert "| wnli | 1 of 1 |" in capsys.readouterr().out


def test_figures_of_a_run_are_not_those_of_a_later_job_that_was_refused(tmp_path):
    """The same folder with other options: its exit code is newer than the report. Asked again it is complete at once."""
    folders = {task: run(tmp_path, task, 0, 0.5) for task in ("rte", "wnli", "cola")}
    for task, code in (("rte", "2"), ("wnli", "0"), ("cola", "2")):
        (folders[task] / "exit_code").write_text(f"{code}\n")
        (folders[task] / "log.txt").write_text("error: learning_rate=3: the run began with 1\n")
        when = 1 if task == "cola" else 2e9  # a run by hand since then
        os.utime(folders[task] / "exit_code", (when, when))
    cells = {c["task"]: c for c in gather(tmp_path, list(folders), [0])["cells"]}
    assert [cells[task]["status"] for task in folders] == ["failed", "complete", "complete"]
    assert "began with 1" in cells["rte"]["reason"]


def test_never_started_and_unreadable(tmp_path):
    (run(tmp_path, "rte", 0, 0.5) / "report.json").write_text('{"status": "comp')
    (run(tmp_path, "wnli", 0, 0.5) / "report.json").write_text('["complete"]')
    cells = {c["task"]: c for c in gather(tmp_path, ["rte", "wnli", "cola"], [0])["cells"]}
    assert "cannot be read" in cells["rte"]["reason"] and "cannot be read" in cells["wnli"]["reason"]
    assert cells["cola"]["status"] == "missing" and "never started" in cells["cola"]["reason"]


def test_mistakes(tmp_path, capsys):
    assert main([str(tmp_path), "--tasks", "rte", "bogus"]) == 2 and "bogus" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2 and "no such folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
