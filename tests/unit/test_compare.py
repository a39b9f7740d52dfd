"""Many runs in one table: seeds, failures, fronts."""

import csv
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunadapt_ds import compare, report
from tests.conftest import ROOT
from tests.unit.test_report import filled

pytestmark = pytest.mark.fast


def run(folder, *, seed=0, target=0.5, score=0.8, status="complete", kept=400):
    r = filled() | {"seed": seed, "status": status, "criterion": "fisher"}
    r["sparsity"]["target"], r["metric"]["exported"]["score"], r["params"]["encoder_kept"] = target, score, kept
    r["time"]["train_s"] = 10.0
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(r))
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


def test_seeds_become_means_and_failures_are_shown(tmp_path):
    rows = {
        row[0] if row[6] == "1 missing" else row[4]: row
        for row in compare.table(compare.lines(compare.find([str(sweep(tmp_path))])))
    }
    assert set(rows) == {"0.5", "0.8", "broken", "began"}
    assert rows["0.5"][5:9] == ("2", "2 complete, 1 failed", "85.00 ± 7.07", "0.40 ± 0.00")
    assert rows["0.8"][5:9] == ("1", "complete", "70.00", "0.20")
    assert rows["broken"][7:] == ("-",) * 5


def test_everything_is_written(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "launcher/compare.py", str(sweep(tmp_path / "sweep")), "--output_dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (out / "compare.md").read_text()
    rows = list(csv.reader((out / "compare.csv").open()))
    assert tuple(rows[0]) == compare.HEADER and len(rows) == 5
    page = (out / "compare.html").read_text()
    assert page.count("<img alt=") == 3 and "1 failed" in page and "on the front" in page


def test_points_are_called_by_what_tells_them_apart(tmp_path):
    base = sweep(tmp_path)
    found = compare.lines(compare.find([str(base)]))
    words = compare.trade_off(found, "parameters", "parameters / dense").alt
    assert words.removesuffix(".").split("; ") == [
        "0.8: parameters / dense 0.2, score 70.00, on the front",
        "0.5: parameters / dense 0.4, score 85.00, on the front",
    ]
    assert report.short_model("/data/models/bert/") == "bert" and report.short_model("org/bert") == "org/bert"


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
