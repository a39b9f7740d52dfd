"""Any number of runs as one table and one page: means and spread over seeds, what failed shown as such, and the Pareto front."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os.path
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from prunadapt_ds import figures, files, pages, report
from prunadapt_ds.errors import Problem, PrunadaptError, UserError, message

KEY = ("task", "method", "criterion", "model", "target")
HEADER = (
    "task",
    "method",
    "criterion",
    "model",
    "target",
    "seeds",
    "status",
    "score",
    "parameters",
    "MACs",
    "latency",
    "train s",
)
TRADE_OFFS = (("latency", "latency / dense"), ("parameters", "parameters / dense"), ("train_s", "training seconds"))


@dataclass(frozen=True)
class Run:
    """One folder. `report` is None where there is no report to read."""

    folder: Path
    report: dict[str, Any] | None

    @property
    def status(self) -> str:
        return "missing" if self.report is None else str(self.report["status"])

    @property
    def key(self) -> tuple[str, ...]:
        """What two runs share that differ in their seed only; a missing run stands alone."""
        r = self.report
        if r is None:
            return (self.folder.name, *["-"] * (len(KEY) - 1))
        values = (r["task"], r["method"], r["criterion"], r["model"], r["sparsity"]["target"])
        return tuple("-" if value is None else str(value) for value in values)


@dataclass(frozen=True)
class Line:
    """All seeds of one setting. figures: {"score", "parameters", "macs", "latency", "train_s"} -> a value per complete run."""

    key: tuple[str, ...]
    runs: tuple[Run, ...]
    figures: dict[str, list[float]]

    @property
    def status(self) -> str:
        """ "complete", or how many of the runs ended how."""
        states = [run.status for run in self.runs]
        if set(states) == {"complete"}:
            return "complete"
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))

    def mean(self, name: str) -> float | None:
        return mean(self.figures[name]) if self.figures[name] else None


def find(folders: Sequence[str]) -> list[Run]:
    """The runs named, and of a folder of runs every one inside it. Raises UserError where a folder does not exist."""
    problems = [Problem("run", f, "there is no such folder") for f in folders if not os.path.isdir(f)]
    if problems:
        raise UserError(problems)
    return [run for folder in folders for run in _inside(Path(folder))]


def _inside(folder: Path) -> list[Run]:
    if (folder / "report.json").is_file():
        return [Run(folder, _read(folder / "report.json"))]
    below = sorted(path.parent for path in folder.rglob("report.json") if "exports" not in path.parts)
    begun = sorted({path.parent for path in folder.rglob("metrics.jsonl")} - set(below))
    return [Run(path, _read(path / "report.json")) for path in sorted([*below, *begun])] or [Run(folder, None)]


def _read(path: Path) -> dict[str, Any] | None:
    """A report, or None where there is none that can be read: a run that broke off while it wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        numbers = [*_figures(found).values(), found["sparsity"]["target"]]
        names = [found[name] for name in ("status", "task", "method", "criterion", "model")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None
    is_whole = all(n is None or isinstance(n, (int, float)) for n in numbers) and isinstance(names[0], str)
    return found if is_whole and all(n is None or isinstance(n, str) for n in names) else None


def _figures(r: dict[str, Any]) -> dict[str, float | None]:
    def share(kept: float | None, dense: float | None) -> float | None:
        return kept / dense if kept is not None and dense else None

    return {
        "score": (r["metric"]["exported"] or {}).get("score"),
        "parameters": share(r["params"]["encoder_kept"], r["params"]["encoder_dense"]),
        "macs": share(r["macs"]["kept"], r["macs"]["dense"]),
        "latency": share(r["latency"]["exported_ms"], r["latency"]["dense_ms"]),
        "train_s": r["time"]["train_s"],
    }


def lines(runs: Sequence[Run]) -> list[Line]:
    """Runs grouped by all but their seed. Only complete runs count in a figure."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    result = []
    for key, members in groups.items():
        found = [_figures(run.report) for run in members if run.report is not None and run.status == "complete"]
        names = ("score", "parameters", "macs", "latency", "train_s")
        values = {name: [f[name] for f in found if f[name] is not None] for name in names}
        result.append(Line(key, tuple(members), values))  # type: ignore[arg-type]
    return result


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, score): whether no other point is at most as costly and at least as good, and better in one."""

    def beaten(point: tuple[float, float]) -> bool:
        cost, score = point
        return any(c <= cost and s >= score and (c, s) != point for c, s in points)

    return [not beaten(point) for point in points]


def _cell(values: Sequence[float], text: str, scale: float = 1) -> str:
    if not values:
        return "-"
    spread = f" ± {text.format(stdev(values) / scale)}" if len(values) > 1 else ""
    return text.format(mean(values) / scale) + spread


def table(found: Sequence[Line]) -> list[report.Row]:
    """A row per setting; costs are shares of the dense model's."""
    rows = []
    for line in found:
        scale = 1 if line.key[0] == "causal_lm" else 0.01
        f = line.figures
        shares = [_cell(f[name], "{:.2f}") for name in ("parameters", "macs", "latency")]
        seeds = str(sum(run.status == "complete" for run in line.runs))
        rows.append(
            (*line.key, seeds, line.status, _cell(f["score"], "{:.2f}", scale), *shares, _cell(f["train_s"], "{:.0f}"))
        )
    return rows


def csv_text(rows: Sequence[report.Row]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *rows])
    return text.getvalue()


def trade_off(found: Sequence[Line], name: str, label: str) -> figures.Picture | None:
    """Score against a cost; what nothing else beats is filled and joined. One task only: scores of two do not compare."""
    known = [(line, line.mean(name), line.mean("score")) for line in found]
    scale = 1 if any(line.key[0] == "causal_lm" for line in found) else 100  # as in the table
    points = [(line, cost, score * scale) for line, cost, score in known if cost is not None and score is not None]
    if len(points) < 2 or len({line.key[0] for line, *_ in points}) > 1:
        return None
    sign = -1 if points[0][0].key[0] == "causal_lm" else 1  # less perplexity is better
    front = pareto([(cost, sign * score) for _, cost, score in points])
    drawing, axis = figures.figure(3.6)
    best = sorted((cost, score) for (_, cost, score), on in zip(points, front, strict=True) if on)
    axis.plot(*zip(*best, strict=True), color=figures.INK, linestyle=":", linewidth=1)
    told = {i for i in range(len(KEY)) if len({line.key[i] for line, *_ in points}) > 1}  # what tells the points apart
    words = []
    for (line, cost, score), on in zip(points, front, strict=True):
        title = " ".join(report.short_model(part) for i, part in enumerate(line.key) if i in told and part != "-")
        title = title or line.key[1]
        axis.scatter(
            [cost], [score], s=34, facecolor=figures.ACCENT if on else "white", edgecolor=figures.ACCENT, zorder=3
        )
        axis.annotate(title, (cost, score), xytext=(4, 4), textcoords="offset points", fontsize=7)
        words.append(f"{title}: {label} {cost:.3g}, score {score:.2f}{', on the front' if on else ''}")
    axis.set_xlabel(label)
    axis.set_ylabel("score")
    axis.margins(0.12)
    return figures.picture(
        f"Score against {label} (filled: nothing is better in both)", "; ".join(words) + ".", drawing
    )


def page(found: Sequence[Line], rows: Sequence[report.Row]) -> str:
    drawn = [figures.drawn(trade_off, found, name, label) for name, label in TRADE_OFFS]
    pictures = "".join(pages.image(picture) for picture in drawn if picture is not None)
    short = [(*row[:3], report.short_model(row[3]), *row[4:]) for row in rows]
    note = "Parameters, MACs and latency are shares of the dense model's; ± is the standard deviation over seeds."
    body = f"<h1>Runs compared</h1>{pages.html_table(HEADER, short, 'Runs', 5)}<p>{note}</p><div class=pictures>{pictures}</div>"
    return pages.document("Runs compared", body)


_EXAMPLE = "example: prunadapt compare outputs/sweep --output_dir outputs"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; with --output_dir also write compare.md, compare.csv and compare.html. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=_EXAMPLE)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run, or a folder of such folders")
    parser.add_argument("--output_dir", metavar="DIR", help="also write compare.md, compare.csv and compare.html there")
    arguments = parser.parse_args(argv)
    try:
        found = lines(find(arguments.runs))
        rows = table(found)
        text = report.markdown_table(HEADER, rows, 5)
        print(text)
        if arguments.output_dir:
            written = {"compare.md": text + "\n", "compare.csv": csv_text(rows), "compare.html": page(found, rows)}
            write(arguments.output_dir, written)
    except PrunadaptError as error:
        print(message(error), file=sys.stderr)
        return error.exit_code
    return 0


def write(folder: str, texts: Mapping[str, str]) -> None:
    """Raises UserError where the folder cannot be written."""
    try:
        with files.owner_writes_alone():
            for name, text in texts.items():
                files.replace(Path(folder) / name, text)
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); name a folder where files can be made"
        raise UserError(Problem("output_dir", folder, remedy)) from error
