"""What a run says of itself: its command, its header, and the lines to paste when it is done."""

import shlex

import pytest

from prunadapt_ds import outline
from prunadapt_ds.config import parse
from tests.unit import commands

pytestmark = pytest.mark.fast
LAUNCHED = [
    (1, None, 1, ["python", "-m"]),
    (1, "python", 1, ["python", "-m"]),
    (2, None, 1, ["deepspeed", "--num_accelerators", "2", "--module"]),
    (1, "deepspeed", 1, ["deepspeed", "--num_accelerators", "1", "--module"]),
    (8, "deepspeed", 2, ["deepspeed", "--num_nodes", "2", "--num_accelerators", "4", "--module"]),
    (2, "torchrun", 1, ["torchrun", "--nproc-per-node", "2", "-m"]),
    (
        8,
        "torchrun",
        2,
        ["torchrun", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "FIRST_NODE:29500"]
        + ["--nproc-per-node", "4", "-m"],
    ),
    (8, "mpirun", 2, ["mpirun", "-n", "8", "python", "-m"]),
    (8, "srun", 2, ["srun", "--nodes", "2", "--ntasks", "8", "python", "-m"]),
]


@pytest.mark.parametrize("world_size, launcher, nodes, before", LAUNCHED)
def test_the_command_makes_the_same_run_again(world_size, launcher, nodes, before):
    argv = ["--task_name", "sst2", "--model_name_or_path", "a b", "--save_scores", "--target_modules", "query", "value"]
    words = shlex.split(outline.command(parse(argv), world_size, launcher, nodes))
    assert words[: len(before)] == before
    assert words[len(before) : len(before) + 2] == ["prunadapt_ds", "train"]
    assert parse(words[len(before) + 2 :]) == parse(argv)
    commands.check(words)


# ------------------------------------------------------------------------------------------------------- header


def header(argv, step=0, **more):
    phases = outline.phases(step, 3, 6, 9)
    return outline.header(parse(argv), phases, {"adapters": 30, "head": 20}, 200, outline.sharding(3, 4), **more)


def test_the_header_names_phases_trainables_sharding_and_what_nobody_chose():
    text = header(["--r", "4", "--max_steps", "9"], learning_rate=0.00234)
    assert "dense 0 to 3, prune 3 to 6, recover 6 to 9\n" in text and "adapters 30, head 20; 25.0% of 200" in text
    assert "1/4 of the parameters" in text and "whole" not in text
    assert "defaults:  method=prunadapt, target_sparsity=0.5, criterion=fisher, learning_rate=0.0023, seed=0" in text
    assert "learning_rate" not in header([]), "which the ds_config has said"


@pytest.mark.parametrize(
    "argv, shown",
    [
        (["--method", "lora"], "r=8, num_train_epochs=3.0, seed=0"),
        (["--method", "tmp"], "num_train_epochs=3.0, seed=0"),
        (["--method", "full", "--max_steps", "9"], "seed=0"),
        (["--adapter_name_or_path", "a", "--method", "lora"], "num_train_epochs=3.0, seed=0"),
        (["--target_speedup", "2"], "method=prunadapt, criterion=fisher, r=8, num_train_epochs=3.0, seed=0"),
    ],
)
def test_the_header_shows_no_option_without_a_meaning(argv, shown):
    assert header(argv).endswith(f"defaults:  {shown}")


@pytest.mark.parametrize(
    "step, left",
    [
        (0, [("dense", 0, 3), ("prune", 3, 6), ("recover", 6, 9)]),
        (4, [("prune", 4, 6), ("recover", 6, 9)]),
        (7, [("recover", 7, 9)]),
        (9, []),
    ],
)
def test_a_run_that_goes_on_names_the_phases_that_are_left(step, left):
    assert outline.phases(step, 3, 6, 9) == left


def test_what_rests_elsewhere():
    assert "the rest whole" in outline.sharding(2, 4) and "everything whole" in outline.sharding(0, 2)
    zero = {"offload_param": {"device": "nvme"}, "offload_optimizer": {"device": "cpu"}}
    assert outline.sharding(3, 2, zero).endswith("; parameters in NVMe; optimizer states in the host's memory")
    assert ";" not in outline.sharding(3, 2, {"offload_optimizer": {"device": "none"}, "offload_param": None})


# ------------------------------------------------------------------------------------------------------- footer

LANGUAGE = ["--task_type", "causal_lm", "--train_file", "a.txt", "--validation_file", "b.txt"]
FOOTERS = {
    "glue": (["--task_name", "mrpc", "--max_eval_samples", "9"], "mrpc", True),
    "tables": (["--task_name", "sst2", "--data_dir", "."], "sst2", False),
    "own": (
        ["--train_file", "a b.csv", "--validation_file", "v.csv", "--output_dir", "out dir", "--max_seq_length", "32"],
        "own_classification",
        False,
    ),
    "language": ([*LANGUAGE, "--output_dir", "an 'odd' one", "--max_seq_length", "64"], "causal_lm", False),
    "sample": ([], "sample", True),
}


def footer(name, **more):
    argv, task, is_pair = FOOTERS[name]
    return outline.footer(parse(argv), task, is_pair=is_pair, **more)


@pytest.mark.parametrize("name", FOOTERS)
def test_every_line_of_the_footer_can_be_pasted(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head, *lines = footer(name).splitlines()
    assert head == "Next:" and [line[:12].strip() for line in lines] == [
        *("read it", "watch it", "score it", "use it", "share it")
    ]
    for line in lines:
        found = commands.lines(line[12:])
        assert found
        for words in found:
            commands.check(words)


def test_the_footer_scores_as_the_run_did():
    assert "--train_file 'a b.csv' --validation_file v.csv --max_seq_length 32" in footer("own")
    assert "--task_name mrpc --max_eval_samples 9" in footer("glue") and "--task_name sample" in footer("sample")
    text = footer("language")
    assert "--task_type causal_lm --train_file a.txt --validation_file b.txt --max_seq_length 64" in text


def test_the_footer_knows_where_things_are_and_blocks_nobody():
    text = footer("own")
    assert "/out%20dir/report.html" in text and "open " not in text and "--logdir 'out dir'" in text
    assert "echo 'a sentence' | " in text and "--input_file - --max_seq_length 32" in text
    assert "--logdir events/a " in footer("own", board_dir="events/a")
    assert "sentence2" in footer("glue") and "predict" not in footer("language")


def test_a_line_that_hf_does_not_take_is_refused():
    with pytest.raises(commands.Refused, match="no-such-option"):
        commands.check(["hf", "upload", "name", "folder", "--no-such-option"])
