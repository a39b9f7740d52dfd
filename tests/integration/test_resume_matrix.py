"""Law 5 at 32 random moments, under every ZeRO stage and method, and on more numbers of ranks."""

import random
import time

import pytest

from tests.distributed.harness import Ranks
from tests.integration import test_resume
from tests.integration.test_resume import argv, complete, continue_on, run

base, uninterrupted = test_resume.base, test_resume.uninterrupted  # fixtures
pytestmark = pytest.mark.full


@pytest.mark.parametrize("before, after", [(1, 2), (2, 4), (4, 2)])
def test_other_numbers_of_ranks(base, tmp_path, uninterrupted, before, after):
    output = tmp_path / "out"
    run(argv(base, output, batch=8 // before), before, fault="SIGKILL@decide-6@all")
    continue_on(base, output, after, uninterrupted)


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
    if "method" in options:
        options = {**options, "target_sparsity": None, "shrink": "auto"}
    whole = complete(argv(base, tmp_path / "whole", **options))[0]
    arguments = argv(base, tmp_path / "out", **options)
    run(arguments, fault="SIGKILL@step-9@all")
    assert complete(arguments)[0] == whole
