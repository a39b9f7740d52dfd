"""Law 5 at 32 random moments, under every ZeRO stage and method, and on more numbers of ranks."""

import json
import random
import time

import pytest

from prunadapt_ds import report as reports
from tests.distributed.harness import Ranks
from tests.integration import test_resume
from tests.integration.test_resume import argv, complete, continue_on, run

base, uninterrupted = test_resume.base, test_resume.uninterrupted  # fixtures
pytestmark = pytest.mark.full


@pytest.mark.parametrize("before, after", [(1, 2), (2, 4), (4, 2)])
def test_other_numbers_of_ranks(base, tmp_path, before, after):
    continue_on(base, tmp_path, before, after)


@pytest.mark.parametrize("seed", range(32))
def test_killed_at_a_random_moment(base, tmp_path, uninterrupted, seed):
    """One rank or all, at any time after the first checkpoint; some runs are killed more than once."""
    draw = random.Random(seed)
    output = tmp_path / "out"
    arguments = argv(base, output)
    for _ in range(draw.choice([1, 1, 2])):
        ranks = Ranks(arguments, 2)
        ranks.wait_for(lambda: list(output.glob("checkpoints/step-*")), timeout=400)
        time.sleep(draw.uniform(0, 12))
        for process in draw.choice([ranks.processes, ranks.processes[:1], ranks.processes[1:]]):
            process.kill()
        ranks.wait(100)
    assert complete(arguments)[0] == uninterrupted[1]


@pytest.mark.parametrize(
    "options",
    [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"method": "tmp"}, {"method": "lora"}, {"method": "full"}],
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_every_stage_and_method(base, tmp_path, options):
    whole = complete(argv(base, tmp_path / "whole", **options))[0]
    arguments = argv(base, tmp_path / "out", **options)
    run(arguments, fault="SIGKILL@step-9@all")
    assert complete(arguments)[0] == whole


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "tmp"}, {"method": "lora"}, {"method": "full"}, {"uniform": True, "target_sparsity": 0.3}],
    ids=lambda options: "-".join(options) or "prunadapt",
)
def test_every_method_is_exported_on_as_many_ranks(base, tmp_path, options):
    """Killed after it has shrunk; every format that it can have is made, and the run still goes on."""
    kinds = ["compact", "padded", "onnx", "torch_export", *(["uniform"] if options.get("uniform") else [])]
    arguments = argv(base, tmp_path / "out", **options)
    assert {rank.code for rank in run(arguments, fault="SIGKILL@step-9@all")} == {-9}
    for rank in run(["--run_dir", str(tmp_path / "out"), "--export_formats", *kinds]):
        assert rank.code == 0, rank.text[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reports.validate(report)
    assert set(report["exports"]) == set(kinds) and report["status"] == "interrupted" and report["time"]["steps"] == 8
    complete(arguments)
    assert not (tmp_path / "out" / "exports" / "onnx").exists(), "it was of other weights"
