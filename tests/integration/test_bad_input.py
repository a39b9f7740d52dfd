"""A user's mistakes on two real ranks: exit code 2 on both, said by rank 0 alone, nothing written. tests/unit/test_bad_input.py
has all of them on one."""

import json

import pytest

from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.distributed.test_laws import arguments
from tests.tiny import tiny_data, tiny_folder

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    tiny_folder(folder / "bert", "bert")
    tiny_data(folder / "data", n_train=20, n_dev=10)
    damaged = tiny_folder(folder / "damaged", "bert")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-1])
    partial = tiny_folder(folder / "partial", "bert", num_hidden_layers=2)
    config = json.loads((partial / "config.json").read_text()) | {"num_hidden_layers": 3}
    (partial / "config.json").write_text(json.dumps(config))
    (folder / "no_label.csv").write_text("sentence1,text\na,b\n")
    (folder / "odd_batch.json").write_text('{"train_batch_size": 7, "zero_optimization": {"stage": 3}}')
    return folder


PATHS = ("model_name_or_path", "train_file", "ds_config")
CASES = {
    "truncated weights": ({"model_name_or_path": "damaged"}, ["model_name_or_path=", "damaged or cut short"]),
    "blocks missing": ({"model_name_or_path": "partial"}, ["model_name_or_path=", "missing"]),
    "column missing": ({"train_file": "no_label.csv"}, ["train_file=", "columns missing: label"]),
    "batch that does not divide": ({"ds_config": "odd_batch.json"}, ["train_batch_size=7", "4 x 1 x 2 = 8"]),
    "more ranks than examples": ({"max_train_samples": 1}, ["training examples=1", "fewer than the 2 ranks"]),
    "several at once": ({"r": 0, "seed": -1, "budget": "flops"}, ["r=0", "seed=-1", "budget='flops'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(base, tmp_path, case):
    options, words = CASES[case]
    options = {k: base / v if k in PATHS else v for k, v in options.items()}
    argv = arguments(base, tmp_path / "out", **options)
    first, second = run_ranks(runs.whole_run_said, 2, argv)
    assert first[0] == second[0] == 2, first[1]
    assert all(word in first[1] for word in words), first[1]
    assert "Traceback" not in first[1] and "error" not in second[1]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"ds.json"}, "nothing may be half-written"
