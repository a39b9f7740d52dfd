"""Language models through the whole program: perplexity, exports, and generation with the cache."""

import json
import shlex

import pytest
import torch
from safetensors import safe_open

from prunadapt_ds import outline, token_teacher
from prunadapt_ds import report as reports
from prunadapt_ds.config import parse
from tests.distributed import runs
from tests.distributed.harness import Ranks, run_ranks
from tests.distributed.test_laws import arguments
from tests.integration.test_runs import launch
from tests.tiny import tiny_instructions, tiny_language_folder

pytestmark = pytest.mark.ci
PROMPTS = [[6, 9, 12], [20, 7], [30, 31, 32, 33, 34, 35]]


def language_arguments(tmp_path, model_type, suffix="jsonl", **options):
    tiny_language_folder(tmp_path / model_type, model_type)
    tiny_instructions(tmp_path / "data")
    return arguments(
        tmp_path,
        tmp_path / "out",
        model_name_or_path=tmp_path / model_type,
        train_file=tmp_path / "data" / f"train.{suffix}",
        validation_file=tmp_path / "data" / f"validation.{suffix}",
        **{
            "task_type": "causal_lm",
            "batch": 8,
            "max_steps": 8,
            "target_sparsity": 0.65,
            "shrink": "always",
            "distill_weight": 0.5 if options.get("distill_top_k") else 0,
            **options,
        },
    )


def generate(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert model.config.use_cache
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    return [model.generate(torch.tensor([p]), eos_token_id=None, **options)[0].tolist() for p in PROMPTS]


@pytest.mark.parametrize(
    "model_type, formats", [("llama", "padded"), pytest.param("gpt2", "compact", marks=pytest.mark.full)]
)
def test_generation_with_the_cache_follows_the_masked_model(tmp_path, model_type, formats):
    argv = language_arguments(tmp_path, model_type, export_formats=formats)
    ((report, said),) = run_ranks(runs.language_run, 1, argv, PROMPTS, 10)
    reports.validate(report)
    assert report["parity"]["max_abs_logit_diff"] <= report["parity"]["tolerance"]
    masked, exported = (report["metric"][kind]["perplexity"] for kind in ("masked", "exported"))
    assert exported == pytest.approx(masked, rel=1e-4) and report["metric"]["teacher"]["perplexity"] > 1
    assert len({(r["heads"], r["neurons"]) for r in report["structure"]}) > 1
    for kind in report["exports"]:
        assert generate(tmp_path / "out" / "exports" / kind) == said
    with safe_open(tmp_path / "out" / "exports" / "compact" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("lm_head.weight" in names) == (model_type == "llama"), "a tied tensor stands once"
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and all(line["masked"]["tokens"] >= 2 for line in lines)


def test_two_ranks_on_a_text_file_and_its_score(tmp_path):
    options = {"uniform": True, "target_sparsity": 0.5, "distill_top_k": 8}
    argv = language_arguments(tmp_path, "qwen3", "txt", batch=4, max_seq_length=16, **options)
    assert run_ranks(runs.whole_run, 2, argv) == [0, 0]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["task"] == "causal_lm" and report["metric"]["exported"]["perplexity"] > 1
    teacher = tmp_path / "out" / token_teacher.FOLDER
    assert not teacher.exists(), "a finished run needs it no more"
    teacher.mkdir()
    assert run_ranks(runs.whole_run, 2, argv) == [0, 0]
    assert not teacher.exists(), "nor does one that was killed between its report and this"
    data = tmp_path / "data"
    argv = [
        "--task_type",
        "causal_lm",
        "--train_file",
        data / "train.txt",
        "--validation_file",
        data / "validation.txt",
    ]
    argv += ["--model_name_or_path", tmp_path / "out" / "exports" / "uniform", "--max_seq_length", 16]
    for measures in run_ranks(runs.scored, 2, [str(a) for a in argv]):
        assert measures == pytest.approx(report["metric"]["exported"], rel=1e-5)
    score_as_the_run_says(tmp_path, report)


def score_as_the_run_says(tmp_path, report):
    """The line of the footer, as it would be typed."""
    config = parse(language_arguments(tmp_path, "qwen3", "txt", max_seq_length=16))
    (line,) = (line for line in outline.footer(config, "causal_lm").splitlines() if "score it" in line)
    words = shlex.split(line[12:])
    assert words[:4] == ["python", "-m", "prunadapt_ds", "evaluate"]
    assert run_ranks(runs.scored, 1, words[4:]) == [pytest.approx(report["metric"]["exported"], rel=1e-5)]


def test_an_encoder_generates_nothing(tmp_path):
    from tests.tiny import tiny_folder

    argv = language_arguments(tmp_path, "llama")
    tiny_folder(tmp_path / "bert", "bert")
    argv[argv.index("--model_name_or_path") + 1] = str(tmp_path / "bert")
    done = launch(["python", "launcher/train.py", *argv])
    assert done.returncode == 2 and "not a decoder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.full
def test_a_teacher_of_words_is_the_same_for_every_split(tmp_path):
    """Two ranks learn from it what one does; each has written its own file."""
    found = {}
    for name, ranks, options in (("one", 1, {"distill_top_k": 32}), ("two", 2, {"distill_top_k": 32})):
        argv = language_arguments(tmp_path / name, "llama", batch=8 // ranks, per_device_eval_batch_size=4, **options)
        found[name] = run_ranks(runs.fit, ranks, argv)[0]
    assert found["one"]["losses"] == pytest.approx(found["two"]["losses"], rel=1e-4)
    assert found["one"]["plan_hash"] == found["two"]["plan_hash"]
    ranks = sorted(file.name for file in (tmp_path / "two" / "out" / "teacher").iterdir())
    assert ranks == ["index.safetensors", "part-0.safetensors", "part-1.safetensors"]


@pytest.mark.full
def test_a_run_with_a_teacher_of_words_goes_on(tmp_path):
    """Killed after the first decision and resumed, it ends as the uninterrupted one; a finished run leaves no teacher."""
    options = {"distill_top_k": 32, "checkpoint_steps": 1, "max_steps": 10}
    whole = language_arguments(tmp_path / "whole", "gpt2", batch=4, **options)
    assert run_ranks(runs.whole_run, 2, whole) == [0, 0]
    assert not (tmp_path / "whole" / "out" / "teacher").exists()
    killed = language_arguments(tmp_path / "killed", "gpt2", batch=4, **options)
    assert -9 in [ended.code for ended in Ranks(killed, 2, {"PRUNADAPT_FAULT": "SIGKILL@step-6@0"}).wait()]
    assert (tmp_path / "killed" / "out" / "teacher" / "index.safetensors").exists()
    assert run_ranks(runs.whole_run, 2, killed) == [0, 0]
    reports_of = [json.loads((tmp_path / name / "out" / "report.json").read_text()) for name in ("whole", "killed")]
    assert reports_of[0]["plan_hash"] == reports_of[1]["plan_hash"]
    assert reports_of[0]["metric"]["masked"] == reports_of[1]["metric"]["masked"]
    alone = language_arguments(tmp_path / "alone", "gpt2", batch=4, **{**options, "distill_top_k": 0})
    assert run_ranks(runs.whole_run, 2, alone) == [0, 0]
    losses = [
        [row["loss"] for row in json.loads((tmp_path / name / "out" / "report.json").read_text())["progress"]]
        for name in ("whole", "alone")
    ]
    assert losses[0][:4] == losses[1][:4] and losses[0] != losses[1], "the teacher counts after the first decision"
