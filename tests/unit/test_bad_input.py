"""A user's mistakes through the real main, in this process: one line for each on standard error, exit code 2, nothing written.

Nothing is launched: one rank is enough for what every rank finds alike. tests/integration/test_bad_input.py has real ranks.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest

from prunadapt_ds import export, gates
from prunadapt_ds import report as reports
from prunadapt_ds.commands import compare, evaluate, glue_table, reexport
from prunadapt_ds.config import OPTIONS
from prunadapt_ds.errors import ParityError
from prunadapt_ds.files import OwnedFolder
from prunadapt_ds.options import MOST
from prunadapt_ds.train import main
from tests.tiny import tiny_data, tiny_folder, tiny_glue, tiny_language_folder, tiny_model, tiny_tokenizer
from tests.unit.test_report import filled
from tests.unit.test_resize import adapted, plan_of

pytestmark = pytest.mark.fast
DS_CONFIG = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": False}}
REMOTE = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForSequenceClassification": "modeling_odd.Odd"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What is right: two models, a task as csv, a GLUE folder, a DeepSpeed file."""
    folder = tmp_path_factory.mktemp("right")
    tiny_folder(folder / "bert", "bert")
    tiny_language_folder(folder / "llama", "llama")
    tiny_data(folder / "data", n_train=20, n_dev=10)
    tiny_glue(folder / "glue", n_train=6, n_dev=4)
    (folder / "text.txt").write_text("we was near a house and the road")
    (folder / "ds.json").write_text(json.dumps(DS_CONFIG))
    return folder


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """A folder to make mistakes in, which is the working directory; variables of the launch do not outlive the test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.mark.parametrize("rank, local_rank, speaks", [(0, 0, True), (1, 1, False), (2, 0, True)])
def test_a_file_that_one_host_holds_in_another_way_is_said_there(place, monkeypatch, rank, local_rank, speaks):
    """Before the ranks have found each other, no other host can say it."""
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main(["--config", "missing.yaml"]) == 2
    assert ("missing.yaml" in said.getvalue()) is speaks


def tree(folder):
    """Every path below, with what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def right(base, **options):
    """The command line of a run that would work, with these options changed; None leaves one out."""
    given = {
        "ds_config": base / "ds.json",
        "model_name_or_path": base / "bert",
        "train_file": base / "data" / "train.csv",
        "validation_file": base / "data" / "validation.csv",
        "output_dir": "out",
        "max_seq_length": 32,
        "max_steps": 1,
        **options,
    }
    words = []
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}={value}"]
    return words


def said_by(program, argv):
    """Exit code and standard error of a program of the package."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = program(argv)
    return code, said.getvalue()


def refused(place, argv, *expected, program=main):
    """Every `(field, words of the remedy ...)` is said in a line of its own; the folder is left as it was. Returns the lines."""
    before = tree(place)
    code, said = said_by(program, argv)
    assert code == 2, said
    first, *others = lines = [line for line in said.splitlines() if line and "/s]" not in line]  # bars of libraries
    assert "Traceback" not in said
    found = [first.removeprefix("error: ")] if len(lines) == 1 else others
    assert first.startswith("error: ") if len(lines) == 1 else first == "errors:"
    for field, *words in expected:
        of_field = [line for line in found if line.startswith(f"{field}=")]
        assert of_field, said
        assert any(all(word in line for word in words) for line in of_field), said
    assert tree(place) == before, "something was written"
    return found


# ---------------------------------------------------------------------------------------------------- the options


def out_of_range():
    """Every number just outside every limit it has, and what is no number."""
    for o in OPTIONS.values():
        if o.kind not in (int, float) or o.is_list:
            continue
        step = 1 if o.kind is int else 1e-3
        for limit, value in (
            ("least", lambda b, s=step: b - s),
            ("above", lambda b: b),
            ("most", lambda b, s=step: b + s),
            ("below", lambda b: b),
        ):
            if o.limits[limit] is not None:
                yield o.name, o.kind(value(o.limits[limit]))
        yield o.name, "abc"
        yield from ((o.name, v) for v in (("nan", "inf", "-inf") if o.kind is float else ("1.5", MOST + 1, "9" * 30)))


@pytest.mark.parametrize("name, value", list(out_of_range()))
def test_every_number_has_its_range(base, place, name, value):
    (line, *_) = refused(place, right(base, **{name: value}), (name, "must be"))
    assert not line.endswith(", ")


@pytest.mark.parametrize("name", [o.name for o in OPTIONS.values() if o.limits["choices"]])
def test_every_choice_suggests(base, place, name):
    choice = OPTIONS[name].limits["choices"][0]
    refused(place, [*right(base), f"--{name}", choice[:-1] + "_"], (name, f"did you mean {choice!r}"))


@pytest.mark.parametrize("name", [o.name for o in OPTIONS.values() if o.kind is bool])
def test_every_switch_is_true_or_false(base, place, name):
    refused(place, right(base, **{name: "perhaps"}), (name, "must be true or false"))


OPTION_CASES = {
    "unknown option": ({"learning_rat": 1}, [("learning_rat", "did you mean --learning_rate?")]),
    "option far from all": ({"qqqqq": 1}, [("qqqqq", "see --help")]),
    "empty text": ({"model_name_or_path": ""}, [("model_name_or_path", "must be a text")]),
    "output_dir is a file": ({"output_dir": "file"}, [("output_dir", "is a file; name a folder")]),
    "output_dir below a file": ({"output_dir": "file/out"}, [("output_dir", "cannot be written (Not a directory)")]),
    "output_dir too long": ({"output_dir": "x" * 300}, [("output_dir", "cannot be written (File name too long)")]),
    "data_dir too long": (
        {"data_dir": "x" * 300, "task_name": "rte", "train_file": None, "validation_file": None},
        [("data_dir", "there is no such folder")],
    ),
    "resume from nowhere": ({"resume": "nowhere"}, [("resume", "must be auto, never, or the folder of a checkpoint")]),
    "resume from no checkpoint": ({"resume": "."}, [("resume", "there is no intact checkpoint")]),
    "sparsity out of reach": ({"target_sparsity": 0.999}, [("target_sparsity", "at most 0.9")]),
    "speed out of reach": (
        {"target_speedup": 1e6, "latency_batch_size": 1, "latency_seq_length": 8},
        [("target_speedup", "by the block times measured here")],
    ),
    "timed beyond its positions": ({"latency_seq_length": 2000}, [("latency_seq_length", "at most 512 tokens")]),
    "no such projection": ({"target_modules": "qury"}, [("target_modules", "attention.self.query")]),
    "more tokens than positions": ({"max_seq_length": 2000}, [("max_seq_length", "at most 64")]),
    "no room for text": ({"max_seq_length": 4}, [("max_seq_length", "at least 5")]),
    "several at once": (
        {"r": 0, "seed": -1, "budget": "flops"},
        [("r", "at least 1"), ("seed", "at least 0"), ("budget", "known are params, macs, latency")],
    ),
}


@pytest.mark.parametrize("case", OPTION_CASES)
def test_options(base, place, case):
    (place / "file").write_text("")
    options, expected = OPTION_CASES[case]
    assert len(refused(place, right(base, **options), *expected)) == len(expected)


YAML_CASES = {
    "unknown key": ("lerning_rate: 1\n", ("lerning_rate", "did you mean --learning_rate?")),
    "a list": ("- r\n- 4\n", ("config", "must be a mapping")),
    "a text": ("just text\n", ("config", "must be a mapping")),
    "broken": ("r: [1\n", ("config", "is not yaml")),
    "no such date": ("seed: 2020-13-99\n", ("config", "is not yaml")),
    "a nest": ("[" * 1000, ("config", "is not yaml")),
    "a python object": ("seed: !!python/object/apply:os.system [true]\n", ("config", "is not yaml")),
    "twice": ("r: 4\nr: 8\n", ("config", "states r twice")),
    "latin-1": (b"output_dir: caf\xe9\n", ("config", "cannot be read")),
    "list for a number": ("r: [1, 2]\n", ("r", "must be a whole number")),
    "mapping for a number": ("learning_rate: {a: 1}\n", ("learning_rate", "must be a number")),
    "switch for a number": ("r: true\n", ("r", "must be a whole number")),
    "number for a switch": ("uniform: 3\n", ("uniform", "must be true or false")),
    "list for a text": ("method: [lora]\n", ("method", "must be a text")),
    "mapping in a list": ("target_modules: [{a: 1}]\n", ("target_modules", "must be one text or a list of texts")),
    "empty list": ("export_formats: []\n", ("export_formats", "must be one text or a list of texts")),
    "NUL": ('data_dir: "a\\0b"\n', ("data_dir", "must be a text")),
    "out of range": ("target_sparsity: 1.5\n", ("target_sparsity", "less than 1")),
    "a million brackets in one value": (
        "r: &a [x]\ntarget_modules: [*a, *a]\n",
        ("target_modules", "must be one text"),
    ),
}


@pytest.mark.parametrize("case", YAML_CASES)
def test_config_files(base, place, case):
    text, expected = YAML_CASES[case]
    (place / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(place, [*right(base), "--config", "run.yaml"], expected)


def test_a_config_file_that_is_not_there(base, place):
    refused(place, [*right(base), "--config", "nowhere.yaml"], ("config", "there is no such file"))
    refused(place, [*right(base), "--config", "."], ("config", "cannot be read"))


DS_CASES = {
    "not JSON": ("{", ("ds_config", "is not JSON")),
    "not an object": ("[1]", ("ds_config", "must be a JSON object")),
    "not text": (b"\xff\xfe", ("ds_config", "cannot be read")),
    "a nest": ("[" * 100_000, ("ds_config", "is not JSON")),
    "twice": ('{"bf16": {}, "bf16": {}}', ("ds_config", "states bf16 twice")),
    "unknown key": ({"zero_optimizaton": {"stage": 3}}, ("zero_optimizaton", "did you mean 'zero_optimization'?")),
    "unknown key far from all": ({"qqq": 1}, ("qqq", "are refused")),
    "recomputation of DeepSpeed's": (
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        ("activation_checkpointing", "pass --gradient_checkpointing"),
    ),
    "checkpoints of DeepSpeed's": (
        {"checkpoint": {"use_node_local_storage": True}},
        ("checkpoint", "--checkpoint_steps"),
    ),
    "unknown key in a block": (
        {"zero_optimization": {"stage": 3, "stag": 1}},
        ("zero_optimization.stag", "not permitted"),
    ),
    "optimizer": ({"optimizer": {"type": "Lamb"}}, ("optimizer.type", "only Adam and AdamW")),
    "option of the optimizer": (
        {"optimizer": {"type": "AdamW", "params": {"momentum": 1}}},
        ("optimizer.params.momentum", "not an option of AdamW"),
    ),
    "value of the optimizer": (
        {"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}},
        ("optimizer.params.betas", "two numbers"),
    ),
    "decay as in Adam": (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        ("optimizer.params.adam_w_mode", "as in AdamW"),
    ),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, ("scheduler", "--warmup_ratio")),
    "fp16": ({"fp16": {"enabled": True}}, ("fp16.enabled", "bf16")),
    "fp16 and bf16": ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ("fp16.enabled", "bf16")),
    "bf16 maybe": ({"bf16": {"enabled": "maybe"}}, ("bf16.enabled", 'true, false or "auto"')),
    "bf16 alone": ({"bf16": True}, ("bf16", "must be an object")),
    "stage 4": ({"zero_optimization": {"stage": 4}}, ("zero_optimization.stage", "must be 0, 1, 2 or 3")),
    "stage true": ({"zero_optimization": {"stage": True}}, ("zero_optimization.stage", "must be 0, 1, 2 or 3")),
    "zero is a number": ({"zero_optimization": 3}, ("zero_optimization", "must be an object")),
    "bucket is a text": (
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": "big"}},
        ("zero_optimization.reduce_bucket_size", "integer"),
    ),
    "offload to a disk": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
        ("zero_optimization.offload_param.device", "none, cpu or nvme"),
    ),
    "offload is a text": (
        {"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
        ("zero_optimization.offload_param", "must be an object"),
    ),
    "quantised gradients without CUDA": (
        {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
        ("zero_optimization.zero_quantized_gradients", "CUDA"),
    ),
    "weights that travel in 8 bits": (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        ("zero_optimization.zero_quantized_weights", "would not stay what they are"),
    ),
    "frozen weights in 8 bits": (
        {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
        ("zero_optimization.zero_quantized_nontrainable_weights", "would not stay what they are"),
    ),
    "a second copy of the shards": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
        ("zero_optimization.zero_hpz_partition_size", "second copy"),
    ),
    "gradients scaled before they are summed": (
        {"prescale_gradients": True},
        ("prescale_gradients", "do not apply here"),
    ),
    "gradients dealt out round robin": (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        ("zero_optimization.round_robin_gradients", "do not support; remove it"),
    ),
    "zenflow": (
        {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
        ("zero_optimization.zenflow", "do not support; remove it"),
    ),
    "an old name of offloading": (
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        ("zero_optimization.cpu_offload", 'write "offload_optimizer": {"device": "cpu"}'),
    ),
    "parameters offloaded without ZeRO-3": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        ("zero_optimization.offload_param.device", "no effect below ZeRO stage 3"),
    ),
    "an optimizer offloaded without ZeRO": (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        ("zero_optimization.offload_optimizer.device", "no effect below ZeRO stage 1"),
    ),
    "part of an optimizer offloaded": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        ("zero_optimization.offload_optimizer.ratio", "do not support; remove it"),
    ),
    "offloaded to another process": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        ("zero_optimization.offload_optimizer.super_offload", "do not support; remove it"),
    ),
    "blocks by their granularity without CUDA": (
        {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1000}},
        ("zero_optimization.stage3_module_granularity_threshold", "CUDA"),
    ),
    "micro-batch against the option": (
        {"train_micro_batch_size_per_gpu": 4},
        ("train_micro_batch_size_per_gpu", "contradicts --per_device_train_batch_size 8"),
    ),
    "clipping against the option": (
        {"gradient_clipping": 0.3},
        ("gradient_clipping", 'contradicts --max_grad_norm 0.5; write "auto" in the file'),
    ),
    "a sum in no dtype": (
        {"data_types": {"grad_accum_dtype": "banana"}},
        ("data_types.grad_accum_dtype", "must be fp32 or bf16"),
    ),
    "a sum that is not there": (
        {
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 0},
        },
        ("data_types.grad_accum_dtype", "take a stage of 1 to 3"),
    ),
    "rate against the option": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": "auto"}}},
        ("optimizer.params.lr", "contradicts --learning_rate 0.001"),
    ),
    "decay against the option": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 0.001, "weight_decay": 0.5}}},
        ("optimizer.params.weight_decay", "contradicts --weight_decay 0.1"),
    ),
    "batch that does not divide": ({"train_batch_size": 7}, ("train_batch_size", "8 x 1 x 1 = 8")),
    "batch is a text": ({"train_batch_size": "many"}, ("train_batch_size", "must be a whole number")),
    "accumulation of 0": ({"gradient_accumulation_steps": 0}, ("gradient_accumulation_steps", "at least 1")),
    "clipping is a text": ({"gradient_clipping": "hard"}, ("gradient_clipping", "must be a number")),
    "aio is a number": ({"aio": 5}, ("aio", "must be an object")),
    "auto without a meaning": ({"aio": {"block_size": "auto"}}, ("aio.block_size", "no automatic value")),
    "strange block": ({"comms_logger": {"enabled": "x"}}, ("comms_logger.enabled", "DeepSpeed does not take it")),
    "strange type": ({"communication_data_type": "z"}, ("ds_config", "DeepSpeed does not take it: Invalid")),
}


@pytest.mark.parametrize("case", DS_CASES)
def test_ds_configs(base, place, case):
    values, expected = DS_CASES[case]
    text = values if isinstance(values, (str, bytes)) else json.dumps({**DS_CONFIG, **values})
    (place / "ds.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    options = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}
    assert len(refused(place, right(base, ds_config="ds.json", **options), expected)) == 1


def test_mistakes_of_a_ds_config_are_said_together(base, place):
    """Of its own fields, of blocks, beside the options and of DeepSpeed's schema; none follows from another."""
    zero = {"stage": 3, "stag": 1, "reduce_bucket_size": "big", "offload_param": {"device": "disk"}, "zenflow": {}}
    optimizer = {"type": "AdamW", "params": {"lr": 0.1, "eps": 0}}
    blocks = {"zero_optimization": zero, "optimizer": optimizer, "aio": {"block_size": "auto"}, "bf16": 1}
    values = {"zero": 3, "gradient_accumulation_steps": 0, "train_batch_size": 7, "comms_logger": {"enabled": "x"}}
    (place / "ds.json").write_text(json.dumps({**values, **blocks}))
    said = refused(place, right(base, ds_config="ds.json", learning_rate=1e-3))
    of_zero = ("stag", "reduce_bucket_size", "offload_param.device", "zenflow")
    assert sorted(line.partition("=")[0] for line in said) == [
        "aio.block_size", "bf16", "comms_logger.enabled", "gradient_accumulation_steps", "optimizer.params.eps",
        "optimizer.params.lr", "zero", *sorted(f"zero_optimization.{name}" for name in of_zero),
    ]  # fmt: skip


def test_a_ds_config_that_is_not_there(base, place):
    refused(place, right(base, ds_config="nowhere.json"), ("ds_config", "there is no such file"))
    refused(place, right(base, ds_config="."), ("ds_config", "cannot be read"))


# ------------------------------------------------------------------------------------------------------- the data

DATA_CASES = {
    "empty.csv": (b"", "the file is empty"),
    "header.csv": (b"sentence1,label\n", "has no rows"),
    "semicolon.csv": (b"sentence1;label\na;b\n", "the delimiter looks like a semicolon"),
    "tab.csv": (b"sentence1\tlabel\na\tb\n", "the delimiter looks like a tab; name it .tsv"),
    "comma.tsv": (b"sentence1,label\na,b\n", "the delimiter looks like a comma; name it .csv"),
    "columns.csv": (b"words,label\na,b\n", "columns missing: sentence1; found 'words', 'label'"),
    "nul.csv": (b"sentence1,label\na\0,b\n", "NUL byte at byte 17"),
    "latin1.csv": (b"sentence1,label\na,b\ncaf\xe9,b\n", "line 3 is not UTF-8; convert the file"),
    "utf16.csv": ("sentence1,label\na,b\n".encode("utf-16"), "NUL byte"),
    "open.csv": (b'sentence1,label\n"a,x\nb,y\n', "unexpected end of data"),
    "stray.csv": (b'sentence1,label\n"a" b,x\n', "line 2: "),
    "ragged.csv": (b"sentence1,label\na,b\nc\n", "line 3 has 1 columns, the header has 2"),
    "twice.csv": (b"sentence1,label,label\na,b,c\n", "duplicate columns ['label']"),
    "unlabelled.csv": (b"sentence1,label\na,x\nb,\nc,y\n", "1 of 3 rows have no label, the first is row 2"),
    "one_class.csv": (b"sentence1,label\na,x\nb,x\n", "every label is 'x': one class only"),
    "constant.csv": (b"sentence1,label\na,0.5\nb,0.5\n", "every label is 0.5"),
    "infinite.csv": (b"sentence1,label\na,0.5\nb,inf\n", "row 2: label inf is not finite"),
    "broken.jsonl": (b'{"sentence1": "a", "label": 1}\n{"sent\n', "line 2 is not JSON"),
    "nest.jsonl": (b'{"sentence1": ' + b"[" * 100_000, "line 1 is not JSON"),
    "scalar.jsonl": (b"5\n", "line 1 is not an object"),
    "array.json": (b'[{"sentence1": "a", "label": 1}, 5]', "entry 2 is not an object"),
    "nest.json": (b"[" * 100_000, "it is not JSON"),
    "number.jsonl": (b'{"sentence1": 5, "label": 1}\n', "row 1: sentence1 is 5, not a text"),
    "null.jsonl": (b'{"sentence1": "a", "label": null}\n', "1 of 1 rows have no label"),
    "half_text.jsonl": (b'{"sentence1": "\\ud800", "label": 1}\n', "half a surrogate pair"),
    "half_label.jsonl": (b'{"sentence1": "a", "label": "\\ud800"}\n', "half a surrogate pair"),
    "fake.parquet": (b"not a parquet file at all", "is not a readable parquet file"),
    "cut.parquet": (b"PAR1" + b"\0" * 50 + b"PAR1", "is not a readable parquet file"),
    "data.xlsx": (b"PK", "unknown extension '.xlsx'; use one of .csv, .tsv, .jsonl, .json, .parquet"),
    "data": (b"x", "unknown extension ''"),
    "text.txt": (b"some text", "unknown extension '.txt'"),
}


@pytest.mark.parametrize("name", DATA_CASES)
def test_data_files(base, place, name):
    content, words = DATA_CASES[name]
    (place / name).write_bytes(content)
    refused(place, right(base, train_file=name), ("train_file", words))


VALIDATION_CASES = {
    "unseen": ("sentence1,sentence2,label\na,b,good\nc,d,never\n", "labels never seen in train_file: 'never'"),
    "floats": ("sentence1,sentence2,label\na,b,0.5\nc,d,1.5\n", "labels are floats ('0.5', '1.5'), but names"),
    "one sentence": ("sentence1,label\na,good\n", "has no column 'sentence2'"),
    "missing": (None, "no such file"),
}


@pytest.mark.parametrize("case", VALIDATION_CASES)
def test_validation_files(base, place, case):
    text, words = VALIDATION_CASES[case]
    if text is not None:
        (place / "dev.csv").write_text(text)
    refused(place, right(base, validation_file="dev.csv"), ("validation_file", words))


def test_files_that_are_not_there(base, place):
    (place / "train.csv").mkdir()
    refused(
        place,
        right(base, train_file="train.csv", validation_file="trian.csv"),
        ("train_file", "is a folder; give a file"),
        ("validation_file", "no such file; did you mean 'train.csv'?"),
    )
    refused(place, right(base, train_file="x" * 300 + ".csv"), ("train_file", "no such file"))


def test_a_cell_of_a_megabyte_is_read(base, place):
    """Cut to max_seq_length as any other text. The target is out of reach, so that the run ends where data are ready."""
    rows = "".join(f"{'sun ' * 262_144},the,{label}\n" for label in ("good", "bad"))
    (place / "long.csv").write_text("sentence1,sentence2,label\n" + rows)
    options = {"train_file": "long.csv", "validation_file": "long.csv", "target_modules": "qury"}
    refused(place, right(base, **options), ("target_modules",))
    (place / "long.csv").write_text("sentence1,sentence2,label\n" + rows.replace(",good", ""))
    lines = refused(place, right(base, **options), ("train_file", "line 2 has 2 columns"))
    assert all(len(line) < 1000 for line in lines)


def language(base, **options):
    given = {
        "model_name_or_path": base / "llama",
        "train_file": base / "text.txt",
        "validation_file": base / "text.txt",
    }
    return right(base, task_type="causal_lm", **{**given, **options})


LANGUAGE_CASES = {
    "empty": ({"train_file": ("a.txt", b"")}, ("train_file", "the file is empty")),
    "blank": ({"train_file": ("a.txt", b" \n\n")}, ("train_file", "contains no text")),
    "one word": ({"validation_file": ("a.txt", b"sun")}, ("text", "fewer than two tokens")),
    "columns": ({"train_file": ("a.csv", b"a,b\nc,d\n")}, ("train_file", "prompt and response, messages, or text")),
    "no response": (
        {"train_file": ("a.jsonl", b'{"prompt": "a", "response": " "}\n')},
        ("train_file", "row 1: response is ' '"),
    ),
    "no answer": (
        {"train_file": ("a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n')},
        ("train_file", "row 1: messages must end with an assistant's"),
    ),
    "no messages": (
        {"train_file": ("a.jsonl", b'{"messages": "a"}\n')},
        ("train_file", "row 1: messages is not a list of objects"),
    ),
    "half a character": ({"train_file": ("a.jsonl", b'{"text": "\\ud800"}\n')}, ("train_file", "half a surrogate")),
    "NUL": ({"train_file": ("a.txt", b"a\0b")}, ("train_file", "NUL byte")),
    "other columns": (
        {"validation_file": ("a.jsonl", b'{"prompt": "a", "response": "b"}\n')},
        ("validation_file", "has columns prompt, response, but train_file has text"),
    ),
    "no files": ({"train_file": None, "validation_file": None}, ("train_file", "--task_type causal_lm needs")),
    "an encoder": ({"model_name_or_path": "bert"}, ("task_type", "bert is not a decoder")),
    "too long": ({"max_seq_length": 65}, ("max_seq_length", "at most 64")),
    "with tmp": ({"method": "tmp"}, ("method", "use prunadapt, lora or full")),
}


@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_language(base, place, case):
    options, expected = LANGUAGE_CASES[case]
    options = dict(options)
    for field, value in options.items():
        if isinstance(value, tuple):
            (place / value[0]).write_bytes(value[1])
            options[field] = value[0]
        elif value == "bert":
            options[field] = base / "bert"
    refused(place, language(base, **options), expected)


def glue(task="rte", data_dir="glue", **options):
    return {"task_name": task, "data_dir": data_dir, "train_file": None, "validation_file": None, **options}


def cut(path, text):
    path.write_text(text)


HEADER = "index\tsentence1\tsentence2\tlabel\n"
GLUE_CASES = {
    "no such task": (lambda g: None, glue("rtee"), ("task_name", "did you mean 'rte'")),
    "no such folder": (lambda g: None, glue(data_dir="nowhere"), ("data_dir", "there is no such folder")),
    "no folder of the task": (
        lambda g: shutil.rmtree(g / "RTE"),
        glue(),
        ("data_dir", "RTE/train.tsv", "no such file"),
    ),
    "no dev file": (lambda g: (g / "RTE" / "dev.tsv").unlink(), glue(), ("data_dir", "RTE/dev.tsv", "no such file")),
    "short file": (
        lambda g: cut(g / "RTE" / "train.tsv", HEADER + "0\tthe sun\n"),
        glue(),
        ("data_dir", "is it a TSV?"),
    ),
    "header only": (lambda g: cut(g / "RTE" / "train.tsv", HEADER), glue(), ("data_dir", "has no rows")),
    "empty": (lambda g: cut(g / "RTE" / "train.tsv", ""), glue(), ("data_dir", "the file is empty")),
    "other columns": (lambda g: cut(g / "RTE" / "train.tsv", "a\tb\n1\t2\n"), glue(), ("data_dir", "are missing")),
    "other labels": (
        lambda g: cut(g / "RTE" / "train.tsv", HEADER + "0\ta\tb\tmaybe\n"),
        glue(),
        ("data_dir", "label 'maybe'", "is it the official rte file?"),
    ),
    "number out of range": (
        lambda g: cut(g / "WNLI" / "dev.tsv", HEADER + "0\ta\tb\t7\n"),
        glue("wnli"),
        ("data_dir", "outside 0..1"),
    ),
    "no task": (lambda g: None, glue(None), ("task_name", "--data_dir needs the name of a GLUE task")),
    "the sample": (lambda g: None, glue("sample"), ("data_dir", "name a task: cola")),
    "offline": (
        lambda g: None,
        glue("mrpc", None),
        ("task_name", "could not be loaded from the hub", "--data_dir DIR"),
    ),
}


@pytest.mark.parametrize("case", GLUE_CASES)
def test_glue_folders(base, place, case):
    spoil, options, expected = GLUE_CASES[case]
    shutil.copytree(base / "glue", place / "glue")
    spoil(place / "glue")
    refused(place, right(base, **options), expected)


# ------------------------------------------------------------------------------------------------------ the model


def edit(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def keep_only(folder, count):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:count])


def index(folder, text):
    """Beside a whole model.safetensors nobody reads it."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


def into_run(folder, *names):
    """Make it the folder of a run that has exported the model under these names."""
    for name in names:
        shutil.copytree(folder, folder / "exports" / name, ignore=shutil.ignore_patterns("exports"))
    remove(folder, "*.json", "*.safetensors")
    (folder / "run.json").write_text("{}")


def remove(folder, *patterns):
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()


MODEL_CASES = {
    "a run": (lambda f: into_run(f, "padded"), "not of a model; name one of its exports: model/exports/padded"),
    "quantised": (lambda f: change(f / "config.json", quantization_config={"quant_method": "fp8"}), "is quantised"),
    "no config": (lambda f: remove(f, "config.json"), "has no config.json"),
    "an adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "is the folder of an adapter"),
    "an adapter beside a model": (lambda f: cut(f / "adapter_config.json", "{}"), "is the folder of an adapter"),
    "config is not JSON": (lambda f: cut(f / "config.json", "{"), "config.json cannot be read"),
    "config is a list": (lambda f: cut(f / "config.json", "[]"), "config.json is not a JSON object"),
    "config without a type": (lambda f: cut(f / "config.json", "{}"), "model_type"),
    "unsupported family": (lambda f: edit(f, model_type="t5"), "supported are albert, bert"),
    "unknown family": (lambda f: edit(f, model_type="odd"), "supported are albert, bert"),
    "heads that do not divide": (lambda f: edit(f, num_attention_heads=5), "not a multiple"),
    "a size that is no number": (lambda f: edit(f, hidden_size="x"), "hidden_size"),
    "no layers": (lambda f: edit(f, num_hidden_layers=0), "no layers"),
    "more layers than weights": (lambda f: edit(f, num_hidden_layers=5), "are missing"),
    "more words than weights": (lambda f: edit(f, vocab_size=5000), "outside its blocks are missing"),
    "more positions than weights": (lambda f: edit(f, max_position_embeddings=999), "outside its blocks are missing"),
    "pruned already": (lambda f: edit(f, pruned_structure={}), "is pruned already"),
    "no weights": (lambda f: remove(f, "*.safetensors"), "holds no weights"),
    "weights cut in the header": (lambda f: keep_only(f, 1000), "damaged or cut short"),
    "weights cut at the end": (lambda f: keep_only(f, -1), "damaged or cut short"),
    "weights empty": (lambda f: keep_only(f, 0), "damaged or cut short"),
    "a shard is missing": (
        lambda f: index(f, json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}})),
        "model-00002-of-00002.safetensors, which model.safetensors.index.json names, is missing",
    ),
    "index is not JSON": (lambda f: index(f, "{"), "model.safetensors.index.json cannot be read"),
    "index without a map": (lambda f: index(f, "{}"), "has no weight_map"),
    "no tokenizer": (lambda f: remove(f, "token*"), "has no tokenizer"),
    "half a tokenizer": (lambda f: remove(f, "tokenizer.json"), "has no tokenizer"),
    "tokenizer is not JSON": (lambda f: cut(f / "tokenizer.json", "{"), "cannot be loaded"),
    "code of its own": (lambda f: edit(f, model_type="odd", auto_map=REMOTE), "pass --trust_remote_code to run it"),
}


@pytest.mark.parametrize("case", MODEL_CASES)
def test_model_folders(base, place, case):
    spoil, words = MODEL_CASES[case]
    shutil.copytree(base / "bert", place / "model")
    spoil(place / "model")
    refused(place, right(base, model_name_or_path="./model"), ("model_name_or_path", words))


NAME_CASES = {
    "./nowhere": "there is no such folder",
    "nowhere/": "there is no such folder",
    "a/b/c": "there is no such folder",
    "file": "is a file; name the folder of the model",
    "no-such-model": "could not be loaded from the hub (HF_HUB_OFFLINE is set)",
    "x" * 300: "is too long",
}


@pytest.mark.parametrize("name", NAME_CASES)
def test_names_of_models(base, place, name):
    (place / "file").write_text("")
    refused(place, right(base, model_name_or_path=name), ("model_name_or_path", NAME_CASES[name]))


def test_pickled_weights_are_refused_with_the_command_that_converts_them(base, place):
    """It is run as it stands, by a shell, in a folder with an awkward name; then the same options are taken."""
    import torch
    from safetensors.torch import load_file

    folder = place / "it's a model"
    shutil.copytree(base / "bert", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    argv = right(base, model_name_or_path=folder, target_sparsity=0.999)
    (line,) = refused(place, argv, ("model_name_or_path", "only pickled weights (pytorch_model.bin)", "never loaded"))
    command = line.partition("convert them with: ")[2]
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    converted, original = load_file(folder / "model.safetensors"), load_file(base / "bert" / "model.safetensors")
    assert converted.keys() == original.keys() and all(torch.equal(converted[k], original[k]) for k in original)
    refused(place, argv, ("target_sparsity", "at most"))


def test_code_of_a_folder_runs_only_when_trusted_and_that_is_said(base, place, capsys, monkeypatch):
    """A folder whose configuration class leaves a mark when it runs."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(place / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place / "modules"))
    folder = place / "odd"
    shutil.copytree(base / "bert", folder)
    edit(folder, model_type="odd", auto_map={"AutoConfig": "configuration_odd.OddConfig"})
    cut(
        folder / "configuration_odd.py",
        f"from pathlib import Path\nfrom transformers import BertConfig\nPath({str(place / 'mark')!r}).write_text('ran')\n"
        "class OddConfig(BertConfig):\n    model_type = 'odd'\n",
    )
    refused(place, right(base, model_name_or_path=folder), ("model_name_or_path", "--trust_remote_code"))
    assert "trust_remote_code" not in capsys.readouterr().out and not (place / "mark").exists()
    code, said = said_by(main, right(base, model_name_or_path=folder, trust_remote_code=True))
    assert code == 2 and "'odd' is not supported" in said and (place / "mark").exists()
    out = capsys.readouterr().out.splitlines()
    assert f"trust_remote_code: runs configuration_odd.py of {folder}" in out
    said_by(main, right(base, trust_remote_code=True, target_modules="qury"))
    assert f"trust_remote_code: runs nothing, {base / 'bert'} brings no code" in capsys.readouterr().out


def test_what_lay_in_the_output_folder_stays(base, place):
    (place / "out").mkdir()
    (place / "out" / "notes.txt").write_text("mine")
    for mistake in (
        {"r": 0},
        {"train_file": "nowhere.csv"},
        {"model_name_or_path": "./nowhere"},
        {"target_sparsity": 0.999},
    ):
        refused(place, right(base, **mistake))


def test_nothing_is_compiled_for_a_mistake_that_can_be_seen_before(base, place, monkeypatch):
    monkeypatch.setattr("prunadapt_ds.distributed.start_deepspeed", lambda: pytest.fail("DeepSpeed was started"))
    for mistake in ({"train_file": "nowhere.csv"}, {"model_name_or_path": "./nowhere"}, {"ds_config": "nowhere.json"}):
        refused(place, right(base, **mistake))


# --------------------------------------------------------------------------------------------- the other commands


@pytest.fixture(scope="module")
def classifier(base):
    """A folder that can be scored on the task."""
    tiny_model("bert").save_pretrained(base / "classifier")
    tiny_tokenizer(base / "classifier")
    return base / "classifier"


def scored(base, folder, **options):
    given = {
        "model_name_or_path": folder,
        "train_file": base / "data" / "train.csv",
        "validation_file": base / "data" / "validation.csv",
        "max_seq_length": 32,
        **options,
    }
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


SCORED_CASES = {
    "a run": (lambda f: into_run(f, "b", "a"), "name one of its exports: model/exports/a, model/exports/b"),
    "a run without exports": (lambda f: into_run(f), "is the folder of a run without exports; go on with the run"),
    "no config": (lambda f: remove(f, "config.json"), "has no config.json"),
    "config is not JSON": (lambda f: cut(f / "config.json", "{"), "config.json cannot be read"),
    "no tokenizer": (lambda f: remove(f, "token*"), "has no tokenizer"),
    "weights cut": (lambda f: keep_only(f, -1), "damaged or cut short"),
    "no weights": (lambda f: remove(f, "*.safetensors"), "holds no weights"),
    "no head": (
        lambda f: lose_head(f),
        "by its config.json, it has no classifier.bias",
    ),
    "three labels": (lambda f: edit(f, id2label={"0": "a", "1": "b", "2": "c"}), "other shapes than config.json says"),
    "a damaged structure": (lambda f: edit(f, pruned_structure={"layout": {}, "kept": []}), "cannot be loaded"),
    "a language model of ours": (
        lambda f: edit(f, pruned_structure={}, architectures=["PrunedLlamaForCausalLM"]),
        "is a language model, but a classifier is needed",
    ),
    "a structure of no class": (lambda f: edit(f, pruned_structure={}, architectures=["json"]), "cannot be loaded"),
    "code of its own": (lambda f: edit(f, model_type="odd", auto_map=REMOTE), "pass --trust_remote_code to run it"),
    "a pickled adapter": (lambda f: cut(f / "adapter_config.json", "{}"), "pickled ones are never loaded"),
    "an adapter of nothing": (lambda f: adapter(f, "{}"), "names no model; set base_model_name_or_path"),
    "an adapter that is not JSON": (lambda f: adapter(f, "{"), "adapter_config.json cannot be read"),
    "an adapter without a head": (lambda f: headless(f), "by its config.json, it has no classifier.bias"),
    "an adapter of nowhere": (
        lambda f: adapter(f, '{"base_model_name_or_path": "./nowhere"}'),
        "there is no such folder",
    ),
}


def lose_head(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def headless(folder):
    lose_head(folder)
    shutil.copytree(folder, folder.parent / "base")
    adapter(folder, '{"base_model_name_or_path": "./base"}')


def adapter(folder, config):
    cut(folder / "adapter_config.json", config)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("case", SCORED_CASES)
def test_folders_to_score(base, place, classifier, case):
    spoil, words = SCORED_CASES[case]
    shutil.copytree(classifier, place / "model")
    spoil(place / "model")
    refused(place, scored(base, "./model"), ("model_name_or_path", words), program=evaluate.main)


def test_what_is_not_for_scoring(base, place, classifier):
    refused(
        place,
        scored(base, classifier, r=4),
        ("r", "has no meaning when a folder is scored"),
        program=evaluate.main,
    )
    refused(place, scored(base, "./nowhere"), ("model_name_or_path", "no such folder"), program=evaluate.main)
    argv = scored(base, classifier, validation_file="nowhere.csv")
    refused(place, argv, ("validation_file", "no such file"), program=evaluate.main)
    argv = scored(base, classifier, task_name="mnli", data_dir=base / "glue", train_file=None, validation_file=None)
    refused(place, argv, ("data_dir", "MNLI"), program=evaluate.main)
    words = "is a language model, but a classifier is needed; `evaluate` scores it with --task_type causal_lm"
    refused(place, scored(base, base / "llama"), ("model_name_or_path", words), program=evaluate.main)
    (place / "file").write_text("")
    argv = scored(base, classifier, output_dir="file/out")
    refused(place, argv, ("output_dir", "cannot be written there (Not a directory)"), program=evaluate.main)
    assert said_by(evaluate.main, scored(base, classifier))[0] == 0, "the folder itself is right"


@pytest.fixture(scope="module")
def finished(base):
    """What `export.py` needs of a finished run whose layers differ in width."""
    model, layout, structure = adapted("bert")
    plan = plan_of(structure, "unequal")
    gates.apply_mask(model, plan.mask())
    run = base / "run"
    export.export(model, layout, plan, tiny_tokenizer(base / "tokenizer"), run / "exports" / "compact")
    (run / "plan.json").write_text(json.dumps(plan.to_dict()))
    report = reports.empty() | {"status": "complete"}
    (run / "report.json").write_text(json.dumps(report))
    return run


def change(file, **changes):
    cut(file, json.dumps({**json.loads(file.read_text()), **changes}))


def unfinished(run):
    """Interrupted, with one checkpoint, which is damaged."""
    change(run / "report.json", status="interrupted")
    (run / "checkpoints" / "step-4").mkdir(parents=True)
    cut(run / "checkpoints" / "step-4" / "checkpoint.json", "{")


COMPACT = "exports/compact"
UNITS = [{"layer": 0, "kind": "heads", "dense": 4, "kept": [0, 9]}]
EXPORT_CASES = {
    "not a run": (lambda r: shutil.rmtree(r / "exports"), "exports/compact/config.json is missing"),
    "no plan": (lambda r: (r / "plan.json").unlink(), "plan.json is missing"),
    "no report": (lambda r: (r / "report.json").unlink(), "report.json is missing"),
    "unfinished": (lambda r: change(r / "report.json", status="failed"), "not that of a finished run"),
    "report is not JSON": (lambda r: cut(r / "report.json", "{"), "report.json cannot be read"),
    "no intact checkpoint": (unfinished, "there is no intact checkpoint"),
    "plan is not JSON": (lambda r: cut(r / "plan.json", "{"), "plan.json cannot be read"),
    "plan is a list": (lambda r: cut(r / "plan.json", "[]"), "plan.json is not a JSON object"),
    "plan without units": (lambda r: cut(r / "plan.json", "{}"), "do not fit"),
    "units that do not exist": (lambda r: cut(r / "plan.json", json.dumps({"units": UNITS})), "do not fit"),
    "another run's plan": (lambda r: cut(r / "plan.json", json.dumps({"units": []})), "do not fit"),
    "config is not JSON": (lambda r: cut(r / COMPACT / "config.json", "{"), "config.json cannot be read"),
    "a damaged layout": (lambda r: change(r / COMPACT / "config.json", pruned_structure={"layout": 3}), "do not fit"),
    "weights cut": (lambda r: keep_only(r / COMPACT, -1), "damaged or cut short"),
    "other code": (lambda r: (r / COMPACT / "modeling_prunadapt.py").write_text("print('ran')\n"), "no other is run"),
    "code of elsewhere": (
        lambda r: change(r / COMPACT / "config.json", auto_map={"AutoModel": "odd--modeling_prunadapt.X"}),
        "no other is run",
    ),
}


@pytest.mark.parametrize("case", EXPORT_CASES)
def test_runs_to_export(place, finished, case):
    spoil, words = EXPORT_CASES[case]
    shutil.copytree(finished, place / "run")
    spoil(place / "run")
    argv = ["--run_dir", "run", "--export_formats", "padded"]
    refused(place, argv, ("run_dir", words), program=reexport.main)


def test_an_export_that_cannot_be_proven_leaves_nothing(place, finished, monkeypatch):
    shutil.copytree(finished, place / "run")

    def wrong(*folders):
        raise ParityError("logits differ")

    argv = ["--run_dir", "run", "--export_formats", "padded"]
    before = tree(place / "run")
    with monkeypatch.context() as patch:
        patch.setattr(reexport, "prove", wrong)
        assert reexport.main(argv) == 3
    assert tree(place / "run") == before
    assert reexport.main(argv) == 0 and (place / "run" / "exports" / "padded").is_dir()


def test_a_format_that_cannot_say_the_plan(place, finished):
    shutil.copytree(finished, place / "run")
    argv = ["--run_dir", "run", "--export_formats", "uniform"]
    refused(place, argv, ("export_formats", "train with --uniform"), program=reexport.main)
    refused(
        place,
        ["--run_dir", "nowhere", *argv[2:]],
        ("run_dir", "is missing: there is no such folder"),
        program=reexport.main,
    )
    (place / "file").write_text("")
    refused(place, ["--run_dir", "file", *argv[2:]], ("run_dir", "is a file"), program=reexport.main)
    argv = ["--run_dir", "run", "--export_formats", "compact", "torch_export", "--export_dtype", "float16"]
    words = ("export_dtype", "written in float32"), ("export_formats", "the run is finished")
    refused(place, argv, *words, program=reexport.main)


def test_two_exports_of_a_run_do_not_write_its_report_at_once(place, finished):
    shutil.copytree(finished, place / "run")
    lock = OwnedFolder(place / "run")
    argv = ["--run_dir", "run", "--export_formats", "padded"]
    refused(place, argv, ("output_dir", "another"), program=reexport.main)
    lock.release()


def test_runs_to_compare(place, finished):
    (place / "file").write_text("")
    refused(place, ["nowhere", "file"], ("run", "there is no such folder"), program=compare.main)
    (place / "run").mkdir()
    sound = shutil.copytree(finished, place / "sound")
    (sound / "report.json").write_text(json.dumps(filled()))
    argv = ["sound", "--output_dir", "file/out"]
    refused(place, argv, ("output_dir", "cannot be written (Not a directory)"), program=compare.main)
    for text in ("{", "[]", '{"metric": {"exported": [1]}}', "[" * 100_000, '{"status": "complete"}'):
        (place / "run" / "report.json").write_text(text)
        assert said_by(compare.main, ["run", "sound"]) == (0, ""), "shown as missing"
        refused(place, ["run"], ("run", "no run with a readable report.json"), program=compare.main)


def test_tables_to_gather(place):
    (place / "file").write_text("")
    refused(place, ["nowhere"], ("root", "there is no such folder"), program=glue_table.main)
    refused(
        place, ["file", "--tasks", "rtee"], ("tasks", "not a GLUE task"), ("root", "no such"), program=glue_table.main
    )
    cell = place / "rte" / "seed0"
    cell.mkdir(parents=True)
    for text in ("{", "[]", '{"status": "complete", "metric": []}', "[" * 100_000, '{"status": "complete"}'):
        (cell / "report.json").write_text(text)
        code, said = said_by(glue_table.main, [".", "--tasks", "rte"])
        assert code == 1 and not said
        assert "report.json cannot be read" in (place / "glue.md").read_text()
