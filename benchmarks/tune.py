"""The search behind the defaults: variants of ours on folds of the *train* split. No development set is ever used.

    python benchmarks/tune.py --data_dir GLUE [--tasks ...] [--variants NAME ...] [--fold 0] [--workers 2]

Each run has one rank and no ZeRO (loss curves depend on neither); `--workers` runs go in parallel. Each writes one JSON file to
results/tuning, and runs that have one are not repeated; one of another model is refused. The table at the end has a row per
variant, with means over seeds and folds.
"""

import argparse
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from statistics import mean

import stored
from compare import ONE_CUT
from ranks import ENVIRONMENT, ROOT

FOLDS = 5
FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "stsb": "STS-B"}  # official names
PATHS = ("--model_name_or_path", "--data_dir", "--output_dir", "--ds_config")
BASE = {"num_train_epochs": 3, "per_device_train_batch_size": 32, "ds_config": str(ROOT / "ds_configs/zero0.json")}
OF_A_TEACHER = ("teacher_window", "distill_min_r2", "distill_fades")
ANY_TEACHER = {"distill_weight": 0.5, "distill_min_r2": -1000}  # used however bad it is
PLAIN = {  # the starting point of the search
    **ANY_TEACHER,
    "target_sparsity": 0.8,
    "learning_rate": 1e-3,
    "train_norms": False,
    "teacher_window": 0,
    "distill_fades": False,
}
NORMS = {**PLAIN, "train_norms": True, "learning_rate": 2e-3, "distill_weight": 0}
MEAN = {
    **ANY_TEACHER,
    "target_sparsity": 0.8,
    "learning_rate": 2e-3,
    "train_norms": True,
    "teacher_window": 0.6,
    "distill_fades": True,
}
RATE = {**MEAN, "learning_rate": 1e-3}
TODAY = {"target_sparsity": 0.8}  # with the program's defaults
LORA = {"method": "lora", "learning_rate": 1e-3}
VARIANTS: dict[str, dict[str, object]] = {
    "lora": LORA,
    "lora-2e-3": {**LORA, "learning_rate": 2e-3},
    "lora-batch16": {**LORA, "per_device_train_batch_size": 16},
    "lora-5epochs": {**LORA, "num_train_epochs": 5},
    "plain": PLAIN,
    "level-rate": {**PLAIN, "lr_scheduler_type": "warmup_stable_decay"},
    "no-teacher": {**PLAIN, "distill_weight": 0},
    "no-teacher-masked": {**PLAIN, "distill_weight": 0, "shrink": "never"},
    "fades": {**PLAIN, "distill_fades": True},
    "fades-norms-2e-3": {**PLAIN, "distill_fades": True, "train_norms": True, "learning_rate": 2e-3},
    "fades-norms-2e-3-5epochs": {
        **PLAIN,
        "distill_fades": True,
        "train_norms": True,
        "learning_rate": 2e-3,
        "num_train_epochs": 5,
    },
    "norms-2e-3": NORMS,
    "norms-2e-3-early": {**NORMS, "prune_start": 0.05, "prune_end": 0.45},
    "norms-2e-3-r16": {**NORMS, "r": 16, "lora_alpha": 32},
    "norms-4e-3": {**NORMS, "learning_rate": 4e-3},
    "norms-batch16": {**NORMS, "learning_rate": 1e-3, "per_device_train_batch_size": 16},
    "mean-teacher": MEAN,
    "mean-teacher-1e-3": {**MEAN, "learning_rate": 1e-3},
    "mean-teacher-3e-3": {**MEAN, "learning_rate": 3e-3},
    "mean-teacher-level-rate": {**MEAN, "lr_scheduler_type": "warmup_stable_decay"},
    "mean-teacher-stays": {**MEAN, "distill_fades": False},
    "mean-teacher-stays@0.6": {**MEAN, "target_sparsity": 0.6, "distill_fades": False},
    "mean-teacher@0.6": {**MEAN, "target_sparsity": 0.6},
    "mean-teacher-1e-3@0.6": {**MEAN, "target_sparsity": 0.6, "learning_rate": 1e-3},
    "mean-teacher-15e-4@0.6": {**MEAN, "target_sparsity": 0.6, "learning_rate": 1.5e-3},
    "frozen-norms@0.6": {**MEAN, "target_sparsity": 0.6, "train_norms": False},
    "long-warmup@0.6": {**MEAN, "target_sparsity": 0.6, "warmup_ratio": 0.2},
    "no-teacher-1e-3@0.6": {**MEAN, "target_sparsity": 0.6, "learning_rate": 1e-3, "distill_weight": 0},
    "no-teacher-1e-3": {**MEAN, "learning_rate": 1e-3, "distill_weight": 0},
    "slow-gates-1e-3@0.6": {**MEAN, "target_sparsity": 0.6, "learning_rate": 1e-3, "gate_learning_rate": 1e-3},
    "slow-gates-1e-3": {**RATE, "gate_learning_rate": 1e-3},
    "level-rate-1e-3": {**RATE, "lr_scheduler_type": "warmup_stable_decay"},
    "7e-4": {**RATE, "learning_rate": 7e-4},
    "early-1e-3": {**RATE, "prune_start": 0.1, "prune_end": 0.45},
    "late-1e-3": {**RATE, "prune_start": 0.4, "prune_end": 0.75},
    "level-rate-today": {**TODAY, "lr_scheduler_type": "warmup_stable_decay"},
    "taylor-today": {**TODAY, "criterion": "taylor"},
    "outlier-today": {**TODAY, "criterion": "outlier"},
    "activation-norm-today": {**TODAY, "criterion": "activation_norm"},
    "uniform-today": {**TODAY, "uniform": True},
    "frozen-norms-today": {**TODAY, "train_norms": False},
    "today": TODAY,
    "slow-gates-today": {**TODAY, "gate_learning_rate": 1e-3},
    "no-ema-today": {**TODAY, "score_ema": 0.0},
    "24-decisions-today": {**TODAY, "num_decisions": 24},
    "late-today": {**TODAY, "prune_start": 0.4, "prune_end": 0.75},
    "5e-4-today": {**TODAY, "learning_rate": 5e-4},
    "7e-4-today": {**TODAY, "learning_rate": 7e-4},
    "long-warmup-2e-3-today": {**TODAY, "learning_rate": 2e-3, "warmup_ratio": 0.3},
    "alpha4-today": {**TODAY, "lora_alpha": 4},
    "r16-today": {**TODAY, "r": 16},
    "r16-alpha8-today": {**TODAY, "r": 16, "lora_alpha": 8},
    "r32-today": {**TODAY, "r": 32},
    "r32-alpha8-today": {**TODAY, "r": 32, "lora_alpha": 8},
    "r32-alpha64-today": {**TODAY, "r": 32, "lora_alpha": 64},
    "r64-today": {**TODAY, "r": 64},
    "r32-slow-gates-today": {**TODAY, "r": 32, "gate_learning_rate": 1e-3},
    "dropout-today": {**TODAY, "dropout": True},
    "5-epochs-today": {**TODAY, "num_train_epochs": 5},
    "lora-r32": {**LORA, "r": 32},
    "fisher-once-today": {**TODAY, **ONE_CUT},
}


def options_of(variant: str) -> dict[str, object]:
    options = {**BASE, **VARIANTS[variant]}
    without = () if options.get("distill_weight") else OF_A_TEACHER
    return {name: value for name, value in options.items() if name not in without}


def fold_folder(data_dir: Path, work: Path, task: str, fold: int) -> Path:
    """Write the task in the official layout, with one fold of its training examples as the development set."""
    target = work / f"fold{fold}" / FOLDERS[task]
    target.mkdir(parents=True, exist_ok=True)
    lines = (data_dir / FOLDERS[task] / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    header, rows = ([], lines) if task == "cola" else (lines[:1], lines[1:])
    for name, inside in (("train", lambda i: i % FOLDS != fold), ("dev", lambda i: i % FOLDS == fold)):
        text = "".join(header + [row for i, row in enumerate(rows) if inside(i)])
        (target / f"{name}.tsv").write_text(text, encoding="utf-8")
    return target.parent


def one_run(argv: list[str], result: Path) -> None:
    """Train without an export, in a worker's process, and write the last step's score on the fold."""
    from prunadapt_ds.environment import prepare_environment

    prepare_environment()
    from prunadapt_ds import train
    from prunadapt_ds.config import parse

    session = train.setup(parse(argv))
    train.add_trainables(session)
    train.fit(session)
    metrics, _ = train.evaluate(session)
    found = {"metric": metrics, "teacher": session.report["metric"]["teacher"], "seconds": session.clocks.seconds}
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    options = {name[2:]: value for name, value in given.items() if name not in PATHS}
    found |= {"model": given["--model_name_or_path"], "options": options, "counts": session.plan.counts()}
    result.write_text(json.dumps(found) + "\n")


def work_off(todo: queue.Queue, args: argparse.Namespace) -> None:
    while True:
        try:
            task, variant, seed, result = todo.get_nowait()
        except queue.Empty:
            return
        folder = args.work_dir / f"fold{args.fold}"
        options = {**options_of(variant), "task_name": task, "data_dir": folder, "seed": seed}
        options["model_name_or_path"] = args.model
        options["output_dir"] = args.work_dir / result.stem
        argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, __file__, "--one_run", str(result), *argv]
        log = args.work_dir / f"{result.stem}.log"
        with log.open("w") as file:
            code = subprocess.run(command, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT).returncode
        print(f"{result.stem}: {'done' if code == 0 else f'failed, see {log}'}", flush=True)


def table(results: Path) -> str:
    """Scores in percent by variant and task (means over seeds and folds), their mean over tasks, and the number of runs.

    The table shows all that the folder holds. Variants that are no longer searched come last.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for path in sorted(results.glob("*.json")):
        task, _, rest = path.stem.partition("-")
        variant = rest.rsplit("-", 2)[0]  # the fold and the seed follow
        scores.setdefault(variant, {}).setdefault(task, []).append(json.loads(path.read_text())["metric"]["score"])
    tasks = [task for task in FOLDERS if any(task in by_task for by_task in scores.values())]
    lines = [f"| variant | {' | '.join(tasks)} | mean | runs |\n|---|{'---:|' * (len(tasks) + 2)}"]
    for variant in sorted(scores, key=lambda name: (*VARIANTS, name).index(name)):
        by_task = scores[variant]
        means = {t: 100 * mean(found) for t, found in by_task.items()}
        cells = [f"{means[t]:.1f}" if t in means else "" for t in tasks]
        whole = f"{mean(means.values()):.2f}" if len(means) == len(tasks) else ""
        lines.append(f"| {variant} | {' | '.join(cells)} | {whole} | {sum(map(len, by_task.values()))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--tasks", nargs="+", default=["stsb", "mrpc", "cola", "rte"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default="sample")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/tuning")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs/tuning")
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args()
    cells = [(task, variant, seed) for seed in args.seeds for variant in args.variants for task in args.tasks]
    results = [args.results / f"{task}-{variant}-f{args.fold}-s{seed}.json" for task, variant, seed in cells]
    if problem := stored.refusal({path: {"model": args.model} for path in results}):
        parser.error(problem)
    args.results.mkdir(parents=True, exist_ok=True)
    todo: queue.Queue = queue.Queue()
    for cell, result in zip(cells, results, strict=True):
        if not result.exists():
            todo.put((*cell, result))
    if args.dry_run:
        print("\n".join(item[3].stem for item in todo.queue) + f"\n{todo.qsize()} runs, about 4 minutes each")
        return
    for task in args.tasks:
        fold_folder(Path(args.data_dir), args.work_dir, task, args.fold)
    workers = [threading.Thread(target=work_off, args=(todo, args)) for _ in range(args.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    text = table(args.results)
    (args.results / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one_run"]:
        one_run(sys.argv[3:], Path(sys.argv[2]))
    else:
        main()
