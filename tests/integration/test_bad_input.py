"""A user's mistakes through the real main: exit code 2 on every rank, one message on rank 0, nothing written."""

import json

import pytest
from transformers import AutoConfig

from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.distributed.test_laws import arguments
from tests.tiny import tiny_config, tiny_data, tiny_folder

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    tiny_folder(folder / "bert", "bert")
    tiny_data(folder / "data", n_train=20, n_dev=10)
    AutoConfig.for_model("t5").save_pretrained(folder / "t5")
    (folder / "t5" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (folder / "empty").mkdir()
    pickled = folder / "pickled"
    tiny_config("bert").save_pretrained(pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\\x80\\x02.")
    damaged = tiny_folder(folder / "damaged", "bert")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:1000])
    partial = tiny_folder(folder / "partial", "bert", num_hidden_layers=2)
    config = json.loads((partial / "config.json").read_text()) | {"num_hidden_layers": 3}
    (partial / "config.json").write_text(json.dumps(config))
    for name, text in {
        "no_label.csv": "sentence1,text\na,b\n",
        "header.csv": "sentence1,label\n",
        "empty.csv": "",
        "one_class.csv": "sentence1,label\na,x\nb,x\n",
        "unseen.csv": "sentence1,label\na,good\nb,never\n",
        "tiny.csv": "sentence1,label\na,good\n",
    }.items():
        (folder / name).write_text(text)
    return folder


CASES = {
    "unsupported family": ({"model_name_or_path": "t5"}, ["model_name_or_path", "bert, deberta-v2", "families.py"]),
    "no config": ({"model_name_or_path": "empty"}, ["model_name_or_path", "config.json"]),
    "pickled weights": ({"model_name_or_path": "pickled"}, ["pytorch_model.bin", "safetensors"]),
    "truncated weights": ({"model_name_or_path": "damaged"}, ["model_name_or_path", "cannot be loaded"]),
    "blocks missing": ({"model_name_or_path": "partial"}, ["model_name_or_path", "missing"]),
    "no such model": ({"model_name_or_path": "nowhere/"}, ["model_name_or_path"]),
    "column missing": ({"train_file": "no_label.csv"}, ["label"]),
    "header only": ({"train_file": "header.csv"}, ["train_file"]),
    "empty file": ({"train_file": "empty.csv"}, ["train_file"]),
    "one class": ({"train_file": "one_class.csv", "validation_file": "one_class.csv"}, ["train_file"]),
    "label never seen": ({"validation_file": "unseen.csv"}, ["never"]),
    "sparsity out of reach": ({"target_sparsity": 0.999}, ["target_sparsity", "at most 0.9"]),
    "no such projection": ({"target_modules": "qury"}, ["target_modules", "query"]),
    "several at once": ({"r": 0, "seed": -1, "budget": "flops"}, ["r=0", "seed=-1", "budget='flops'"]),
}
PATHS = ("model_name_or_path", "train_file", "validation_file")


@pytest.mark.parametrize("case", CASES)
def test_one_rank(base, tmp_path, case):
    options, words = CASES[case]
    options = {k: base / v if k in PATHS else v for k, v in options.items()}
    ((code, said),) = run_ranks(runs.whole_run_said, 1, arguments(base, tmp_path / "out", **options))
    assert code == 2, said
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"ds.json"}, "nothing may be half-written"


@pytest.mark.parametrize("case", ["unsupported family", "column missing", "several at once"])
def test_two_ranks(base, tmp_path, case):
    options, words = CASES[case]
    options = {k: base / v if k in PATHS else v for k, v in options.items()}
    first, second = run_ranks(runs.whole_run_said, 2, arguments(base, tmp_path / "out", **options))
    assert first[0] == second[0] == 2
    assert all(word in first[1] for word in words) and "error" not in second[1]


def test_more_ranks_than_examples(base, tmp_path):
    argv = arguments(base, tmp_path / "out", max_train_samples=1)
    found = run_ranks(runs.whole_run_said, 2, argv)
    assert [code for code, _ in found] == [2, 2] and "ranks" in found[0][1]
