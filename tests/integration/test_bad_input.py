"""A user's mistakes in two processes that were launched: exit code 2 of both, said by rank 0 alone, nothing written.
tests/unit/test_bad_input.py has all of them in one."""

import json

import pytest

from tests.distributed.test_laws import arguments
from tests.integration.processes import free_port, place, run
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
    "in several files at once": (
        {"ds_config": "odd_batch.json", "train_file": "no_label.csv", "model_name_or_path": "no_label.csv"},
        ["train_batch_size=7", "columns missing: label", "model_name_or_path="],
    ),
    "several at once": ({"r": 0, "seed": -1, "budget": "flops"}, ["r=0", "seed=-1", "budget='flops'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(base, tmp_path, case):
    options, words = CASES[case]
    options = {k: base / v if k in PATHS else v for k, v in options.items()}
    argv = arguments(base, tmp_path / "out", **options)
    port = free_port()
    first, second = run(["launcher/train.py", *argv], place(0, MASTER_PORT=port), place(1, MASTER_PORT=port))
    assert first.code == second.code == 2, first.text
    assert len(first.errors) == 1 and not second.errors, first.text + second.text  # several have one heading
    said = first.text[first.text.index(first.errors[0]) :]
    assert all(word in said and word not in second.text for word in words), first.text + second.text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"ds.json"}, "nothing may be half-written"
