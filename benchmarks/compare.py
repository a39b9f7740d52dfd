"""Compares ours with the usual alternatives: same data, epochs, batch size and seeds, on real ranks.

    python benchmarks/compare.py --data_dir GLUE [--tasks mrpc rte stsb cola] [--methods peft ours@0.6 ...] [--seeds 0 1 2]

Methods: `peft` (HF Trainer, PEFT LoRA, ZeRO-3), `trainer-full` (the same with full fine-tuning), `lora`, `tmp`, `ours@S`, and
a single cut in the middle of LoRA training: `fisher@S`, `magnitude@S`, `random@S`. All but `trainer-full`, which has 5e-5, have
the default learning rate for the model's width. Existing results are kept, so an
interrupted comparison can be continued, with the run that it was at from its beginning; results of other settings are refused.
The table shows all that the results folder holds. `--dry_run` prints what would run and for how long; `--table_only` only draws
existing results. `--evaluations N` computes the development score N times per run, for the time until 97 % of the base's final
score. `--workers N` runs N runs at a time if the machine has room; their scores count, but their times do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import mean

import compare_table
import stored
from compare_table import OF_HF_TRAINER
from ranks import ROOT, deepspeed, from_anywhere

METHODS = ("peft", "fisher@0.6", "ours@0.6", "fisher@0.8", "ours@0.8", "ours@0.5", "ours@0.9", "ours@0.95")
METHODS += ("ours@0.8+5-epochs", "lora", "tmp", "random@0.6", "magnitude@0.6", "trainer-full")
Cell = tuple[int, str, str]  # seed, task, method
VARIANTS = {  # "ours@0.6+teacher": the defaults with one ingredient changed
    "teacher": ["--distill_weight", "0.5"],
    "any-teacher": ["--distill_weight", "0.5", "--distill_min_r2", "-1000"],
    "5-epochs": ["--num_train_epochs", "5"],  # a use for the time saved
    "teacher-stays": ["--distill_weight", "0.5", "--distill_fades", "false"],
    "frozen-norms": ["--train_norms", "false"],
    "no-gates": ["--gate_learning_rate", "1e-9"],
    "newest-scores": ["--score_ema", "0"],
    "masked-to-the-end": ["--shrink", "never"],
}
ORDERS = ("fisher", "magnitude", "random")  # criteria of the methods with one cut
ONE_CUT: dict[str, object] = {  # plain LoRA, one cut, plain LoRA
    "prune_start": 0.3,
    "prune_end": 0.5,
    "num_decisions": 1,
    "gate_learning_rate": 1e-9,
    "train_norms": "false",
}
ROWS = {"mrpc": 3668, "rte": 2490, "stsb": 5749, "cola": 8551, "sst2": 67349, "wnli": 635}  # training examples
ROWS |= {"qnli": 104743, "qqp": 363846, "mnli": 392702}


def mistakes(args: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments: found before the first of many runs."""
    plain = {m for m in METHODS if "@" not in m}
    cut = re.compile(rf"(ours|{'|'.join(ORDERS)})@0?\.\d+|ours@0?\.\d+\+({'|'.join(VARIANTS)})")
    found = [f"--methods {m}: unknown" for m in args.methods if m not in plain and not cut.fullmatch(m)]
    found += [f"--tasks {t}: not one of {' '.join(ROWS)}" for t in args.tasks if t not in ROWS]
    if not (args.data_dir or args.dry_run or args.table_only):
        found.append("--data_dir: name the folder of the official GLUE TSVs")
    return found


def options_of(method: str) -> list[str]:
    """The trainer's options for this method."""
    method, _, variant = method.partition("+")
    name, _, sparsity = method.partition("@")
    if name in ("lora", "tmp"):
        return ["--method", name]
    if (
        name == "peft"
    ):  # at our default rate, for the sample the better of the two that results/tuning tried for plain LoRA
        return ["--method", "lora"]
    if name == "trainer-full":
        return ["--method", "full", "--learning_rate", "5e-5"]
    options = ["--target_sparsity", sparsity]
    if name in ORDERS:
        options += ["--criterion", name, "--shrink", "always"]
        options += [word for option, value in ONE_CUT.items() for word in (f"--{option}", str(value))]
    return options + (VARIANTS[variant] if variant else [])


def epochs_of(method: str, args: argparse.Namespace) -> float:
    """Epochs of a run: a variant may have its own."""
    return float(dict(pairwise(options_of(method))).get("--num_train_epochs", args.epochs))


def result_of(seed: int, task: str, method: str, args: argparse.Namespace) -> Path:
    return args.results / f"{task}-{method}-{seed}.json"


def settings(method: str, args: argparse.Namespace) -> dict[str, object]:
    """What a cell is measured with, as its result states it. A result of other settings does not count as this cell's."""
    others = ("ranks", "batch_size", "dtype", "model", "max_train_samples", "evaluations")
    return {"epochs": epochs_of(method, args), **{name: getattr(args, name) for name in others}}


def steps(task: str, method: str, args: argparse.Namespace) -> int:
    """Steps of a run on GLUE's own training set."""
    examples = min(ROWS[task], args.max_train_samples or ROWS[task])
    return int(math.ceil(examples / (args.batch_size * args.ranks)) * epochs_of(method, args))


def refusal(cells: list[Cell], args: argparse.Namespace) -> str:
    """Why results that are there cannot count as these cells; empty if they can."""
    asked = {}
    for seed, task, method in cells:
        path = result_of(seed, task, method, args)
        asked[path] = settings(method, args)
        if path.exists() and "max_train_samples" not in json.loads(path.read_text()):  # an older one, whose steps tell
            asked[path]["steps"] = steps(task, method, args)
    return stored.refusal(asked)


def command(method: str, task: str, seed: int, args: argparse.Namespace, output: Path, port: int) -> list[str]:
    script = "benchmarks/peft_trainer.py" if method in OF_HF_TRAINER else "launcher/train.py"
    options = ["--ds_config", str(args.work_dir / "zero3.json"), "--model_name_or_path", from_anywhere(args.model)]
    options += ["--task_name", task, "--data_dir", args.data_dir, "--num_train_epochs", str(args.epochs)]
    options += ["--seed", str(seed), "--output_dir", str(output), "--resume", "never", *options_of(method)]
    options += ["--per_device_train_batch_size", str(args.batch_size)]
    if args.max_train_samples:
        options += ["--max_train_samples", str(args.max_train_samples)]
    if args.evaluations:
        options += ["--eval_steps", str(max(1, steps(task, method, args) // args.evaluations))]
    return [*deepspeed(args.ranks, "--master_port", str(port)), str(ROOT / script), *options]


def collect(method: str, output: Path) -> dict:
    """One run's result in a form common to both programs."""
    if method in OF_HF_TRAINER:
        found = json.loads((output / "result.json").read_text())
        predictions = next(iter(found.pop("predictions").values()))
        return {**found, "live_after": found["live_bytes"], "predictions": predictions[0], "labels": predictions[1]}
    report = json.loads((output / "report.json").read_text())
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    first = [line for line in lines if line["split"] == lines[0]["split"]]
    live, peak = report["memory"]["live_tensor_bytes"], report["memory"]["peak_rank_bytes"]
    latency = report["latency"]

    def faster(batch: str) -> float | None:
        """Latency of the export as a ratio to the dense model's; None if it was not measured."""
        dense, exported = latency[f"dense_ms{batch}"], latency[f"exported_ms{batch}"]
        return exported / dense if dense and exported else None

    metrics_log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "metric": report["metric"]["exported"],
        "train_s": report["time"]["train_s"],
        "train_cpu_s": report["time"]["train_cpu_s"],
        "step_s": report["time"]["dense_step_s"],
        "last_step_s": report["time"]["last_step_s"],
        "device": report["device"],
        "scores": [
            [x["step"], x["time/train(s)"], x["eval/score"]]
            for x in metrics_log
            if "time/train(s)" in x and "eval/score" in x
        ],
        "time": report["time"],
        "steps": report["time"]["steps"],
        "live_bytes": live["dense"] or live["after_shrink"],
        "live_after": live["after_shrink"] or live["dense"],
        "peak_bytes": max(v for v in peak.values() if v is not None),
        "params": report["params"]["encoder_kept"] / report["params"]["encoder_dense"],
        "macs": report["macs"]["kept"] / report["macs"]["dense"],
        "latency_batch_1": faster("_batch_1"),
        "latency": faster(""),
        "teacher": (report["metric"]["teacher"] or {}).get("score"),
        "structure": report["structure"],
        "curve": [[x["step"], x["samples/s"], x["train/loss"]] for x in metrics_log if "samples/s" in x],
        "predictions": [line["exported"]["prediction"] for line in first],
        "labels": [line["label"] for line in first],
    }


def commit() -> str:
    line = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def run(seed: int, task: str, method: str, args: argparse.Namespace, ports: queue.SimpleQueue[int]) -> bool:
    """Run one cell of the grid, on a port of its own; whether it ended well. A failure is printed, and the other cells continue."""
    path = result_of(seed, task, method, args)
    output, port = args.work_dir / path.stem, ports.get()
    output.mkdir(parents=True, exist_ok=True)
    # On a busy machine, importing a trainer may take longer than the default timeout for a missing rank.
    environment = {"PRUNADAPT_RENDEZVOUS_SECONDS": "180", **os.environ, "PYTHONPATH": str(ROOT)}
    try:
        with (output / "log.txt").open("w") as log:
            line = command(method, task, seed, args, output, port)
            code = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=output).returncode
    finally:  # or the next cell would wait for it for ever
        ports.put(port)
    if code:
        print(f"{path.stem}: failed with exit code {code}, see {output / 'log.txt'}", flush=True)
        return False
    result = {"task": task, "method": method, "seed": seed, **settings(method, args)}
    result |= {"commit": commit(), "workers": args.workers, **collect(method, output)}
    path.write_text(json.dumps(result) + "\n")
    print(f"{path.stem}: {100 * result['metric']['score']:.1f} in {result['train_s']:.0f} s", flush=True)
    return True


def write_ds_config(args: argparse.Namespace) -> None:
    """Write the ZeRO-3 configuration that both programs use, with the requested dtype."""
    values = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    if args.dtype != "auto":
        values["bf16"]["enabled"] = args.dtype == "bf16"
    args.work_dir.mkdir(parents=True, exist_ok=True)
    (args.work_dir / "zero3.json").write_text(json.dumps(values))


def into_readme(text: str) -> None:
    path, marks = ROOT / "README.md", ("<!-- compare: begin -->", "<!-- compare: end -->")
    before, _, rest = path.read_text().partition(marks[0])
    _, _, after = rest.partition(marks[1])
    path.write_text(f"{before}{marks[0]}\n{text}{marks[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="official GLUE TSVs, one folder per task")
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "rte", "stsb", "cola"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16, help="per rank")
    parser.add_argument("--evaluations", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--model", default="sample")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where it is fast")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--master_port", type=int, default=29511)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/compare")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs/compare")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--table_only", action="store_true")
    parser.add_argument("--readme", action="store_true", help="write the averages into README.md, between the marks")
    args = parser.parse_args()
    if problems := mistakes(args):
        parser.error("; ".join(problems))
    args.work_dir = args.work_dir.resolve()  # each run has its own working directory
    if args.data_dir:
        args.data_dir = str(Path(args.data_dir).resolve())
    cells = [(s, t, m) for s in args.seeds for t in args.tasks for m in args.methods]
    if not args.table_only and (problem := refusal(cells, args)):
        parser.error(problem)
    args.results.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells if not result_of(*cell, args).exists()]
    if args.dry_run:
        done = [json.loads(p.read_text())["train_s"] for p in args.results.glob("*-*-*.json")]
        guess = f"{len(todo) * (mean(done) + 60) / 3600:.1f} h" if done else "unknown before a first run"
        print("\n".join(f"{t} {m} seed {s}" for s, t, m in todo) + f"\n{len(todo)} runs, estimated {guess}")
        return
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    for worker in range(args.workers):
        ports.put(args.master_port + worker)
    write_ds_config(args)
    with ThreadPoolExecutor(args.workers) as workers:
        ended = list(workers.map(lambda cell: run(*cell, args, ports), [] if args.table_only else todo))
    results = compare_table.load(args.results, tuple(ROWS), METHODS)
    if not results:
        sys.exit(f"{args.results}: no results to draw")
    text, headline = compare_table.tables(results)
    (args.results / "table.md").write_text(text)
    compare_table.draw(results, args.results / "trade_off.png")
    if args.readme:
        into_readme(headline)
    print(text)
    if not all(ended):
        sys.exit(1)


if __name__ == "__main__":
    main()
