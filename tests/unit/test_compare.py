"""Many runs in one table: seeds, failures, fronts."""

import csv
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunadapt_ds.commands import compare
from prunadapt_ds.errors import UserError
from tests.conftest import ROOT
from tests.unit.test_report import filled

pytestmark = pytest.mark.fast


def run(folder, *, seed=0, target=0.5, score=0.8, status="complete", kept=400, task="mrpc", options=()):
    r = filled() | {"seed": seed, "status": status, "criterion": "fisher", "task": task}
    r["sparsity"]["target"], r["metric"]["exported"]["score"], r["params"]["encoder_kept"] = target, score, kept
    r["time"]["train_s"] = 10.0
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(r))
    stated = {"seed": seed, "target_sparsity": target, "r": 8, "learning_rate": None, "budget": "params"}
    (folder / "run.json").write_text(json.dumps(stated | dict(options)))
    return folder


def sweep(base):
    run(base / "s0", seed=0, score=0.8)
    run(base / "s1", seed=1, score=0.9)
    run(base / "s2", seed=2, score=0.1, status="failed")
    run(base / "half", target=0.8, score=0.7, kept=200)
    (base / "broken").mkdir()
    (base / "broken" / "report.json").write_text("{")
    (base / "began").mkdir()
    (base / "began" / "metrics.jsonl").write_text("")
    return base


def compared(*folders):
    """Rows of the table, each as {column: cell}."""
    rows = compare.table(compare.lines(compare.find(list(map(str, folders)))))
    return [dict(zip(compare.HEADER, row, strict=True)) for row in rows]


def test_seeds_become_means_and_failures_are_shown(tmp_path):
    rows = {row["task"] if row["status"] == "1 missing" else row["target"]: row for row in compared(sweep(tmp_path))}
    assert set(rows) == {"0.5", "0.8", str(tmp_path / "broken"), str(tmp_path / "began")}
    half = rows["0.5"]
    assert (half["seeds"], half["status"], half["options"]) == ("2", "2 complete, 1 failed", "-")
    assert (half["score"], half["parameters"]) == ("85.00 ± 7.07", "0.40 ± 0.00")
    more = rows["0.8"]
    assert (more["seeds"], more["status"], more["score"], more["parameters"]) == ("1", "complete", "70.00", "0.20")
    assert set([*rows[str(tmp_path / "broken")].values()][-5:]) == {"-"}


@pytest.mark.parametrize(
    "name, values, told",
    [
        ("learning_rate", (1e-3, 2e-3), ("learning_rate=0.001", "learning_rate=0.002")),
        ("learning_rate", (None, 2e-3), ("learning_rate=default", "learning_rate=0.002")),
        ("r", (4, 8), ("r=4", "r=8")),
        ("budget", ("params", "macs"), ("budget=params", "budget=macs")),
        (
            "target_modules",
            (["query"], ["query", "value"]),
            ('target_modules=["query"]', 'target_modules=["query", "value"]'),
        ),
    ],
)
def test_what_differs_in_an_option_is_no_seed_of_the_other(tmp_path, name, values, told):
    """Two settings with two seeds each are two rows that name the option, and nothing else."""
    for value in values:
        for seed in (0, 1):
            run(tmp_path / f"{value}-{seed}", seed=seed, options={name: value})
    rows = compared(tmp_path)
    assert [row["seeds"] for row in rows] == ["2", "2"]
    assert {row["options"] for row in rows} == set(told)


def test_what_changes_no_figure_makes_no_other_setting(tmp_path):
    run(tmp_path / "a", options={"export_formats": ["compact"], "save_scores": True})
    run(tmp_path / "b", seed=1, options={"export_formats": ["compact", "padded"], "save_scores": False})
    (row,) = compared(tmp_path)
    assert row["seeds"] == "2" and row["options"] == "-"


def test_other_ranks_and_devices_are_other_settings(tmp_path):
    run(tmp_path / "a")
    other = run(tmp_path / "b", seed=1) / "report.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"world_size": 2, "device": "cpu"}))
    assert {row["options"] for row in compared(tmp_path)} == {
        "device=default world_size=default", "device=cpu world_size=2",
    }  # fmt: skip


def test_runs_of_unknown_options_stand_alone(tmp_path):
    """Nothing says that they are seeds of one setting."""
    for seed in (0, 1):
        (run(tmp_path / str(seed), seed=seed) / "run.json").unlink()
    run(tmp_path / "2", seed=2)
    (tmp_path / "2" / "run.json").write_text("[")
    rows = compared(tmp_path)
    assert [row["options"] for row in rows] == [f"unknown: no run.json in {tmp_path / name}" for name in "012"]


@pytest.mark.parametrize("subset, settings", [(None, 2), (100, 1)])
def test_runs_on_other_data_under_the_same_name_are_another_setting(tmp_path, subset, settings):
    """Unless the seed has picked the rows."""
    for seed, data in ((0, "1f"), (1, "2e")):
        options = {"identity": {"backbone": "ab" * 32, "data": data * 32}, "max_train_samples": subset}
        run(tmp_path / str(seed), seed=seed, options=options)
    rows = compared(tmp_path)
    assert len(rows) == settings
    assert subset or {row["options"] for row in rows} == {"data (sha256)=1f1f1f1f", "data (sha256)=2e2e2e2e"}
    (tmp_path / "0" / "run.json").write_text('{"identity": {"data": 1}}')
    assert "unknown: no run.json" in str(compared(tmp_path))


def test_a_run_named_twice_counts_once(tmp_path, monkeypatch):
    run(tmp_path / "out" / "a", score=0.8)
    run(tmp_path / "out" / "b", score=0.9, seed=1)
    (tmp_path / "link").symlink_to(tmp_path / "out" / "a")
    monkeypatch.chdir(tmp_path)
    (row,) = compared("out", "out/a", "./out/../out/b", tmp_path / "out" / "b", "link")
    assert row["seeds"] == "2" and row["score"] == "85.00 ± 7.07"


def test_a_seed_that_ran_twice_is_one_seed(tmp_path):
    for name in "ab":
        run(tmp_path / name)
    (row,) = compared(tmp_path)
    assert row["seeds"] == "1 (2 runs)"


def test_missing_runs_of_one_name_are_rows_of_their_own(tmp_path):
    folders = [tmp_path / "glue" / task / "seed0" for task in ("rte", "mrpc")]
    for folder in folders:
        folder.mkdir(parents=True)
    rows = compared(*folders, run(tmp_path / "glue" / "cola"))[:2]
    assert [(row["task"], row["status"]) for row in rows] == [(str(folder), "1 missing") for folder in folders]
    (folders[0] / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"rte/seed0': holds no run with a readable.*\n.*mrpc/seed0': holds no run"):
        compared(*folders)


def test_runs_inside_the_folder_of_a_run_are_found(tmp_path):
    """As `outputs` and `outputs/two_ranks` of the README."""
    run(tmp_path / "outputs")
    run(tmp_path / "outputs" / "other", seed=1)
    (row,) = compared(tmp_path / "outputs")
    assert row["seeds"] == "2"


def test_only_a_run_s_own_exports_are_no_runs(tmp_path):
    """Wherever the runs lie."""
    base = tmp_path / "exports" / "sweep"
    run(base / "a")
    run(base / "a" / "exports" / "compact")
    run(base / "b", seed=1)
    (row,) = compared(base)
    assert row["seeds"] == "2"


def test_everything_is_written(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "launcher/compare.py", str(sweep(tmp_path / "sweep")), "--output_dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (out / "compare.md").read_text()
    page = (out / "compare.html").read_text()
    assert page.count("<img alt=") == 3 and "1 failed" in page and "on the front" in page
    assert "no picture" not in page


def test_every_cell_of_the_csv_is_one_number(tmp_path):
    rows = list(csv.DictReader(compare.csv_text(compare.lines(compare.find([str(sweep(tmp_path))]))).splitlines()))
    assert len(rows) == 4 and "±" not in "".join(cell for row in rows for cell in row.values())
    found = {row["target"]: row for row in rows}
    half, more, missing = found["0.5"], found["0.8"], found["-"]
    assert (float(half["score_mean"]), float(half["score_std"]), half["score_n"]) == (85, pytest.approx(7.07107), "2")
    assert (more["score_mean"], more["score_std"], more["score_n"]) == ("70", "", "1")
    assert (missing["train_s_mean"], missing["train_s_std"], missing["train_s_n"]) == ("", "", "0")


def test_points_are_called_by_what_tells_them_apart(tmp_path):
    found = compare.lines(compare.find([str(sweep(tmp_path / "a"))]))
    words = compare.trade_off(compare.points_of(found, "parameters", "mrpc"), "parameters / dense").alt
    assert words.removesuffix(".").split("; ") == [
        "0.8: parameters / dense 0.2, score 70.00, on the front",
        "0.5: parameters / dense 0.4, score 85.00, on the front",
    ]
    for rate in (1e-3, 2e-3):
        run(tmp_path / "b" / str(rate), options={"learning_rate": rate})
    assert compare.titles(compare.lines(compare.find([str(tmp_path / "b")]))) == [
        "learning_rate=0.001", "learning_rate=0.002",
    ]  # fmt: skip
    for fold in (0, 1):
        run(tmp_path / "c" / str(fold), options={"train_file": f"data/fold{fold}/train.csv"})
    assert compare.titles(compare.lines(compare.find([str(tmp_path / "c")]))) == [
        "train_file=data/fold0/train.csv", "train_file=data/fold1/train.csv",
    ]  # fmt: skip


def test_own_data_that_differ_have_pictures_of_their_own(tmp_path):
    """And a regression's label scale follows from the seed's subset: it is no option."""
    for file in ("a.csv", "b.csv"):
        for target in (0.4, 0.6):
            for seed in (0, 1):
                options = {"validation_file": file, "label_scale": [seed, 1.0], "max_train_samples": 8}
                folder = tmp_path / file / f"{target}-{seed}"
                run(folder, task="own_regression", target=target, seed=seed, kept=1000 * (1 - target), options=options)
    found = compare.lines(compare.find([str(tmp_path)]))
    assert len(found) == 4 and all(len(line.runs) == 2 for line in found)
    drawn, _ = compare.trade_offs(found)
    titles = [picture.title for picture in drawn]
    assert {title.partition(":")[0] for title in titles} == {"own_regression on a.csv", "own_regression on b.csv"}


def test_every_task_has_its_pictures_or_the_reason_why_not(tmp_path):
    for task in ("mrpc", "rte"):
        for target in (0.4, 0.6):
            run(tmp_path / task / str(target), task=task, target=target, kept=1000 * (1 - target))
    run(tmp_path / "wnli", task="wnli")
    drawn, missing = compare.trade_offs(compare.lines(compare.find([str(tmp_path)])))
    assert [picture.title.partition(":")[0] for picture in drawn] == ["mrpc"] * 3 + ["rte"] * 3
    assert all("wnli" not in picture.alt for picture in drawn)
    (said,) = missing
    assert said.startswith("wnli: no picture") and "latency / dense (1)" in said and "two settings" in said
    page = compare.page(found := compare.lines(compare.find([str(tmp_path)])), compare.table(found))
    assert said in page and page.count("<img alt=") == 6


def test_a_folder_that_is_not_there_is_said(tmp_path, capsys):
    assert compare.main([str(tmp_path / "no"), str(tmp_path / "nor")]) == 2
    assert capsys.readouterr().err.count("there is no such folder") == 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    front = compare.pareto(points)
    assert any(front)
    for point, on in zip(points, front, strict=True):
        better = [p for p in points if p[0] <= point[0] and p[1] >= point[1] and p != point]
        assert on == (not better)
