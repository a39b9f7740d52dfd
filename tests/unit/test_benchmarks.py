"""What the benchmarks compute beside running the trainer: folds, intervals, ratios."""

import json
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import checkpointing
import compare
import compare_table
import generation
import inference
import large
import loading
import ranks
import scaling
import step
import stored
import tune

from prunadapt_ds import report
from prunadapt_ds.config import parse
from prunadapt_ds.models.families import FAMILIES
from tests.tiny import layout_and_structure, tiny_model

pytestmark = pytest.mark.fast


def run(seed=0, correct=0.8, size=200, **more):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, size)
    predictions = np.where(draw.random(size) < correct, labels, 1 - labels)
    found = {"seed": seed, "predictions": predictions.tolist(), "labels": labels.tolist(), "train_s": 10.0}
    score = compare_table.score("rte", predictions, labels)
    return {**found, "metric": {"score": score}, "live_bytes": 4, "live_after": 2, "peak_bytes": 8, **more}


def write(folder, task, method, found):
    (folder / f"{task}-{method}-{found['seed']}.json").write_text(json.dumps({**found, "task": task, "method": method}))


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("task", ["cola", "mrpc", "rte", "stsb"])
def test_the_quick_scores_are_the_task_s_measures(task, constant):
    from prunadapt_ds.data.metrics import compute_metrics
    from prunadapt_ds.data.tasks import TASKS

    draw = np.random.default_rng(0)
    regression = task == "stsb"
    labels = draw.random(50) if regression else draw.integers(0, 2, 50)
    predictions = labels + draw.random(50) if regression else draw.integers(0, 2, 50)
    predictions = 0 * predictions if constant else predictions
    logits = predictions[:, None] if regression else np.eye(2)[predictions]
    expected = compute_metrics(TASKS[task], logits, labels)["score"]
    assert compare_table.score(task, predictions, labels) == pytest.approx(expected)


def test_folds_hold_every_training_example_once(tmp_path):
    rows = [f"src\t{i % 2}\t\tsentence {i}\n" for i in range(23)]
    (tmp_path / "GLUE/CoLA").mkdir(parents=True)
    (tmp_path / "GLUE/CoLA/train.tsv").write_text("".join(rows))
    held_out = []
    for fold in range(tune.FOLDS):
        folder = tune.fold_folder(tmp_path / "GLUE", tmp_path / "work", "cola", fold) / "CoLA"
        train, dev = ((folder / f"{name}.tsv").read_text().splitlines(keepends=True) for name in ("train", "dev"))
        assert sorted(train + dev) == sorted(rows)
        held_out += dev
    assert sorted(held_out) == sorted(rows)


def test_a_run_compared_with_itself_is_exactly_as_good():
    both = compare_table.bootstrap("rte", [run()], [run()])
    assert (both[0] == both[1]).all() and both[0].std() > 0


def test_what_both_get_right_does_not_widen_the_interval():
    ours, base = run(correct=0.8), run(correct=0.7)
    both = compare_table.bootstrap("rte", [ours], [base])
    apart = np.std(both[0]) ** 2 + np.std(both[1]) ** 2  # of examples that are drawn for each by itself
    assert np.std(both[0] - both[1]) ** 2 < 0.9 * apart


def regression(method, labels, **more):
    predictions = np.linspace(0, 5, len(labels)).tolist()
    return run(labels=labels, predictions=predictions, task="stsb", method=method, **more)


LABELS, IN_BF16 = [3.2, 1.583, 5.0, 0.0], [3.203125, 1.5859375, 5.0, 0.0]


def test_labels_that_older_results_rounded_are_the_others(tmp_path):
    """Examples are paired only if the labels are equal. HF Trainer rounded to bf16, ours to fp32."""
    in_fp32 = np.array(LABELS, np.float32).tolist()
    assert in_fp32 != LABELS
    cells = {"peft": IN_BF16, "ours@0.6": LABELS, "ours@0.8": in_fp32, "trainer-full": IN_BF16}
    for method, labels in cells.items():
        write(tmp_path, "stsb", method, regression(method, labels))
    loaded = compare_table.load(tmp_path)["stsb"]
    assert [loaded[method][0]["labels"] for method in cells] == [LABELS] * 4


@pytest.mark.parametrize(
    "method, labels",
    [("peft", LABELS[::-1]), ("peft", LABELS[:3]), ("ours@0.8", IN_BF16), ("peft", [3.2, 1.6, 5.0, 0.0])],
    ids=["another order", "fewer", "rounded by ours", "further than rounding"],
)
def test_other_labels_are_refused(method, labels, tmp_path):
    for name, found in (("ours@0.6", LABELS), (method, labels)):
        write(tmp_path, "stsb", name, regression(name, found))
    with pytest.raises(ValueError, match=f"stsb-ours@0.6-0 and stsb-{method}-0 have different labels"):
        compare_table.load(tmp_path)


def test_time_until_is_the_first_crossing():
    followed = {"scores": [[10, 1.0, 0.5], [20, 2.0, 0.8], [30, 3.0, 0.7]]}
    assert compare_table.seconds_until(followed, 0.75) == 2.0
    assert compare_table.seconds_until(followed, 0.9) is None and compare_table.seconds_until({}, 0.1) is None


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--methods", "fischer@0.6"], "--methods fischer@0.6: unknown"),
        (["--methods", "peft+teacher", "ours@0.6+typo"], "peft+teacher: unknown; --methods ours@0.6+typo: unknown"),
        (["--tasks", "mnly"], "--tasks mnly: not one of mrpc"),
        (["--tasks", "mrpc"], "--data_dir: name the folder"),
    ],
)
def test_mistakes_are_said_before_the_first_run(argv, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["compare.py", *argv, "--results", str(tmp_path / "results")])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_a_run_s_latencies_are_those_of_its_report(tmp_path):
    found = report.empty()
    for part in (found["params"], found["macs"], found["memory"]["peak_rank_bytes"], found["latency"]):
        part |= dict.fromkeys(part, 2.0)
    found["latency"] |= {"dense_ms_batch_1": 8.0, "exported_ms_batch_1": 4.0, "dense_ms": 10.0, "exported_ms": 2.0}
    (tmp_path / "report.json").write_text(json.dumps(found))
    line = {"split": "validation", "label": 1, "exported": {"prediction": 0}}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "metrics.jsonl").touch()
    cell = compare.collect("ours@0.6", tmp_path)
    assert cell["latency_batch_1"] == 0.5 and cell["latency"] == 0.2
    assert cell["predictions"] == [0] and cell["labels"] == [1]
    found["latency"] |= {"dense_ms": None, "exported_ms": None}  # there was no memory for the dense model
    (tmp_path / "report.json").write_text(json.dumps(found))
    assert compare.collect("ours@0.6", tmp_path)["latency"] is None


def test_table_and_picture_from_a_results_folder(tmp_path):
    base = run(train_cpu_s=8.0, scores=[[1, 1.0, 0.9]], steady_step_s=0.5)
    ours = run(train_cpu_s=4.0, scores=[[1, 0.5, 0.9]], last_step_s=0.2)
    ours |= {"params": 0.4, "macs": 0.42, "latency": 0.5, "latency_batch_1": 0.6}
    for method, found in (("ours@0.6", ours), ("peft", base)):
        write(tmp_path, "rte", method, found)
    results = compare_table.load(tmp_path)
    text, _ = compare_table.tables(results)
    lines = text.splitlines()
    assert len(lines) == 2 + 2, "a line per task and method that ran"
    row = next(line for line in lines if "rte | ours@0.6" in line)
    assert (
        "| 1.000 | 1.000 to 1.000 | 0.50 | 1.00 | 0.40 | 0.50 | 0.50 / 1.00 | 1.00 | 0.40 | 0.42 | 0.60 | 0.50 |" in row
    )
    for method, found in (
        ("peft", base),
        ("ours@0.6", ours),
        ("ours@0.6+teacher", ours),
        ("ours@0.6+teacher-stays", ours),
    ):
        write(tmp_path, "wnli", method, found)
    results = compare_table.load(tmp_path, ("wnli", "rte"), ("peft", "ours@0.6", "tmp"))
    assert [*results] == ["wnli", "rte"] and [*results["rte"]] == [
        "peft",
        "ours@0.6",
        "ours@0.6+teacher",
        "ours@0.6+teacher-stays",
    ]
    assert {method: len(runs) for method, runs in results["wnli"].items()} == dict.fromkeys(results["rte"], 1)
    both, averages = compare_table.tables(results)
    rows = averages.splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| **average**", m] for m in ("peft", "ours@0.6")]
    assert "rte | ours@0.6" in both and both.count("**average**") == 2, "of methods that ran on every task"
    assert "| 0.40 | 0.50 / 1.00 | 1.00 | 0.40 | 0.42 | 0.60 | 0.50 |" in rows[1]
    compare_table.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize("asked", [["--tasks", "mrpc"], ["--methods", "tmp"]])
def test_the_table_has_all_that_the_folder_holds_whatever_is_asked_for(asked, monkeypatch, capsys, tmp_path):
    for task in ("rte", "wnli"):
        for method in ("peft", "ours@0.6"):
            write(tmp_path, task, method, run(params=0.4))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--table_only", *asked, "--results", str(tmp_path)])
    compare.main()
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {task} | {method} |" in table for task in ("rte", "wnli") for method in ("peft", "ours@0.6"))


def test_a_folder_without_results_is_not_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--table_only", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="no results to draw"):
        compare.main()
    assert not (tmp_path / "table.md").exists()


def test_the_table_of_the_search_has_all_that_the_folder_holds(tmp_path):
    scores = {"cola-today-f0-s0": 0.2, "cola-today-f0-s1": 0.3, "rte-today-f1-s0": 0.5, "rte-no-longer-here-f0-s0": 0.6}
    for name, score in scores.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"metric": {"score": score}}))
    assert tune.table(tmp_path).splitlines() == [
        "| variant | cola | rte | mean | runs |",
        "|---|---:|---:|---:|---:|",
        "| today | 25.0 | 50.0 | 37.50 | 3 |",
        "| no-longer-here |  | 60.0 |  | 1 |",
    ]


def test_times_of_runs_that_shared_a_machine_are_nobody_s_figure(tmp_path):
    shared = {"workers": 8, "train_s": 3.0, "step_s": 0.1, "latency": 0.9, "params": 0.4, "macs": 0.4}
    shared["latency_batch_1"] = 0.95
    for method in ("peft", "ours@0.6"):
        write(tmp_path, "rte", method, run(**(shared if method != "peft" else {"workers": 8})))
    results = compare_table.load(tmp_path)
    text, _ = compare_table.tables(results)
    assert "time" not in text and "latency" not in text and "| 1.000 | 1.000 to 1.000 | 0.50 / 1.00 |" in text
    compare_table.draw(results, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_steps_of_large_models_beside_peft_s(tmp_path):
    setting = {"batch_size": 4, "seq_length": 100}
    row = {"sparsity": 0.0, "record": False, "step_s": 0.5, "live_bytes": 2**31, "peak_bytes": 2**32}
    ours = [{**row, "macs": 10**9, "record": True}, {**row, "macs": 10**9, "sparsity": 0.5, "step_s": 0.25}]
    (tmp_path / "1b-peft.json").write_text(json.dumps({"rows": [row], **setting}))
    (alone,) = large.table(tmp_path).splitlines()[2:]
    assert alone == "| 1b | peft | 0.500 | 1.00 | 800 | - | 2.00 | 1.00 | 4.00 | 1.00 |"
    (tmp_path / "1b-ours.json").write_text(json.dumps({"rows": ours, "flops_per_s": 64e9, **setting}))
    peft, gates, half = large.table(tmp_path).splitlines()[2:]
    assert peft == "| 1b | peft | 0.500 | 1.00 | 800 | 50% | 2.00 | 1.00 | 4.00 | 1.00 |"
    assert gates.startswith("| 1b | gates, recording | 0.500 |")
    assert half.startswith("| 1b | ours, 50% gone | 0.250 | 0.50 | 1,600 | 100% |")


def test_tokens_of_each_model_beside_the_first_one_s():  # two million parameters, one of which in projections
    rows = [
        {"model": name, "batch": batch, "prompt_s": seconds, "token_s": seconds / 10, "parameters": 2e6, "macs": 1e6}
        for batch in (1, 32)
        for name, seconds in (("dense", 0.01 * batch), ("compact", 0.005 * batch))
    ]
    assert generation.table(rows).splitlines()[3] == "| compact | 2 | 1.00 | 1 | 5.00 | 0.50 | 0.50 | 0.50 |"
    assert generation.table(rows).splitlines()[4] == "| dense | 2 | 1.00 | 32 | 320.00 | 1.00 | 32.00 | 1.00 |"


def test_the_base_s_learning_rate_is_the_default_for_the_model_s_width():
    assert parse(compare.options_of("peft")).train.learning_rate is None


def test_the_base_s_clock_begins_with_its_first_step_and_its_steady_peak_after_it(monkeypatch):
    import peft_trainer

    now, peaks = iter(range(100, 200, 10)), iter((7, 5))
    clock = SimpleNamespace(perf_counter=lambda: next(now), process_time=lambda: 0.0)
    monkeypatch.setattr(peft_trainer, "time", clock)
    monkeypatch.setattr(peft_trainer.Trainer, "training_step", lambda *_: "loss")
    trainer = object.__new__(peft_trainer.Watched)
    reset = []
    trainer.starts, trainer.longest = [], 8
    trainer.peak = SimpleNamespace(bytes=lambda: next(peaks), reset=lambda: reset.append(len(trainer.starts)))
    for _ in range(3):
        assert trainer.training_step(None, {"input_ids": np.zeros((2, 8))}) == "loss"
    assert trainer.start == 100 and trainer.starts == [10, 20, 30], "what came before is not training time"
    assert reset == [2] and trainer.first_peak == 7, "at the start of the second step"


@pytest.mark.parametrize("method", [*compare.METHODS, *(f"ours@0.6+{name}" for name in compare.VARIANTS)])
def test_every_method_s_options_are_the_trainer_s(method):
    parse(compare.options_of(method))


@pytest.mark.parametrize("variant", tune.VARIANTS)
def test_every_variant_s_options_are_the_trainer_s(variant):
    parse([word for name, value in tune.options_of(variant).items() for word in (f"--{name}", str(value))])


def test_the_share_of_checkpoints_and_whether_it_is_small_enough():
    saves = [{"step": 10, "seconds": 0.5}, {"step": 20, "seconds": 0.7}, {"step": 30, "seconds": 0.6}]
    found = {"ranks": 2, "steps": 30, "saves": saves, "wall": {"train_s": 180.0, "checkpoint_s": 1.8}}
    runs = {
        "small": {**found, "cpu": {"train_s": 100.0, "checkpoint_s": 1.9}},
        "large": {**found, "cpu": {"train_s": 100.0, "checkpoint_s": 2.0}},
    }
    small, large = checkpointing.table(runs).splitlines()[2:]
    assert small == "| small | 2 | 30 | 180.0 | 3 | 0.600 | 1.00% | 1.90% | yes |"
    assert large.endswith("| 2.00% | no |")


def asked_of_compare(results, *more):
    return ["compare.py", "--data_dir", "GLUE", "--tasks", "rte", "--methods", "peft", "--results", str(results), *more]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--epochs", "5"], "epochs is 3 there, and 5.0 is asked for"),
        (["--dtype", "bf16"], "dtype is 'fp32' there, and 'bf16' is asked for"),
        (["--model", "other/encoder"], "model is 'sample' there, and 'other/encoder' is asked for"),
        (["--max_train_samples", "64"], "max_train_samples is None there, and 64 is asked for"),
        (["--evaluations", "24"], "evaluations is 0 there, and 24 is asked for"),
        (["--ranks", "4"], "ranks is 2 there, and 4 is asked for"),
        (["--batch_size", "8"], "batch_size is 16 there, and 8 is asked for"),
    ],
)
def test_a_result_of_other_settings_is_not_taken_for_the_cell_s(argv, said, monkeypatch, capsys, tmp_path):
    args = {"epochs": 3, "ranks": 2, "batch_size": 16, "dtype": "fp32", "model": "sample"}
    result = run(**args, max_train_samples=None, evaluations=0)
    (tmp_path / "rte-peft-0.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", asked_of_compare(tmp_path, "--dtype", "fp32", "--dry_run"))
    compare.main()
    assert "0 runs" in capsys.readouterr().out, "of the same settings it counts"
    monkeypatch.setattr(sys, "argv", asked_of_compare(tmp_path, "--dtype", "fp32", "--dry_run", *argv))
    with pytest.raises(SystemExit) as ended:
        compare.main()
    message = capsys.readouterr().err
    assert ended.value.code == 2 and f"rte-peft-0.json: {said}" in message and "name another --results" in message


OLDER_COMPARISONS = {  # what the pages say of how they were measured
    "compare": [],
    "compare_fp32": ["--dtype", "fp32"],
    "compare_gpu": ["--ranks", "1", "--batch_size", "32"],
    "compare_jemalloc": ["--epochs", "2", "--max_train_samples", "640"],
    "compare_sst2": ["--dtype", "bf16", "--max_train_samples", "10000"],
    "compare_bf16": ["--dtype", "bf16", "--evaluations", "24"],
    "ablation": ["--dtype", "bf16"],
}


@pytest.mark.parametrize("folder", OLDER_COMPARISONS)
def test_results_that_hold_fewer_settings_still_count(folder, monkeypatch, capsys):
    results = compare.ROOT / "benchmarks/results" / folder
    every = [json.loads(path.read_text()) for path in results.glob("*.json")]
    older = [run for run in every if "evaluations" not in run]
    tasks, methods, seeds = (sorted({str(run[name]) for run in older}) for name in ("task", "method", "seed"))
    argv = ["--data_dir", "GLUE", "--dry_run", "--results", str(results), *OLDER_COMPARISONS[folder]]
    asked = ["--seeds", *seeds, "--tasks", *tasks, "--methods", *methods]
    monkeypatch.setattr(sys, "argv", ["compare.py", *argv, *asked])
    compare.main()
    cells = product(tasks, methods, seeds)
    missing = sum(not (results / f"{'-'.join(cell)}.json").exists() for cell in cells)
    assert older
    assert f"\n{missing} runs" in capsys.readouterr().out


def test_the_steps_of_an_older_result_tell_how_many_examples_it_had(monkeypatch, capsys):
    results = compare.ROOT / "benchmarks/results/compare_sst2"
    monkeypatch.setattr(
        sys, "argv", ["compare.py", "--dry_run", "--tasks", "sst2", "--methods", "peft", "--results", str(results)]
    )
    with pytest.raises(SystemExit):
        compare.main()
    assert "steps is 939 there, and 6315 is asked for" in capsys.readouterr().err


def test_many_differences_are_counted(tmp_path):
    paths = [tmp_path / f"{i}.json" for i in range(9)]
    for path in paths:
        path.write_text(json.dumps({"batch_size": 16, "newer": 1}))
    assert stored.refusal({path: {"batch_size": 16, "older": 1} for path in paths}) == ""
    message = stored.refusal({path: {"batch_size": 8} for path in [*paths, tmp_path / "none.json"]})
    assert message.count("batch_size is 16 there, and 8 is asked for") == 5 and "and 4 more" in message


@pytest.mark.parametrize("method", ["peft", "ours@0.6"])
def test_a_cell_begins_anew_whatever_its_work_folder_holds(method, monkeypatch, tmp_path):
    """`--resume auto` would end at once with the report of an earlier run."""
    lines = []
    monkeypatch.setattr(
        compare.subprocess, "run", lambda line, **_: lines.append(line) or SimpleNamespace(returncode=1)
    )
    argv = asked_of_compare(tmp_path / "results", "--work_dir", str(tmp_path / "work"), "--methods", method)
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        compare.main()
    (line,) = lines
    assert line[line.index("--resume") + 1] == "never"


def test_scaling_refuses_another_sparsity_and_a_batch_that_ranks_cannot_share(monkeypatch, capsys, tmp_path):
    for name, found in (
        ("sample-1", {"sparsity": 0.6, "batch_size": 32}),
        ("sample-2", {}),
    ):  # an older one states neither
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    argv = ["scaling.py", "--sizes", "sample", "--ranks", "1", "2", "4", "--dry_run", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    scaling.main()
    assert capsys.readouterr().out.startswith("sample on 4 ranks\n1 runs")
    for more, said in (
        (["--sparsity", "0.8"], "sample-1.json: sparsity is 0.6 there, and 0.8 is asked for"),
        (["--batch_size", "64"], "sample-1.json: batch_size is 32 there, and 64 is asked for"),
        (["--batch_size", "30"], "--batch_size 30: 4 ranks cannot share it evenly"),
    ):
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        with pytest.raises(SystemExit):
            scaling.main()
        assert said in capsys.readouterr().err


def test_a_step_is_measured_into_the_folder_that_is_named_from_here(monkeypatch, tmp_path):
    """Its ranks run in the root of the repository."""
    commands = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    monkeypatch.setattr(step.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(sys, "argv", ["step.py", "--results", "found", "--model", "encoder"])
    step.main()
    (command,) = commands
    assert str(tmp_path / "found/batch16-ranks2.json") in command and str(tmp_path / "encoder") in command


def test_a_hub_s_model_and_the_sample_keep_their_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample").mkdir()
    assert [ranks.from_anywhere(name) for name in ("sample", "owner/model")] == ["sample", "owner/model"]


@pytest.mark.parametrize("program", [generation, loading])
def test_a_work_folder_that_exists_is_not_removed(program, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["program", "--work_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        program.main()
    assert "name a new folder" in capsys.readouterr().err and tmp_path.exists()


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_latency_is_held_against_the_macs_of_every_family(model_type):
    """Grouped or fused projections, projections of positions, a tail that stays: as the budget counts them."""
    dense = tiny_model(model_type)
    layout, structure = layout_and_structure(dense, 24)
    kept = [[sub.num_units - 1 for sub in layout.sublayers] for _ in range(layout.num_layers)]
    pruned = {"layout": layout.to_dict(), "kept": kept}
    found = inference.macs(SimpleNamespace(config=SimpleNamespace(pruned_structure=pruned)), dense, 24)
    assert 0.5 < found < 1
    assert found == structure.cost("macs", [n for row in kept for n in row]) / structure.dense_cost("macs")
    assert inference.macs(dense, dense, 24) == 1, "a folder of a stock class"


@pytest.mark.parametrize(
    "name, sent", [("all_gather_into_tensor", 3), ("reduce_scatter_tensor", 0.75), ("all_reduce", 1.5)]
)
def test_what_each_of_four_ranks_sends(name, sent):
    assert scaling.sent_share(name, 4) == sent and scaling.sent_share(name, 1) == 0
