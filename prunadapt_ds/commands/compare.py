"""Compares any number of runs in one table and one page: means and deviations over seeds, failed runs, and the Pareto front.

Runs belong to one setting if they differ only in their seed: they have the same options in run.json, number of ranks, ZeRO
stage and device, and began with the same data and weights.
"""

from __future__ import annotations

import csv
import html
import io
import json
import os.path
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from prunadapt_ds import figures, files, pages, report
from prunadapt_ds.data.tasks import TASKS
from prunadapt_ds.errors import Problem, UserError, exit_code_of
from prunadapt_ds.options import Help, Parser, as_called

KEY = ("task", "method", "criterion", "model", "target")
NAMES = ("score", "parameters", "macs", "latency", "train_s")
HEADER = (*KEY, "options", "seeds", "status", "score", "parameters", "MACs", "latency", "train s")
TEXT_COLUMNS = len(KEY) + 1
TRADE_OFFS = (("latency", "latency / dense"), ("parameters", "parameters / dense"), ("train_s", "training seconds"))
# Options of run.json that are not compared: the columns of KEY show them, or they do not change what is measured.
IN_KEY = {"task_name", "method", "criterion", "model_name_or_path", "target_sparsity", "identity", "label_scale"}
UNMEASURED = {"seed", "export_formats", "save_scores"}
# Keys of report.json that affect timings and that options do not fully determine.
SURROUNDINGS = ("world_size", "zero_stage", "device")


@dataclass(frozen=True)
class Run:
    """One folder. `report` is None if it has no readable report, `options` if it has no readable run.json."""

    folder: Path
    report: dict[str, Any] | None
    options: dict[str, str] | None = None

    @property
    def status(self) -> str:
        return "missing" if self.report is None else str(self.report["status"])

    @property
    def key(self) -> tuple[str, ...]:
        """The cells of the table's first columns; for a missing run, its folder."""
        r = self.report
        if r is None:
            return (str(self.folder), *["-"] * (len(KEY) - 1))
        values = (r["task"], r["method"], r["criterion"], r["model"], r["sparsity"]["target"])
        return tuple("-" if value is None else str(value) for value in values)

    @property
    def setting(self) -> Hashable:
        """A key that is equal for runs that differ only in their seed. A run with unknown options has one of its own."""
        if self.report is None or self.options is None:
            return str(self.folder)
        return self.key, tuple(sorted(self.options.items()))


@dataclass(frozen=True)
class Line:
    """All seeds of one setting.

    options: text of the options that distinguish it from other settings. figures: for each of NAMES, the values of its
    complete runs.
    """

    key: tuple[str, ...]
    options: str
    runs: tuple[Run, ...]
    figures: dict[str, list[float]]

    @property
    def status(self) -> str:
        """ "complete", or the number of runs with each status."""
        states = [run.status for run in self.runs]
        if set(states) == {"complete"}:
            return "complete"
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))

    @property
    def seeds(self) -> str:
        """The number of complete seeds, and that of complete runs if a seed has several."""
        seeds = [str(run.report["seed"]) for run in self.runs if run.report is not None and run.status == "complete"]
        repeated = f" ({len(seeds)} runs)" if len(set(seeds)) < len(seeds) else ""
        return f"{len(set(seeds))}{repeated}"

    @property
    def scale(self) -> float:
        """The divisor with which scores are shown: in percent, except perplexity."""
        return 1 if self.key[0] == "causal_lm" else 0.01

    def mean(self, name: str) -> float | None:
        return mean(self.figures[name]) if self.figures[name] else None


def find(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders, at any depth and each once. Raises UserError if a folder does not exist, or no run can be read."""
    problems = [Problem("run", f, "there is no such folder") for f in folders if not os.path.isdir(f)]
    if problems:
        raise UserError(problems)
    found = [run for folder in folders for run in _inside(Path(folder))]
    if all(run.report is None for run in found):
        remedy = "holds no run with a readable report.json; name the --output_dir of a run, or a folder of such"
        raise UserError([Problem("run", folder, remedy) for folder in folders])
    return list({run.folder.resolve(): run for run in reversed(found)}.values())[::-1]  # a run may be found twice


def _inside(folder: Path) -> list[Run]:
    reports = {path.parent for path in folder.rglob("report.json")}
    begun = {path.parent for path in folder.rglob("metrics.jsonl")}
    found = [path for path in sorted(reports | begun) if "exports" not in path.relative_to(folder).parts]
    return [_run(path) for path in found] or [Run(folder, None)]


def _run(folder: Path) -> Run:
    report = _read(folder / "report.json")
    return Run(folder, report, None if report is None else _options(folder / "run.json", report))


def _options(path: Path, report: dict[str, Any]) -> dict[str, str] | None:
    """A run's options and surroundings as JSON, by name, without the seed. None if run.json is missing or incomplete."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in found.items() if name not in IN_KEY | UNMEASURED}
        kept |= {name: report.get(name) for name in SURROUNDINGS}
        kept |= _contents(found)
        return {name: json.dumps(value, sort_keys=True) for name, value in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _contents(stated: Mapping[str, Any]) -> dict[str, str]:
    """The beginnings of the sha256 of data and weights by what they are of: what run.json says and the seed does not decide."""
    sums = stated.get("identity") or {}
    of_seed = {"data", "tokens"} if stated.get("max_train_samples") else set()
    return {f"{kind} (sha256)": sums[kind][:8] for kind in sorted(sums.keys() - of_seed)}


def _read(path: Path) -> dict[str, Any] | None:
    """A run's report, or None if there is none that is complete and readable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        numbers = [*_figures(found).values(), found["sparsity"]["target"]]
        names = [found[name] for name in ("status", "task", "method", "criterion", "model")]
        seed = found["seed"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None
    is_whole = all(n is None or isinstance(n, (int, float)) for n in [*numbers, seed]) and isinstance(names[0], str)
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
    """Group runs by everything but their seed. Only complete runs count in the figures."""
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    told = differing([run for run in runs if run.options is not None])
    result = []
    for members in groups.values():
        found = [_figures(run.report) for run in members if run.report is not None and run.status == "complete"]
        values = {name: [f[name] for f in found if f[name] is not None] for name in NAMES}
        result.append(Line(members[0].key, _told(members[0], told), tuple(members), values))  # type: ignore[arg-type]
    return result


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of the options that are not equal in all runs. An option that only some runs have counts as different."""
    names = sorted({name for run in runs for name in run.options or ()})
    return [name for name in names if len({(run.options or {}).get(name) for run in runs}) > 1]


def _told(run: Run, names: Sequence[str]) -> str:
    if run.report is None:
        return "-"
    if run.options is None:
        return f"unknown: no run.json in {run.folder}"
    stated = {name: run.options[name].strip('"') for name in names if name in run.options}
    return " ".join(f"{name}={'default' if value == 'null' else value}" for name, value in stated.items()) or "-"


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, score): whether no other point is at least as good in both and better in one."""

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
    """A row per setting. Costs are shares of the dense model's."""
    rows = []
    for line in found:
        f = line.figures
        shares = [_cell(f[name], "{:.2f}") for name in ("parameters", "macs", "latency")]
        costs = (_cell(f["score"], "{:.2f}", line.scale), *shares, _cell(f["train_s"], "{:.0f}"))
        rows.append((*line.key, line.options, line.seeds, line.status, *costs))
    return rows


def csv_text(found: Sequence[Line]) -> str:
    """The table as CSV, with separate columns for the mean, standard deviation and number of runs of each figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measured = [f"{name}_{of}" for name in NAMES for of in ("mean", "std", "n")]
    writer.writerow([*KEY, "options", "seeds", "status", *measured])
    for line in found:
        seeds = line.seeds.partition(" ")[0]
        cells = [cell for name in NAMES for cell in _numbers(line, name)]
        writer.writerow([*line.key, line.options, seeds, line.status, *cells])
    return text.getvalue()


def _numbers(line: Line, name: str) -> tuple[str, str, int]:
    """Mean, standard deviation ("" where undefined) and number of values."""
    values = [value / (line.scale if name == "score" else 1) for value in line.figures[name]]
    middle = f"{mean(values):.6g}" if values else ""
    return middle, f"{stdev(values):.6g}" if len(values) > 1 else "", len(values)


Point = tuple[Line, float, float]  # a setting with its cost and its score


def scored_on(line: Line) -> str:
    """What a setting's score is of: a task of the table or, of the user's own data, the file. Others are not comparable."""
    task, stated = line.key[0], line.runs[0].options or {}
    file = json.loads(stated.get("validation_file", "null"))
    return task if task in TASKS or file is None else f"{task} on {file}"


def points_of(found: Sequence[Line], name: str, what: str) -> list[Point]:
    """The settings with this cost and a score that is of `what`, see `scored_on`."""
    known = [(line, line.mean(name), line.mean("score")) for line in found if scored_on(line) == what]
    return [(line, cost, score / line.scale) for line, cost, score in known if cost is not None and score is not None]


def trade_off(points: Sequence[Point], label: str) -> figures.Picture:
    """A picture of score against a cost for one task; the Pareto front is filled and joined."""
    sign = -1 if points[0][0].key[0] == "causal_lm" else 1  # lower perplexity is better
    front = pareto([(cost, sign * score) for _, cost, score in points])
    drawing, axis = figures.figure(3.6)
    best = sorted((cost, score) for (_, cost, score), on in zip(points, front, strict=True) if on)
    axis.plot(*zip(*best, strict=True), color=figures.INK, linestyle=":", linewidth=1)
    words = []
    for (_, cost, score), title, on in zip(points, titles([line for line, *_ in points]), front, strict=True):
        axis.scatter(
            [cost], [score], s=34, facecolor=figures.ACCENT if on else "white", edgecolor=figures.ACCENT, zorder=3
        )
        axis.annotate(title, (cost, score), xytext=(4, 4), textcoords="offset points", fontsize=7)
        words.append(f"{title}: {label} {cost:.3g}, score {score:.2f}{', on the front' if on else ''}")
    axis.set_xlabel(label)
    axis.set_ylabel("score")
    axis.margins(0.12)
    title = f"{scored_on(points[0][0])}: score against {label} (filled: the Pareto front)"
    return figures.picture(title, "; ".join(words) + ".", drawing)


def titles(found: Sequence[Line]) -> list[str]:
    """A short label for each line, made of the cells in which the lines differ."""
    cells = [(*line.key, line.options) for line in found]
    told = [i for i in range(len(KEY) + 1) if len({row[i] for row in cells}) > 1]
    short = {KEY.index("model"): report.short_model}
    words = [[short.get(i, str)(row[i]) for i in told if row[i] != "-"] for row in cells]
    return [" ".join(some) or row[1] for some, row in zip(words, cells, strict=True)]


def trade_offs(found: Sequence[Line]) -> tuple[list[figures.Picture], list[str]]:
    """A picture for every task and cost, and a sentence for every task that has too few settings for one."""
    drawn, missing = [], []
    for what in dict.fromkeys(scored_on(line) for line in found if line.runs[0].report is not None):
        few = []
        for name, label in TRADE_OFFS:
            points = points_of(found, name, what)
            if len(points) > 1:
                drawn.append(figures.drawn(trade_off, points, label))
            else:
                few.append(f"{label} ({len(points)})")
        if few:
            needed = "a picture needs two settings with complete runs that have both figures"
            missing.append(f"{what}: no picture of score against {', '.join(few)}; {needed}.")
    return drawn, missing


def page(found: Sequence[Line], rows: Sequence[report.Row]) -> str:
    drawn, missing = trade_offs(found)
    pictures = "".join(map(pages.image, drawn))
    short = [(*row[:3], report.short_model(row[3]), *row[4:]) for row in rows]
    notes = [
        "Parameters, MACs and latency are shares of the dense model's; ± is the standard deviation over seeds.",
        *missing,
    ]
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    tables = pages.html_table(HEADER, short, "Runs", TEXT_COLUMNS)
    return pages.document("Runs compared", f"<h1>Runs compared</h1>{tables}{said}<div class=pictures>{pictures}</div>")


_EXAMPLE = "prunadapt compare outputs/sweep --output_dir outputs"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and, with --output_dir, write compare.md, compare.csv and compare.html. Returns the exit code."""
    parser = Parser(description=__doc__, epilog=f"example: {as_called(_EXAMPLE)}", formatter_class=Help)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run, or a folder of such folders")
    parser.add_argument("--output_dir", metavar="DIR", help="also write compare.md, compare.csv and compare.html there")

    def work() -> None:
        options = parser.parsed(argv)
        show(options.runs, options.output_dir)

    return exit_code_of(work)


def show(folders: Sequence[str], output_dir: str | None) -> None:
    """Print the table and write the files. Raises UserError if a folder does not exist or `output_dir` cannot be written."""
    found = lines(find(folders))
    rows = table(found)
    text = report.markdown_table(HEADER, rows, TEXT_COLUMNS)
    print(text)
    if output_dir:
        written = {"compare.md": text + "\n", "compare.csv": csv_text(found), "compare.html": page(found, rows)}
        write(output_dir, written)


def write(folder: str, texts: Mapping[str, str]) -> None:
    """Write `texts` by file name. Raises UserError if the folder cannot be written."""
    try:
        with files.owner_writes_alone():
            for name, text in texts.items():
                files.replace(Path(folder) / name, text)
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); name a folder where files can be made"
        raise UserError(Problem("output_dir", folder, remedy)) from error
