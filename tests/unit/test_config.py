"""Options: everything wrong is said at once, with field, value and remedy."""

import json

import pytest

from prunadapt_ds.config import CRITERION_NAMES, OPTIONS, parse
from prunadapt_ds.ds_config import resolve_ds_config
from prunadapt_ds.errors import UserError
from prunadapt_ds.options import ELSEWHERE
from tests.conftest import ROOT

pytestmark = pytest.mark.fast


def fields(argv):
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert caught.value.exit_code == 2
    return {p.field: p for p in caught.value.problems}


def test_tables_agree():
    from prunadapt_ds.importance import CRITERIA

    assert set(CRITERION_NAMES) == set(CRITERIA)


def test_defaults():
    config = parse([])
    assert config.uses_sample and config.data.task_name == "sample"
    assert parse(["--model_name_or_path", "x"]).uses_sample and not parse(["--task_name", "rte"]).uses_sample
    assert config.prune.target_sparsity == 0.5 and config.train.learning_rate is None
    assert json.dumps(config.to_dict())


@pytest.mark.parametrize(
    "argv, field",
    [
        (["--learning_rat", "1"], "learning_rat"),
        (["--method", "tmp", "--target_sparsity", "0.5"], "target_sparsity"),
        (["--method", "lora", "--score_only"], "score_only"),
        (["--method", "tmp", "--target_speedup", "2"], "target_speedup"),
        (["--method", "lora", "--budget", "latency"], "budget"),
        (["--method", "full", "--adapter_name_or_path", "x"], "adapter_name_or_path"),
        (["--method", "tmp", "--adapter_name_or_path", "x"], "adapter_name_or_path"),
        (["--target_sparsity", "0.5", "--target_speedup", "2"], "target_speedup"),
        (["--budget", "macs", "--target_speedup", "2"], "target_speedup"),
        (["--method", "tmp", "--save_scores"], "save_scores"),
        (["--method", "tmp", "--r", "4"], "r"),
        (["--target_sparsity", "0", "--distill_weight", "0.5"], "distill_weight"),
        (["--target_sparsity", "0", "--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_type"),
        (["--target_speedup", "1", "--criterion", "taylor"], "criterion"),
        (["--train_file", "a.csv", "--validation_file", "b.csv", "--test_file", "c.csv"], "test_file"),
        (["--method", "lora", "--uniform"], "uniform"),
        (["--export_formats", "uniform"], "export_formats"),
        (["--uniform", "--keep_in_outer_layers", "0.5"], "keep_in_outer_layers"),
        (["--method", "lora", "--keep_in_outer_layers", "0.5"], "keep_in_outer_layers"),
        (["--export_formats", "adapter"], "export_formats"),
        (["--export_formats", "compact", "onxx"], "export_formats"),
        (["--prune_start", "0.7"], "prune_start"),
        (["--max_steps", "0"], "max_steps"),
        (["--task_name", "mrpc", "--train_file", "a.csv", "--validation_file", "b.csv"], "task_name"),
        (["--train_file", "a.csv"], "validation_file"),
        (["--validation_file", "a.csv"], "train_file"),
        (["--data_dir", "nowhere", "--task_name", "mrpc"], "data_dir"),
        (["--data_dir", ".", "--task_name", "sample"], "data_dir"),
        (["--data_dir", "."], "task_name"),
        (["--data_dir", ".", "--train_file", "a.csv", "--validation_file", "b.csv"], "data_dir"),
        (["--distill_top_k", "4"], "distill_top_k"),
        (["--teacher_window", "0.3"], "teacher_window"),
        (["--distill_weight", "0", "--distill_fades", "false"], "distill_fades"),
        (["--resume", "nowhere"], "resume"),
        (["--gradient_checkpointing", "perhaps"], "gradient_checkpointing"),
        (["--r"], "command line"),
        (["stray"], "command line"),
        (["--config", "nowhere.yaml"], "config"),
    ],
)
def test_contradictions(argv, field):
    assert field in fields(argv)


def without_effect(argv):
    try:
        parse(argv)
    except UserError as error:
        return [p.field for p in error.problems if "has no effect with --" in p.remedy]
    return []


def another(o):
    """A value of the option's that is not its default."""
    if o.kind is bool:
        return str(not o.default).lower()
    fraction = str((o.limits["least"] or 0) + 0.123)
    return next((c for c in o.limits["choices"] if c != o.default), {int: "3", float: fraction, str: "x"}[o.kind])


@pytest.mark.parametrize("o", [o for o in OPTIONS.values() if o.limits["needs"]], ids=lambda o: o.name)
def test_an_option_without_effect_is_refused_and_its_default_is_not(o):
    met = {other: taken[0] for other, taken in o.limits["needs"].items()}
    for other, taken in o.limits["needs"].items():
        for theirs in OPTIONS[other].limits["choices"]:
            beside = [word for name, value in {**met, other: theirs}.items() for word in (f"--{name}", value)]
            assert without_effect([*beside, f"--{o.name}", another(o)]) == ([] if theirs in taken else [o.name])
            if o.default is not None:
                assert without_effect([*beside, f"--{o.name}", str(o.default)]) == []


def test_an_option_without_effect_says_with_what_it_has_one():
    problem = fields(["--method", "tmp", "--criterion", "taylor"])["criterion"]
    assert str(problem) == "criterion='taylor': has no effect with --method tmp, only with prunadapt; leave it out"


def test_a_speedup_is_a_sparsity_of_latency():
    prune = parse(["--target_speedup", "4"]).prune
    assert (prune.target_sparsity, prune.budget) == (0.75, "latency")
    assert parse(["--target_speedup", "4", "--budget", "latency"]).prune == prune
    assert parse(["--budget", "latency"]).prune.target_sparsity == 0.5


def test_export_formats():
    assert parse([]).output.export_formats == ["compact"]
    assert parse(["--uniform", "--export_formats", "padded"]).output.export_formats == ["compact", "padded", "uniform"]
    assert parse(["--method", "lora", "--export_formats", "adapter"]).output.export_formats == ["compact", "adapter"]


def test_all_at_once():
    found = fields(["--r", "0", "--methd", "x", "--budget", "flops", "--seed", "-1", "--learning_rate", "zero"])
    assert set(found) == {"r", "methd", "budget", "seed", "learning_rate"}
    assert "did you mean --method?" in found["methd"].remedy


@pytest.mark.parametrize("name, hint", ELSEWHERE.items())
def test_what_other_programs_call_it(name, hint):
    assert name not in OPTIONS and (hint in OPTIONS or " " in hint)
    remedy = fields([f"--{name}", "1"])[name].remedy
    assert remedy == f"there is no such option; {f'use --{hint}' if hint in OPTIONS else hint}"


def test_what_is_had_elsewhere_or_not_at_all():
    found = fields(["--export_formats", "onnx", "--lr_scheduler_type", "cosine", "--budget", "flops"])
    assert "prunadapt export --run_dir DIR --export_formats onnx" in found["export_formats"].remedy
    assert found["lr_scheduler_type"].remedy.startswith("is not available; linear")
    assert found["budget"].remedy == "known are params, macs, latency"


def test_scores_alone_are_no_training():
    found = fields(["--score_only", "--max_steps", "3", "--export_formats", "padded", "--criterion", "taylor"])
    assert set(found) == {"max_steps", "export_formats"}
    assert set(fields(["--score_only", "--weight_decay", "0.1", "--resume", "."])) == {"weight_decay", "resume"}
    assert parse(["--score_only", "--resume", "auto"]).prune.score_only, "as a SLURM template adds it"
    assert (
        found["max_steps"].remedy == "has no effect with --score_only, which neither trains nor exports; leave it out"
    )


def test_yaml_under_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("r: 4\nseed: 3\ngradient_checkpointing: true\ntarget_modules: [query, value]\n")
    config = parse(["--config", str(file), "--r", "2"])
    assert (config.lora.r, config.train.seed, config.train.gradient_checkpointing) == (2, 3, True)
    assert config.lora.target_modules == ["query", "value"]


def test_the_launcher_rank_is_taken_silently():
    assert parse(["--local_rank=1", "--r", "3"]).lora.r == 3


# --------------------------------------------------------------------------------------------------- ds_config


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "ds_configs").glob("*.json")))
def test_shipped_files_resolve(tmp_path, monkeypatch, file, world_size):
    """Parsed for a machine with CUDA and a disk at nvme_path, and by DeepSpeed's own schema."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    text = (ROOT / "ds_configs" / file).read_text().replace("/local_nvme", str(tmp_path))
    (tmp_path / file).write_text(text)
    config = parse(["--ds_config", str(tmp_path / file), "--gradient_accumulation_steps", "2"])
    ds = resolve_ds_config(config, world_size, probe=lambda: True)
    assert "auto" not in json.dumps(ds.values)
    assert ds.values["train_batch_size"] == 64 * world_size == ds.resolved["train_batch_size"]
    assert ds.stage == int(file[4]) and ds.dtype == "bf16"
    assert resolve_ds_config(config, world_size, probe=lambda: False).dtype == "fp32"
    zero = ds.values["zero_optimization"]
    found = DeepSpeedZeroConfig(**zero)
    assert (found.offload_param is not None) == ("offload" in file)


def ds(tmp_path, values, *argv, world_size=2):
    file = tmp_path / "ds.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    return resolve_ds_config(parse(["--ds_config", str(file), *argv]), world_size, probe=lambda: False)


@pytest.mark.parametrize(
    "values, field",
    [
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}},
            "zero_optimization.offload_param.nvme_path",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/"}}},
            "zero_optimization.stage3_max_reuse_distance",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device",
        ),
    ],
)
def test_a_disk_that_cannot_hold_shards_is_refused(tmp_path, values, field):
    with pytest.raises(UserError) as caught:
        ds(tmp_path, values)
    assert field in {p.field for p in caught.value.problems}


def test_adam_defaults_are_read(tmp_path):
    found = ds(tmp_path, {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.98], "eps": 1e-6}}})
    assert found.adam == {"betas": [0.9, 0.98], "eps": 1e-6} and "optimizer" not in found.values
