"""The whole program on tiny models: every family, every method, launchers, and what a run leaves behind."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from prunadapt_ds import report as reports
from prunadapt_ds.finish import PARITY_EXAMPLES
from prunadapt_ds.models.families import FAMILIES
from tests.conftest import ROOT
from tests.distributed import runs
from tests.distributed.harness import Ranks, run_ranks
from tests.distributed.test_laws import arguments
from tests.integration.processes import deepspeed
from tests.tiny import tiny_data, tiny_folder
from tests.unit.test_data_tasks import write_official

pytestmark = pytest.mark.ci
TRAINABLE = list(FAMILIES)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny_data(folder / "data", n_train=64, n_dev=300)
    tiny_data(folder / "many", n_train=64, n_dev=PARITY_EXAMPLES + 9)
    tiny_data(folder / "numbers", n_train=40, n_dev=40, regression=True)
    for model_type in TRAINABLE:
        tiny_folder(folder / model_type, model_type)
    return folder


def run(base, output, *, world_size=2, model_type="bert", data="data", **options):
    argv = arguments(
        base,
        output,
        train_file=base / data / "train.csv",
        validation_file=base / data / "validation.csv",
        **{"model_name_or_path": base / model_type, "batch": 8, "max_steps": 10, "logging_steps": 5, **options},
    )
    assert run_ranks(runs.whole_run, world_size, argv) == [0] * world_size
    assert not [p for p in output.rglob("*") if p.stat().st_mode & 0o022], "others may write, the umask was 000"
    return json.loads((output / "report.json").read_text())


# A decoder's whole run is the uniform one below; other families' are in the full tier, their exports in test_exports.py.
@pytest.mark.parametrize(
    "model_type", ["bert", *(pytest.param(name, marks=pytest.mark.full) for name in ("llama", "deberta-v2", "albert"))]
)
def test_every_build_exports_what_it_trained(base, tmp_path, model_type):
    """Law 4: masked == exported and reloaded by a fresh process without this package, on 300 examples."""
    target = 0.65 if FAMILIES[model_type].is_decoder else 0.5  # key/value groups are dear, and go last
    report = run(base, tmp_path / "out", model_type=model_type, prune_start=0.1, target_sparsity=target)
    reports.validate(report)
    assert report["status"] == "complete"
    assert report["parity"]["examples"] == 300
    assert report["parity"]["max_abs_logit_diff"] <= report["parity"]["tolerance"]
    assert report["exports"]["compact"]["needs_remote_code"]
    dense, kept = report["params"]["encoder_dense"], report["params"]["encoder_kept"]
    assert report["sparsity"]["achieved"] == pytest.approx(1 - kept / dense)
    assert abs(report["sparsity"]["achieved"] - target) * dense <= 8 * 32 * 4 + 100 * 8
    assert len({(r["heads"], r["neurons"]) for r in report["structure"]}) > 1
    units = {"llama": 6, "phi3": 6, "albert": 8}.get(model_type, 12)  # heads, or key/value groups
    assert sum(r["heads"] for r in report["structure"]) < units
    assert sum(r["neurons"] for r in report["structure"]) < 48 * len(report["structure"])


def encoder_parameters_in(folder, layers="layer."):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if f".{layers}" in n]  # noqa: SIM118
        return sum(math.prod(file.get_slice(n).get_shape()) for n in names)


# A whole run of `lora` is in test_peft_loads_the_adapter.
@pytest.mark.parametrize("method", ["tmp", "full", pytest.param("lora", marks=pytest.mark.full)])
def test_other_methods(base, tmp_path, method):
    report = run(base, tmp_path / "out", method=method)
    assert report["status"] == "complete" and report["metric"]["teacher"] is None
    assert report["criterion"] is None and report["sparsity"]["target"] is None
    cut = 12 - sum(r["heads"] for r in report["structure"])
    assert cut == (round(43 / 144 * 12) if method == "tmp" else 0)
    assert report["exports"]["compact"]["needs_remote_code"] == (method == "tmp")
    exported = tmp_path / "out" / "exports" / "compact"
    assert encoder_parameters_in(exported) == report["params"]["encoder_kept"]
    peaks = report["memory"]["peak_rank_bytes"]
    assert peaks["dense_phase"] and bool(peaks["after_shrink"]) == (method == "tmp")
    if method == "full":
        assert report["params"]["trainable"] == report["params"]["total_dense"]


def test_a_uniform_run_loads_with_stock_classes(base, tmp_path):
    """With more rows than other folders than compact answer."""
    options = {"uniform": True, "export_formats": "padded", "target_sparsity": 0.6, "data": "many"}
    report = run(base, tmp_path / "out", model_type="llama", **options)
    assert report["exports"] == {
        kind: {"path": f"exports/{kind}", "needs_remote_code": kind == "compact"}
        for kind in ("compact", "padded", "uniform")
    }
    reports.validate(report)
    assert report["parity"]["examples"] in (PARITY_EXAMPLES, PARITY_EXAMPLES + 9)
    assert report["parity"]["max_abs_logit_diff"] <= report["parity"]["tolerance"]
    (counts,) = {(r["heads"], r["neurons"]) for r in report["structure"]}
    config = json.loads((tmp_path / "out" / "exports" / "uniform" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["intermediate_size"]) == counts and "auto_map" not in config
    step = 3 * max(8 * 3 * 32, 2 * 32 * (16 + 8))
    assert abs(report["sparsity"]["achieved"] - 0.6) * report["params"]["encoder_dense"] <= step
    check_launchers(base, tmp_path / "out", report)


@pytest.mark.parametrize("model_type", ["bert", pytest.param("distilbert", marks=pytest.mark.full)])
def test_a_uniform_run_drops_whole_layers(base, tmp_path, model_type):
    """Heads stay where the stock configuration cannot say fewer, so most of the model can only go layer by layer."""
    out = tmp_path / "out"
    report = run(base, out, model_type=model_type, uniform=True, target_sparsity=0.7, shrink="always", logging_steps=1)
    left = [r for r in report["structure"] if r["neurons"]]
    assert len(left) == 1 and left[0]["heads"] == 4 and [r["heads"] for r in report["structure"]].count(0) == 2
    assert report["parity"]["max_abs_logit_diff"] <= report["parity"]["tolerance"]
    for kind, layers in (("compact", "layer."), ("uniform", "layer.0.")):
        assert encoder_parameters_in(out / "exports" / kind, layers) == report["params"]["encoder_kept"]
        assert encoder_parameters_in(out / "exports" / kind) == report["params"]["encoder_kept"]
    from transformers import AutoModelForSequenceClassification

    stock = AutoModelForSequenceClassification.from_pretrained(out / "exports" / "uniform")
    assert type(stock).__module__.startswith("transformers.") and stock.config.num_hidden_layers == 1
    (ended,) = Ranks(["--run_dir", str(out), "--export_formats", "padded"], 1).wait()
    assert ended.code == 2 and "whole layers" in ended.text and "Traceback" not in ended.text


def check_launchers(base, out, report):
    """A format made again from what the run left, and every folder scored on two ranks like the run did."""
    shutil.rmtree(out / "exports" / "padded")
    (ended,) = Ranks(["--run_dir", str(out), "--export_formats", "padded"], 1).wait()
    assert ended.code == 0, ended.text[-2000:]
    data = ["--train_file", base / "many" / "train.csv", "--validation_file", base / "many" / "validation.csv"]
    for kind in ("compact", "padded", "uniform"):
        argv = ["--model_name_or_path", out / "exports" / kind, *data, "--max_seq_length", 32]
        assert run_ranks(runs.scored, 2, [str(a) for a in argv]) == [report["metric"]["exported"]] * 2


def test_peft_loads_the_adapter(base, tmp_path):
    peft_loads_the_adapter(base, tmp_path, "bert")


def peft_loads_the_adapter(base, tmp_path, model_type):
    model = os.path.relpath(base / model_type)  # which nobody finds from another folder
    report = run(
        base, tmp_path / "out", method="lora", export_formats="adapter", world_size=2, model_name_or_path=model
    )
    written = json.loads((tmp_path / "out" / "exports" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str((base / model_type).resolve())
    assert report["parity"]["max_abs_logit_diff"] <= report["parity"]["tolerance"]
    names = {p.name for p in (tmp_path / "out" / "exports" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "labels.json"} <= names
    assert json.loads((tmp_path / "out" / "exports" / "adapter" / "labels.json").read_text()) == ["bad", "good"]
    assert "library_name: peft" in (tmp_path / "out" / "exports" / "adapter" / "README.md").read_text()
    if model_type == "bert":
        check_predictions(base, tmp_path)
        check_a_second_run_starts_there(base, tmp_path)


def check_a_second_run_starts_there(base, tmp_path):
    """Sharded over two ranks, a run that is given the adapter answers at once as the run ended that had trained it."""
    given = {"adapter_name_or_path": tmp_path / "out" / "exports" / "adapter", "train_norms": True, "seed": 5}
    ended = [
        json.loads(line)["masked"]["logits"] for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    ]
    argv = arguments(base, tmp_path / "second", **given)
    for logits in run_ranks(runs.first_logits, 2, argv):
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(ended), atol=1e-5, rtol=1e-5)


def check_predictions(base, tmp_path):
    """Folders answer a file as the run answered its development set, the same on one rank and on two, to the last byte."""
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    labels = json.loads((tmp_path / "out" / "report.json").read_text())["labels"]
    expected = [labels[line["exported"]["prediction"]] for line in lines]
    argv = ["--input_file", base / "data" / "validation.csv", "--max_seq_length", 32, "--per_device_eval_batch_size", 8]
    for kind, more, worlds in (("compact", [], (1, 2)), ("adapter", ["--label_names", *labels], (2,))):
        texts = []
        for world_size in worlds:
            out = tmp_path / f"{kind}{world_size}.jsonl"
            words = ["--model_name_or_path", tmp_path / "out" / "exports" / kind, "--output_file", out, *argv, *more]
            assert run_ranks(runs.predicted, world_size, [str(w) for w in words]) == [0] * world_size
            texts.append(out.read_text())
        assert len(set(texts)) == 1
        found = [json.loads(line) for line in texts[0].splitlines()]
        assert [line["index"] for line in found] == list(range(300))
        assert [line["prediction"] for line in found] == expected
        shares = torch.tensor([[line["probabilities"][label] for label in labels] for line in found])
        logits = torch.tensor([line["exported"]["logits"] for line in lines])
        torch.testing.assert_close(shares, logits.softmax(1), atol=2e-6, rtol=0)
        assert shares[:, 0].std() > 1e-5  # rows in another order would show
    words = [
        "--model_name_or_path",
        tmp_path / "out/exports/compact",
        "--input_file",
        "-",
        "--output_file",
        tmp_path / "std.csv",
    ]
    words = [*map(str, words), "--max_seq_length", "32"]
    pair = '{"sentence1": "sun", "sentence2": "joy"}\n'
    assert run_ranks(runs.predicted, 2, words, pair * 70) == [0, 0]
    assert len((tmp_path / "std.csv").read_text().splitlines()) == 71
    (tmp_path / "std.csv").unlink()
    assert run_ranks(runs.predicted, 2, words, pair * 60 + "rain\n") == [2, 2]  # late, on one rank
    assert run_ranks(runs.predicted, 2, words, "sun joy\n" * 70) == [2, 2], "it was trained on pairs"
    (tmp_path / "rows.jsonl").write_text(pair + pair.replace('"sun"', "null"))
    words[words.index("--input_file") + 1] = str(tmp_path / "rows.jsonl")
    assert run_ranks(runs.predicted, 2, words) == [2, 2], "rank 0 alone reads"
    assert not list(tmp_path.glob("*std.csv*")) and not list(tmp_path.glob(".*"))


def test_a_latency_that_finds_no_memory_is_not_known(base, tmp_path):
    report = run(base, tmp_path / "out", world_size=1, latency_batch_size=2_000_000_000)
    assert report["status"] == "complete" and report["latency"]["exported_ms"] is None
    assert report["parity"]["examples"]


def test_statistics_of_an_earlier_run_go(base, tmp_path):
    old = tmp_path / "out" / "scores" / "3.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of other decisions")
    run(base, tmp_path / "out", world_size=1, method="lora")
    assert not old.exists()


def test_what_a_run_leaves_behind(base, tmp_path):
    out = tmp_path / "out"
    report = run(base, out, save_scores=True, eval_steps=5, logging_steps=2)
    assert encoder_parameters_in(out / "exports" / "compact") == report["params"]["encoder_kept"]
    names = {p.name for p in out.iterdir()} - {"ds.json"}
    assert names == {
        "report.json", "report.md", "report.html", "plan.json", "predictions.jsonl", "metrics.jsonl", "exports", "runs", "scores",
        "checkpoints", "run.json",
    }  # fmt: skip
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(300))
    accuracy = sum(line["exported"]["prediction"] == line["label"] for line in lines) / 300
    assert report["metric"]["exported"]["accuracy"] == pytest.approx(accuracy)
    assert report["metric"]["teacher"] and report["metric"]["masked"]["score"] <= 1
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in metrics} == {"dense", "prune", "recover", "teacher", "finish"}
    assert any("eval/score" in line for line in metrics)
    assert list((out / "runs").glob("events.*"))
    assert "pipeline_tag: text-classification" in (out / "exports" / "compact" / "README.md").read_text()
    import hashlib

    plan = json.loads((out / "plan.json").read_text())
    canonical = json.dumps(plan, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical).hexdigest() == report["plan_hash"]
    from safetensors.torch import load_file

    windows = [load_file(p) for p in (out / "scores").iterdir()]
    assert len(windows) == 2
    assert all(len(w["sample_ids"]) == w["count"].item() for w in windows)


def test_regression_and_macs_budget(base, tmp_path):
    report = run(base, tmp_path / "out", data="numbers", budget="macs", criterion="taylor", world_size=1)
    assert set(report["metric"]["masked"]) == {"pearson", "spearmanr", "r2", "score"}
    assert report["macs"]["kept"] / report["macs"]["dense"] == pytest.approx(0.5, abs=0.05)


FACTOR, SHIFT = 40.0, 1990.0


def predictions_of(out):
    lines = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
    return torch.tensor(
        [(line["label"], line["masked"]["prediction"], line["exported"]["prediction"]) for line in lines]
    )


@pytest.mark.parametrize("options", [{}, {"method": "lora", "export_formats": "adapter"}], ids=["cut", "adapter"])
def test_a_regression_does_not_depend_on_the_unit_of_its_labels(base, tmp_path, options):
    """Years are learnt like numbers around 1; the export gives years, and a run that starts from its head gives them at once."""
    tiny_data(base / "years", n_train=40, n_dev=40, regression=True, factor=FACTOR, shift=SHIFT)
    reports = [run(base, tmp_path / data, data=data, **options) for data in ("numbers", "years")]
    numbers, years = predictions_of(tmp_path / "numbers"), predictions_of(tmp_path / "years")
    torch.testing.assert_close((years - SHIFT) / FACTOR, numbers, atol=2e-3, rtol=0)
    assert reports[1]["metric"]["exported"] == pytest.approx(reports[0]["metric"]["exported"], abs=5e-3)
    if options:
        start = {"adapter_name_or_path": tmp_path / "years/exports/adapter", "model_name_or_path": base / "bert"}
        check_first_answers(base, tmp_path, years[:, 1], start)
        stock = run(base, tmp_path / "full", data="years", method="full")
        assert not stock["exports"]["compact"]["needs_remote_code"]
        start = {"model_name_or_path": tmp_path / "full/exports/compact"}
        check_first_answers(base, tmp_path, predictions_of(tmp_path / "full")[:, 1], start)


def check_first_answers(base, tmp_path, expected, start):
    files = {name: base / "years" / f"{name.removesuffix('_file')}.csv" for name in ("train_file", "validation_file")}
    for logits in run_ranks(runs.first_logits, 2, arguments(base, tmp_path / "next", **files, **start)):
        torch.testing.assert_close(torch.tensor(logits)[:, 0], expected, atol=2e-2, rtol=0)


def test_a_task_with_two_development_sets(base, tmp_path):
    """MNLI: each is measured, proven and written by itself, and the score is the mean of both."""
    write_official(tmp_path / "glue", "mnli", rows=18, more=5)
    out = tmp_path / "out"
    argv = arguments(base, out, batch=4, model_name_or_path=base / "bert", max_steps=6, per_device_eval_batch_size=4)
    argv = [word for word in argv if not word.endswith(".csv") and word not in ("--train_file", "--validation_file")]
    argv += ["--task_name", "mnli", "--data_dir", str(tmp_path / "glue")]
    assert run_ranks(runs.whole_run, 2, argv) == [0, 0]
    report, sets = json.loads((out / "report.json").read_text()), {"matched": 18, "mismatched": 23}
    reports.validate(report)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert {name: sum(line["split"] == name for line in lines) for name in sets} == sets
    assert report["parity"]["examples"] == 41
    for kind in ("masked", "exported"):
        found = report["metric"][kind]
        for name, count in sets.items():
            right = sum(line[kind]["prediction"] == line["label"] for line in lines if line["split"] == name)
            assert found[f"{name}/accuracy"] == pytest.approx(right / count)
        assert found["score"] == pytest.approx(sum(found[f"{name}/accuracy"] for name in sets) / 2)
    # The law's own number, of what was written.
    pairs = [(line["masked"]["logits"], line["exported"]["logits"]) for line in lines]
    worst = max(abs(a - b) for masked, exported in pairs for a, b in zip(masked, exported, strict=True))
    largest = max(abs(a) for masked, _ in pairs for a in masked)
    assert worst == pytest.approx(report["parity"]["max_abs_logit_diff"], abs=1e-7)
    assert worst <= report["parity"]["tolerance"] == pytest.approx(1e-4 * max(1, largest))


def test_options_that_shape_a_run(base, tmp_path):
    """Epochs instead of steps, a level learning rate while units are cut, groups of neurons, outer layers that are spared."""
    out = tmp_path / "out"
    options = {"lr_scheduler_type": "warmup_stable_decay", "neuron_multiple": 6, "keep_in_outer_layers": 0.75}
    options |= {"num_train_epochs": 3, "group_by_length": "false", "score_ema": 0.9, "warmup_ratio": 0.25}
    options |= {"distill_fades": "false", "target_sparsity": 0.3}
    argv = arguments(base, out, batch=8, logging_steps=1, model_name_or_path=base / "bert", **options)
    argv = argv[: (at := argv.index("--max_steps"))] + argv[at + 2 :]
    (found,) = run_ranks(runs.fit, 1, argv)
    rates = [line["learning_rate/adapters"] for line in found["learning_rates"]]
    assert len(rates) == 24, "three times 64 samples, 8 at a time"
    level = [i for i, rate in enumerate(rates) if rate == pytest.approx(3e-3)]
    assert level == list(range(5, 15)), "from the end of the warm-up to the last cut, after step 14"
    counts = found["counts"]
    assert all(row["neurons"] % 6 == 0 for row in counts) and sum(row["neurons"] for row in counts) < 3 * 48
    assert all(counts[i]["heads"] >= 3 and counts[i]["neurons"] >= 36 for i in (0, -1))
    assert found["score_decay"] == 0.9
    taught = [line["distillation/weight"] for line in found["lines"] if "distillation/loss" in line]
    assert taught and set(taught) == {0.5}


def test_a_criterion_without_gradients(base, tmp_path):
    another_criterion(base, tmp_path, "activation_norm")


def another_criterion(base, tmp_path, criterion):
    report = run(base, tmp_path / "out", criterion=criterion, world_size=1)
    assert report["criterion"] == criterion and report["sparsity"]["achieved"] > 0.4


def test_dropout_bf16_and_an_export_in_low_precision(base, tmp_path):
    """Dropout everywhere, the backbone's too; bf16: proven with parameters upcast, then cast; what is written
    predicts the same on all but 0.5 % of examples."""
    from safetensors.torch import load_file

    tiny_folder(tmp_path / "bert", "bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    AutoModel.from_pretrained(tmp_path / "bert", dtype=torch.bfloat16).save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    options = {"lora_dropout": 0.1, "dropout": True, "gradient_checkpointing": True}
    argv = arguments(base, out, batch=8, model_name_or_path=tmp_path / "bert", **options)
    config = json.loads((out / "ds.json").read_text()) | {"bf16": {"enabled": True}}
    (out / "ds.json").write_text(json.dumps(config))
    assert run_ranks(runs.whole_run, 2, argv) == [0, 0]
    report = json.loads((out / "report.json").read_text())
    assert report["dtype"] == "bf16" and report["parity"]["max_abs_logit_diff"] <= report["parity"]["tolerance"]
    folder = out / "exports" / "compact"
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    differ = sum(line["masked"]["prediction"] != line["exported"]["prediction"] for line in lines)
    assert differ <= 0.005 * len(lines)


@pytest.mark.parametrize("factor", [float("nan"), pytest.param(20.0, marks=pytest.mark.full)])
def test_an_export_that_computes_something_else_fails(base, tmp_path, factor):
    argv = arguments(base, tmp_path / "out", batch=8)
    assert run_ranks(_run_with_damaged_export, 2, argv, factor) == [3, 3]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["status"] == "failed"


def _run_with_damaged_export(argv, factor):
    from prunadapt_ds import export
    from prunadapt_ds.train import main

    honest = export.folded_scale
    export.folded_scale = lambda gate, cut, part: honest(gate, cut, part) * factor
    try:
        return main(argv)
    finally:
        export.folded_scale = honest


# -------------------------------------------------------------------------------------------------- launchers


def launch(command, timeout=300):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = str(ROOT)  # this checkout's package, also where another one is installed
    return subprocess.run(
        [str(c) for c in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def test_deepspeed_launcher(base, tmp_path):
    """That all launchers agree is in test_launchers.py."""
    done = launch(
        [*deepspeed("--num_accelerators", "2"), "launcher/train.py", *arguments(base, tmp_path / "out", batch=4)]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["status"] == "complete" and report["world_size"] == 2
    assert (report["launcher"], report["nodes"]) == ("deepspeed", 1)
    assert report["command"].startswith("deepspeed --num_accelerators 2 --module prunadapt_ds train ")


def test_two_ranks_one_message_and_exit_code_2(base, tmp_path):
    argv = arguments(base, tmp_path / "out", batch=4)
    (tmp_path / "out" / "ds.json").write_text(json.dumps({"train_batch_size": 7}))
    done = launch([*deepspeed("--num_accelerators", "2"), "launcher/train.py", *argv])
    assert done.returncode == 2
    text = done.stdout + done.stderr
    assert text.count("train_batch_size=7") == 1 and "Traceback" not in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"ds.json"}


def test_own_loop(base, tmp_path):
    """On two ranks: what is written is as small as it says, and loads."""
    out = tmp_path / "exported"
    (code, said), other = run_ranks(runs.example, 2, "examples/own_loop.py", str(base / "bert"), str(out))
    assert (code, other) == (None, (None, "")), "no exit code but that of a program that ends"
    kept, dense = (int(n.replace(",", "")) for n in re.search(r"kept ([\d,]+) of ([\d,]+) parameters", said).groups())
    assert kept == encoder_parameters_in(out) and abs(kept - dense / 2) <= 8 * 32 * 4
    model = AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True)
    assert torch.isfinite(model(torch.tensor([[2, 7, 3]])).logits).all()


# offload_nvme needs a disk of its own and libaio: in the full tier (test_matrix.py).
SHIPPED = [file.name for file in sorted((ROOT / "ds_configs").glob("*.json")) if "nvme" not in file.name]


@pytest.mark.parametrize("file", SHIPPED)
def test_the_shipped_files_train_and_shrink(base, tmp_path, file):
    options = {"model_name_or_path": base / "bert", "max_steps": 4, "num_decisions": 1, "shrink": "always"}
    argv = arguments(base, tmp_path / "out", batch=4, **options)
    argv[1] = f"ds_configs/{file}"
    for found in run_ranks(runs.fit, 2, argv):
        assert found["frozen_same"] and len(found["strangers"]) == 1 and len(set(found["losses"])) == 4


def test_own_data_and_a_pipeline_that_loads_its_export(base, tmp_path):
    """The example from a csv to answers, on two ranks; then its export in a process without this package."""
    (code, said), other = run_ranks(runs.example, 2, "examples/own_data.py", str(base / "bert"), str(tmp_path))
    assert (code, other) == (0, (0, "")) and "the concert was lovely: " in said and "of the encoder; accuracy" in said
    code = (
        "import sys; from transformers import pipeline;"
        f"p = pipeline('text-classification', model={str(tmp_path / 'run/exports/compact')!r}, trust_remote_code=True);"
        "print(p({'text': 'sun joy', 'text_pair': 'the day'})); assert 'prunadapt_ds' not in sys.modules"
    )
    done = launch([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'label': 'good'" in done.stdout or "'label': 'bad'" in done.stdout
