"""Ours beside what a user would take instead: same data, epochs, batch and seeds, on real ranks.

    python benchmarks/compare.py --data_dir GLUE [--tasks mrpc rte stsb cola] [--methods peft ours@0.6 ...] [--seeds 0 1 2]

Methods: `peft` (HF Trainer, PEFT LoRA, ZeRO-3), `trainer-full` (the same, full fine-tuning), `lora`, `tmp`, `ours@S`, and
one cut in the middle of a LoRA training: `fisher@S`, `magnitude@S`, `random@S`. A result that is there already is kept,
so that a stopped run goes on. `--dry_run` prints what would run and how long it takes; `--table_only` draws what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("peft", "fisher@0.6", "ours@0.6", "fisher@0.8", "ours@0.8", "ours@0.5", "ours@0.9", "ours@0.95")
METHODS += ("lora", "tmp", "random@0.6", "magnitude@0.6", "trainer-full")
BASE = "peft"
VARIANTS = {  # "ours@0.6+no-teacher": one ingredient changed
    "no-teacher": ["--distill_weight", "0"],
    "no-gates": ["--gate_learning_rate", "1e-9"],
    "newest-scores": ["--score_ema", "0"],
    "one-decision": ["--num_decisions", "1"],
    "late": ["--prune_start", "0.5", "--prune_end", "0.8"],
    "early": ["--prune_start", "0.1", "--prune_end", "0.4"],
    "masked-to-the-end": ["--shrink", "never"],
    "dropout": ["--dropout"],
}
ONE_CUT = ("fisher", "magnitude", "random")
BOOTSTRAPS = 2000


def options_of(method: str) -> list[str]:
    """What this method adds to the trainer's options."""
    method, _, variant = method.partition("+")
    name, _, sparsity = method.partition("@")
    if name in ("lora", "tmp"):
        return ["--method", name]
    if name == "peft":
        return ["--method", "lora"]
    if name == "trainer-full":
        return ["--method", "full", "--learning_rate", "5e-5"]
    options = ["--target_sparsity", sparsity]
    if name in ONE_CUT:  # plain LoRA, one cut, plain LoRA
        options += ["--criterion", name, "--prune_start", "0.3", "--prune_end", "0.5", "--num_decisions", "1"]
        options += ["--distill_weight", "0", "--gate_learning_rate", "1e-9", "--shrink", "always"]
    return options + (VARIANTS[variant] if variant else [])


def command(method: str, task: str, seed: int, args: argparse.Namespace, output: Path) -> list[str]:
    script = "benchmarks/peft_trainer.py" if method in ("peft", "trainer-full") else "launcher/train.py"
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(args.ranks)]
    options = ["--ds_config", str(ROOT / "ds_configs/zero3.json"), "--model_name_or_path", args.model]
    options += ["--task_name", task, "--data_dir", args.data_dir, "--num_train_epochs", str(args.epochs)]
    options += ["--seed", str(seed), "--output_dir", str(output), *options_of(method)]
    if args.max_train_samples:
        options += ["--max_train_samples", str(args.max_train_samples)]
    return [*launcher, "--master_port", str(args.master_port), str(ROOT / script), *options]


def collect(method: str, output: Path) -> dict:
    """One result in a common form, whichever program wrote it."""
    if method in ("peft", "trainer-full"):
        found = json.loads((output / "result.json").read_text())
        predictions = next(iter(found.pop("predictions").values()))
        return {**found, "live_after": found["live_bytes"], "predictions": predictions[0], "labels": predictions[1]}
    report = json.loads((output / "report.json").read_text())
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    first = [line for line in lines if line["split"] == lines[0]["split"]]
    live, peak = report["memory"]["live_tensor_bytes"], report["memory"]["peak_rank_bytes"]
    metrics_log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "metric": report["metric"]["exported"],
        "train_s": report["time"]["train_s"],
        "time": report["time"],
        "steps": report["time"]["steps"],
        "live_bytes": live["dense"] or live["after_shrink"],
        "live_after": live["after_shrink"] or live["dense"],
        "peak_bytes": max(v for v in peak.values() if v is not None),
        "params": report["params"]["encoder_kept"] / report["params"]["encoder_dense"],
        "macs": report["macs"]["kept"] / report["macs"]["dense"],
        "latency": report["latency"]["exported_ms"] / report["latency"]["dense_ms"],
        "teacher": (report["metric"]["teacher"] or {}).get("score"),
        "structure": report["structure"],
        "curve": [[x["step"], x["samples/s"], x["train/loss"]] for x in metrics_log if "samples/s" in x],
        "predictions": [line["exported"]["prediction"] for line in first],
        "labels": [line["label"] for line in first],
    }


def score(task: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """The task's mean measure, quickly: the bootstrap asks for it thousands of times."""
    if task == "stsb":
        from scipy.stats import rankdata

        ranks = np.corrcoef(rankdata(predictions), rankdata(labels))[0, 1]
        return float(np.corrcoef(predictions, labels)[0, 1] + ranks) / 2
    from sklearn.metrics import f1_score, matthews_corrcoef

    if task == "cola":
        return float(matthews_corrcoef(labels, predictions))
    accuracy = float((predictions == labels).mean())
    return (accuracy + float(f1_score(labels, predictions))) / 2 if task in ("mrpc", "qqp") else accuracy


def interval(task: str, ours: list[dict], base: list[dict]) -> tuple[float, float]:
    """95 % bootstrap interval of the score's ratio to the base, over examples and seeds.

    Paired where both hold their predictions in the same order; a run that does not is drawn on its own, which is wider.
    """
    generator = np.random.default_rng(0)
    sides = [[(np.array(run["predictions"]), np.array(run["labels"])) for run in runs] for runs in (ours, base)]
    size = len(base[0]["labels"])
    paired = all(np.array_equal(labels, sides[1][0][1]) for runs in sides for _, labels in runs)
    ratios = []
    for _ in range(BOOTSTRAPS):
        together = generator.integers(0, size, size)
        means = []
        for runs in sides:
            rows = together if paired else generator.integers(0, size, size)
            chosen = [runs[i] for i in generator.integers(0, len(runs), len(runs))]
            means.append(mean(score(task, predictions[rows], labels[rows]) for predictions, labels in chosen))
        top, bottom = means
        ratios.append(top / bottom if bottom else float("nan"))
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def table(results: Path, tasks: list[str], methods: list[str]) -> str:
    """Markdown: a line per task and method over the seeds that are there, ratios to the base of the same task."""
    lines = [
        "| task | method | seeds | score | of peft | 95 % interval | train time | steps after last shrink "
        "| live memory after / before | peak | parameters | MACs | latency, batch 32 |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task in tasks:
        runs = {m: [json.loads(p.read_text()) for p in sorted(results.glob(f"{task}-{m}-*.json"))] for m in methods}
        base = runs.get(BASE) or []
        for method in methods:
            if not runs[method]:
                continue
            lines.append(_row(task, method, runs[method], base))
    return "\n".join(lines) + "\n"


def _row(task: str, method: str, found: list[dict], base: list[dict]) -> str:
    def ratio(key: str, base_key: str | None = None) -> str:
        if not base:
            return "-"
        return f"{mean(r[key] for r in found) / mean(r[base_key or key] for r in base):.2f}"

    def share(key: str) -> str:
        return f"{mean(r[key] for r in found):.2f}" if key in found[0] else "1.00"

    scores = [r["metric"]["score"] for r in found]
    spread = f" ± {np.std(scores) * 100:.1f}" if len(scores) > 1 else ""
    low, high = interval(task, found, base) if base else (float("nan"), float("nan"))
    cells = [task, method, str(len(found)), f"{100 * mean(scores):.1f}{spread}"]
    cells += [ratio_of_scores(scores, base), f"{low:.3f} to {high:.3f}", ratio("train_s"), last_steps(found, base)]
    cells += [f"{ratio('live_after', 'live_bytes')} / {ratio('live_bytes')}", ratio("peak_bytes")]
    return "| " + " | ".join([*cells, share("params"), share("macs"), share("latency")]) + " |"


def ratio_of_scores(scores: list[float], base: list[dict]) -> str:
    return f"{mean(scores) / mean(r['metric']['score'] for r in base):.3f}" if base else "-"


def last_steps(found: list[dict], base: list[dict]) -> str:
    """Seconds of a step in the recovery phase over the base's seconds of a step."""
    phases = [r["time"] for r in found if r.get("time", {}).get("recover_phase_s")]
    if not phases or not base:
        return "-"
    last = mean(t["recover_phase_s"] / max(1, round(0.4 * t["steps"])) for t in phases)
    return f"{last / mean(r['train_s'] / r['steps'] for r in base):.2f}"


def draw(results: Path, tasks: list[str], methods: list[str]) -> None:
    """Score against latency and against training time, both relative to the base, a line per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for task, marker in zip(tasks, "osD^vP*X<", strict=False):
        base = [json.loads(p.read_text()) for p in sorted(results.glob(f"{task}-{BASE}-*.json"))]
        if not base:
            continue
        points = []
        for method in (m for m in methods if m.startswith("ours@")):
            found = [json.loads(p.read_text()) for p in sorted(results.glob(f"{task}-{method}-*.json"))]
            if found:
                quality = mean(r["metric"]["score"] for r in found) / mean(r["metric"]["score"] for r in base)
                seconds = mean(r["train_s"] for r in found) / mean(r["train_s"] for r in base)
                points.append((mean(r["latency"] for r in found), seconds, quality))
        points.sort()
        for axis, i in zip(axes, (0, 1), strict=True):
            axis.plot([p[i] for p in points], [p[2] for p in points], marker=marker, label=task)
    for axis, name in zip(axes, ("latency / dense model's", "training time / PEFT LoRA's"), strict=True):
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xlabel(name)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score / PEFT LoRA's")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(results / "trade_off.png", dpi=120)


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
    parser.add_argument("--model", default="sample")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--master_port", type=int, default=29511)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/compare")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs/compare")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--table_only", action="store_true")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md between its marks")
    args = parser.parse_args()
    if args.data_dir:
        args.data_dir = str(Path(args.data_dir).resolve())
    args.results.mkdir(parents=True, exist_ok=True)
    todo = [(s, t, m) for s in args.seeds for t in args.tasks for m in args.methods]
    todo = [(s, t, m) for s, t, m in todo if not (args.results / f"{t}-{m}-{s}.json").exists()]
    if args.dry_run:
        done = [json.loads(p.read_text())["train_s"] for p in args.results.glob("*-*-*.json")]
        guess = f"{len(todo) * (mean(done) + 60) / 3600:.1f} h" if done else "unknown before a first run"
        print("\n".join(f"{t} {m} seed {s}" for s, t, m in todo) + f"\n{len(todo)} runs, estimated {guess}")
        return
    for seed, task, method in [] if args.table_only else todo:
        name = f"{task}-{method}-{seed}"
        output = args.work_dir / name
        output.mkdir(parents=True, exist_ok=True)
        line = command(method, task, seed, args, output)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (output / "log.txt").open("w") as log:
            code = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=output).returncode
        if code:
            print(f"{name}: failed with exit code {code}, see {output / 'log.txt'}", flush=True)
            continue
        result = {"task": task, "method": method, "seed": seed, "epochs": args.epochs, "ranks": args.ranks}
        result |= collect(method, output)
        (args.results / f"{name}.json").write_text(json.dumps(result) + "\n")
        print(f"{name}: {100 * result['metric']['score']:.1f} in {result['train_s']:.0f} s", flush=True)
    text = table(args.results, args.tasks, args.methods)
    (args.results / "table.md").write_text(text)
    draw(args.results, args.tasks, args.methods)
    if args.readme:
        into_readme(text)
    print(text)


if __name__ == "__main__":
    main()
