"""Draws the results of compare.py: a table with bootstrap intervals, and the trade-off picture.

Ratios are a method's value over the base's, task by task. Training time is given in CPU seconds, which other jobs on the machine
affect little (on GPUs there are none), and in wall seconds, which is what a user waits for; a step is the median in wall
seconds. Times of runs that shared a machine with each other are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np

BASE = "peft"
OF_HF_TRAINER = (BASE, "trainer-full")
BF16_ROUNDING, FP32_ROUNDING = 2**-8, 2**-24  # at most, as a share of the value
ENOUGH = 0.97  # share of the base's final score whose time is compared
BOOTSTRAPS = 2000
Results = dict[str, dict[str, list[dict]]]  # by task and method, a dictionary per seed; every task has all methods
TIMES = ("train_s", "train_cpu_s", "step_s", "last_step_s", "latency_batch_1", "latency", "scores")


def load(folder: Path, tasks: Sequence[str] = (), methods: Sequence[str] = ()) -> Results:
    """Load all results of a folder. `tasks`, `methods`: their order; those that are not named come last, by name."""
    runs = sorted(map(_read, sorted(folder.glob("*.json"))), key=lambda run: run["seed"])
    agree_on_labels(runs)

    def ordered(found: Iterable[str], order: Sequence[str]) -> list[str]:
        return sorted(set(found), key=lambda name: (order.index(name) if name in order else len(order), name))

    found = ordered([BASE, *(run["method"] for run in runs)], methods)
    return {
        task: {method: [r for r in runs if (r["task"], r["method"]) == (task, method)] for method in found}
        for task in ordered((run["task"] for run in runs), tasks)
    }


def _read(path: Path) -> dict:
    run = json.loads(path.read_text())
    if "steady_step_s" in run:  # of HF Trainer: the median of its steps, which ours is of ours
        run |= dict.fromkeys(("step_s", "last_step_s"), run["steady_step_s"])
    shared = run.get("workers", 1) > 1
    return {name: value for name, value in run.items() if not (shared and name in TIMES)}


def agree_on_labels(runs: list[dict]) -> None:
    """Give all runs of a task the same labels, in place, so that their examples are paired. Raises ValueError if they differ.

    Labels of a regression were rounded in older results, to fp32, and HF Trainer's in bf16 to that.
    """
    exact: dict[str, dict] = {}  # a run of each task, of ours if there is one
    for run in sorted(runs, key=lambda run: run["method"] in OF_HF_TRAINER):
        first = exact.setdefault(run["task"], run)
        known, found = np.array(first["labels"]), np.array(run["labels"])
        rounding = BF16_ROUNDING if run["method"] in OF_HF_TRAINER else FP32_ROUNDING
        if known.shape != found.shape or not np.allclose(found, known, rtol=rounding, atol=0):
            names = " and ".join(f"{r['task']}-{r['method']}-{r['seed']}" for r in (first, run))
            raise ValueError(f"{names} have different labels: they were measured on different data")
        run["labels"] = first["labels"]


def timed(runs: list[dict], key: str) -> float | None:
    """The mean over the runs that have the value; None if none has."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return mean(values) if values else None


def score(task: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean of the task's measures, computed fast because the bootstrap needs it thousands of times.

    predictions, labels: [N]. A correlation is 0 where constant predictions leave it undefined.
    """
    if task == "stsb":
        from scipy.stats import rankdata

        if np.ptp(predictions) == 0:
            return 0.0
        ranks = np.corrcoef(rankdata(predictions), rankdata(labels))[0, 1]
        return float(np.corrcoef(predictions, labels)[0, 1] + ranks) / 2
    accuracy = float((predictions == labels).mean())
    if task not in ("cola", "mrpc", "qqp"):
        return accuracy
    tn, fp, fn, tp = np.bincount(2 * labels + predictions, minlength=4).tolist()
    if task == "cola":  # Matthews's correlation
        square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return (tp * tn - fp * fn) / square**0.5 if square else 0.0
    return (accuracy + 2 * tp / max(1, 2 * tp + fp + fn)) / 2


def bootstrap(task: str, ours: list[dict], base: list[dict]) -> np.ndarray:
    """(scores of ours, scores of the base): float [2, BOOTSTRAPS], resampled over examples and seeds.

    Examples are paired: all runs have them in the same order.
    """
    generator = np.random.default_rng(0)
    sides = [[(np.array(run["predictions"]), np.array(run["labels"])) for run in runs] for runs in (ours, base)]
    size = len(base[0]["labels"])
    drawn = np.zeros((2, BOOTSTRAPS))
    for i in range(BOOTSTRAPS):
        rows = generator.integers(0, size, size)
        for side, runs in enumerate(sides):
            chosen = [runs[j] for j in generator.integers(0, len(runs), len(runs))]
            drawn[side, i] = mean(score(task, predictions[rows], labels[rows]) for predictions, labels in chosen)
    return drawn


def seconds_until(run: dict, level: float) -> float | None:
    """Training seconds until the development score first reached `level`; None if it never did or was not recorded."""
    return next((seconds for _, seconds, found in run.get("scores", ()) if found >= level), None)


QUALITY = ("task", "method", "seeds", "score", "of peft", "95 % interval")
COSTS = ("train time (CPU)", "train time (wall)", "last step", "until 97 %", "live memory after / before", "peak")
COSTS += ("parameters", "MACs", "latency, batch 1", "latency, batch 32")
COLUMNS = QUALITY + COSTS
Pair = tuple[list[dict], list[dict]]  # runs of a method, and of the base on the same task


def tables(results: Results) -> tuple[str, str]:
    """Two Markdown tables: all rows, and the averages alone (all rows if there are none). Columns without values are dropped.

    There is a row per task and method, over its seeds, and an average over tasks for every method that was run on all of them.
    """
    rows: list[list[str]] = []
    averages: list[list[str]] = []
    drawn: dict[str, list[np.ndarray]] = {}
    for task, runs in results.items():
        for method, found in runs.items():
            if not found:
                continue
            both = bootstrap(task, found, runs[BASE]) if runs[BASE] else None
            if both is not None:
                drawn.setdefault(method, []).append(both)
            rows.append(_row(task, method, found, runs[BASE], both))
    for method, parts in drawn.items():
        if len(parts) == len(results) > 1:
            averages.append(_average(method, [(runs[method], runs[BASE]) for runs in results.values()], parts))
    return _markdown(rows + averages), _markdown(averages or rows)


def _markdown(rows: list[list[str]]) -> str:
    others = [row for row in rows if row[1] != BASE] or rows  # the base is 1.00 of itself in every column
    known = [i for i in range(len(COLUMNS)) if any(row[i] != "-" for row in others)]
    marks = ["---" if COLUMNS[i] in ("task", "method", "95 % interval") else "---:" for i in known]
    lines = [[COLUMNS[i] for i in known], marks, *([row[i] for i in known] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _row(task: str, method: str, found: list[dict], base: list[dict], both: np.ndarray | None) -> list[str]:
    scores = [100 * r["metric"]["score"] for r in found]
    spread = f" ± {np.std(scores):.1f}" if len(scores) > 1 else ""
    cells = [task, method, str(len(found)), f"{mean(scores):.1f}{spread}", *_of_base(scores, base, both)]
    return cells + _costs([(found, base)], _until(found, base))


def _of_base(scores: list[float], base: list[dict], both: np.ndarray | None) -> list[str]:
    if both is None:
        return ["-", "-"]
    ratio = mean(scores) / mean(100 * r["metric"]["score"] for r in base)
    return [f"{ratio:.3f}", _interval(both)]


def _interval(both: np.ndarray) -> str:
    low, high = np.nanpercentile(both[0] / both[1], [2.5, 97.5])
    return f"{low:.3f} to {high:.3f}"


def _until(found: list[dict], base: list[dict]) -> str:
    """Training seconds to 97 % of the base's final score, as a ratio to the base's own; mean over seeds where both reach it."""
    ratios = []
    for run in found:
        other = next((b for b in base if b["seed"] == run["seed"]), None)
        if other is None:
            continue
        level = ENOUGH * other["metric"]["score"]
        ours, theirs = seconds_until(run, level), seconds_until(other, level)
        if ours is not None and theirs is not None:
            ratios.append(ours / theirs)
    return f"{mean(ratios):.2f}" if ratios else "-"


def _average(method: str, pairs: list[Pair], parts: list[np.ndarray]) -> list[str]:
    """A method's row of averages: the mean score over tasks, and the means of the tasks' ratios."""

    def scores(runs: list[dict]) -> float:
        return 100 * mean(r["metric"]["score"] for r in runs)

    ours, base = mean(scores(a) for a, _ in pairs), mean(scores(b) for _, b in pairs)
    seeds = str(min(len(a) for a, _ in pairs))
    cells = ["**average**", method, seeds, f"{ours:.1f}", f"{ours / base:.3f}", _interval(np.mean(parts, axis=0))]
    return cells + _costs(pairs, "-")


def _costs(pairs: list[Pair], until: str) -> list[str]:
    """The cells of COSTS: means over the pairs' ratios; "-" where a pair has no value."""

    def ratio(key: str, base_key: str | None = None) -> str:
        values = [(timed(a, key), timed(b, base_key or key)) for a, b in pairs]
        if any(None in pair for pair in values):
            return "-"
        return f"{mean(x / y for x, y in values):.2f}"  # type: ignore[operator]

    def share(key: str) -> str:
        values = [timed(a, key) if "params" in a[0] else 1.0 for a, _ in pairs]  # without it the method does not prune
        return "-" if None in values else f"{mean(values):.2f}"  # type: ignore[type-var]

    cells = [ratio("train_cpu_s"), ratio("train_s"), ratio("last_step_s", "step_s"), until]
    cells += [f"{ratio('live_after', 'live_bytes')} / {ratio('live_bytes')}", ratio("peak_bytes")]
    return [*cells, share("params"), share("macs"), share("latency_batch_1"), share("latency")]


def draw(results: Results, path: Path) -> None:
    """Draw score against latency and against training time, with a line per task; nothing if no run was timed.

    Scores and training times (CPU seconds where known) are relative to the base, latency to the dense model.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for (task, runs), marker in zip(results.items(), "osD^vP*X<", strict=False):
        base, points = runs[BASE], []
        for found in (runs[m] for m in runs if m.startswith("ours@") and "+" not in m and runs[m] and base):
            clock = "train_cpu_s" if timed(found, "train_cpu_s") else "train_s"
            latency, seconds, whole = timed(found, "latency"), timed(found, clock), timed(base, clock)
            if latency is None or seconds is None or whole is None:
                continue
            quality = mean(r["metric"]["score"] for r in found) / mean(r["metric"]["score"] for r in base)
            points.append((latency, seconds / whole, quality))
        points.sort()
        for axis, i in zip(axes, (0, 1), strict=True) if points else ():
            axis.plot([p[i] for p in points], [p[2] for p in points], marker=marker, label=task)
    for axis, name in zip(axes, ("latency / dense model's", "training time / PEFT LoRA's"), strict=True):
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xlabel(name)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score / PEFT LoRA's")
    if not axes[0].get_legend_handles_labels()[0]:
        plt.close(figure)
        return
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
