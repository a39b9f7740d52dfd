"""Pictures of a run, each with an alternative text that says the same. No meaning depends on hue alone.

Plain functions from a run's results to SVG text: nothing here reads a file or depends on a model.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH = 4.8  # inches: narrow, so that text stays legible on a phone
INK, PAPER, ACCENT, SECOND = "#1b2a41", "#ffffff", "#0072b2", "#d55e00"  # the last two also differ in lightness
PHASE_TONES = {"dense": "#ffffff", "prune": "#dcdcdc", "recover": "#f2f2f2"}
MISTAKES = 10  # pairs of classes in a confusion matrix's alternative text
MOST_NAMED, MOST_CHARACTERS, MOST_ABREAST = (
    24,
    24,
    30,
)  # of a matrix's classes: how many, in a name, in names side by side
BLOCKS = 24  # groups of neurons in a picture, whatever the layer's width
STYLE: Any = {
    "font.size": 8.5,
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,  # names of classes and runs may contain dollar signs
    "svg.hashsalt": "prunadapt",  # makes the files of equal runs equal
}


@dataclass(frozen=True)
class Picture:
    """One figure. `alt`: its alternative text."""

    title: str
    alt: str
    svg: str


def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure `height` inches high, and its axes."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=PAPER)
    return drawing, drawing.subplots(rows, columns, **options)


def picture(title: str, alt: str, figure: Any) -> Picture:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return Picture(title, alt, svg[svg.index("<svg") :])


def drawn(function: Any, *arguments: Any) -> Any:
    """Call `function(*arguments)` with matplotlib set to `STYLE`, and restore the caller's settings.

    Characters that its font lacks are drawn as boxes, without a word on the console; alternative texts have them.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font", UserWarning)
        return function(*arguments)


# ------------------------------------------------------------------------------------------------- structure


def kept_tables(plan: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tables of what plan.json keeps: "heads" [layers, max heads], 1 or 0, and "neurons" [layers, BLOCKS], the share kept.

    NaN where a layer has fewer columns.
    """
    tables = {}
    for kind in ("heads", "neurons"):
        units = [u for u in plan["units"] if u["kind"] == kind]
        masks = [np.isin(np.arange(u["dense"]), u["kept"]).astype(float) for u in units]
        if masks:
            tables[kind] = in_blocks(masks) if kind == "neurons" else padded(masks)
    return tables


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of unequal length as one table: float [rows, max length], padded with NaN."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def in_blocks(rows: Sequence[np.ndarray], blocks: int = BLOCKS) -> np.ndarray:
    """Means of each row over `blocks` groups of neighbouring entries: [rows, blocks], fewer columns if all rows are shorter."""
    return padded([np.array([part.mean() for part in np.array_split(row, min(blocks, len(row)))]) for row in rows])


def heatmap(
    axis: Any, table: np.ndarray, title: str, *, lowest: float | None = None, highest: float | None = None
) -> Any:
    """Draw a table [layers, columns] with darker cells for higher values. Returns the image."""
    image = axis.imshow(
        np.ma.masked_invalid(table), cmap="Greys", aspect="auto", vmin=lowest, vmax=highest, interpolation="nearest"
    )
    axis.set_title(title, fontsize=8.5, loc="left")
    rows, columns = table.shape
    # Lines instead of a grid of minor ticks: matplotlib lays out every tick, which adds half a second to a decision.
    for draw, count, length in ((axis.hlines, rows, columns), (axis.vlines, columns, rows)):
        draw(np.arange(1, count) - 0.5, -0.5, length - 0.5, color="#bbbbbb", linewidth=0.4).set_in_layout(False)
    axis.tick_params(length=0)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.xaxis.get_major_locator().set_params(integer=True)
    return image


def structure(plan: Mapping[str, Any]) -> Picture:
    """A picture of which heads were kept, and which share of each group of neurons."""
    tables = kept_tables(plan)
    rows = max(len(table) for table in tables.values())
    drawing, axes = figure(min(7.0, 0.9 + 0.17 * rows), 1, len(tables), squeeze=False)
    names = {"heads": "attention heads", "neurons": f"neurons, in {BLOCKS} groups"}
    words = []
    for axis, (kind, table) in zip(axes[0], tables.items(), strict=True):
        heatmap(axis, table, names[kind], lowest=-0.12, highest=1)
        axis.set_xlabel("head" if kind == "heads" else "group")
        units = [u for u in plan["units"] if u["kind"] == kind]
        shares = [f"{u['layer']}: {len(u['kept'])} of {u['dense']}" for u in units]
        words.append(f"{kind} kept by layer: " + ", ".join(shares))
    axes[0][0].set_ylabel("layer")
    return picture("What was kept (dark) and what was cut (light)", "; ".join(words) + ".", drawing)


# ---------------------------------------------------------------------------------------------------- course


def spans(progress: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(phase, first step, last step) of every phase, in order; a phase starts at the last step of the one before."""
    found: list[tuple[str, int, int]] = []
    for row in progress:
        if found and found[-1][0] == row["phase"]:
            found[-1] = (row["phase"], found[-1][1], row["step"])
        else:
            found.append((row["phase"], found[-1][2] if found else 0, row["step"]))
    return found


def course(progress: Sequence[Mapping[str, Any]], scores: Sequence[tuple[int, float]] = ()) -> Picture:
    """A picture of sparsity, loss, samples per second and score over the steps, with shaded phases."""
    rows = [(name, [row[key] for row in progress]) for name, key in _COURSE]
    drawing, axes = figure(1.2 + 0.85 * (len(rows) + bool(scores)), len(rows) + bool(scores), 1, sharex=True)
    phases = spans(progress)
    for axis in axes:
        for phase, start, end in phases:
            axis.axvspan(start, end, color=PHASE_TONES.get(phase, PAPER), linewidth=0)
    for phase, start, end in phases:
        axes[0].text((start + end) / 2, 1.04, phase, transform=axes[0].get_xaxis_transform(), ha="center", fontsize=7.5)
    for axis, (name, values) in zip(axes, rows, strict=False):
        axis.plot([row["step"] for row in progress], [_value(v) for v in values], color=INK)
        axis.set_ylabel(name)
    if scores:
        axes[-1].plot(*zip(*scores, strict=True), color=SECOND, linestyle="--", marker="o", markersize=4)
        axes[-1].set_ylabel("score")
    axes[-1].set_xlabel("step")
    drawing.align_ylabels(axes)
    where = ", ".join(f"{phase} from step {start} to {end}" for phase, start, end in phases)
    ends = f"sparsity ends at {progress[-1]['sparsity']:.3f}" + (f", score at {scores[-1][1]:.3f}" if scores else "")
    return picture("Sparsity, loss, speed and score over the steps", f"Phases: {where}; {ends}.", drawing)


_COURSE = (("sparsity", "sparsity"), ("loss", "loss"), ("samples/s", "samples_per_s"))


def _value(number: float | None) -> float:
    return np.nan if number is None else number


# ------------------------------------------------------------------------------------------------- breakdown


def bars(title: str, parts: Mapping[str, float | None], unit: str, scale: float = 1.0) -> Picture | None:
    """A picture of horizontal bars labelled with their values; None if no value is known."""
    known = {name: value / scale for name, value in parts.items() if value is not None}
    if not known:
        return None
    drawing, axis = figure(0.45 + 0.28 * len(known))
    names, values = list(known), list(known.values())
    places = range(len(names))
    axis.barh(places, values, color=ACCENT, height=0.62)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xlim(0, (max(values) or 1) * 1.22)
    for place, value in zip(places, values, strict=True):
        axis.text(value, place, f" {value:,.1f} {unit}", va="center")
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(length=0)
    alt = ", ".join(f"{name} {value:,.1f} {unit}" for name, value in known.items())
    return picture(title, alt + ".", drawing)


# -------------------------------------------------------------------------------------------------- outcomes


def confusion(labels: Sequence[int], predictions: Sequence[int], names: Sequence[str]) -> Picture:
    """A confusion matrix: numbers of examples by label (rows) and prediction (columns)."""
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (np.asarray(labels, dtype=int), np.asarray(predictions, dtype=int)), 1)
    drawing, axis = figure(1.4 + 0.42 * min(len(names), MOST_NAMED))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Greys", vmin=0, vmax=1.15, aspect="auto")
    show = len(names) <= 12
    for (i, j), count in np.ndenumerate(counts) if show else ():
        axis.text(j, i, str(count), ha="center", va="center", color=PAPER if shares[i, j] > 0.55 else INK)
    ticks = [shorten(name) for name in names] if len(names) <= MOST_NAMED else []  # more could not be read
    few = sum(map(len, ticks)) <= MOST_ABREAST
    axis.set_xticks(range(len(ticks)), ticks, rotation=0 if few else 45, ha="center" if few else "right")
    axis.set_yticks(range(len(ticks)), ticks)
    axis.set_xlabel("predicted")
    axis.set_ylabel("labelled")
    axis.tick_params(length=0)
    return picture("Confusion matrix of the exported model", _confused(counts, names), drawing)


def shorten(name: str) -> str:
    return name if len(name) <= MOST_CHARACTERS else f"{name[: MOST_CHARACTERS - 1]}…"


def _confused(counts: np.ndarray, names: Sequence[str]) -> str:
    """The matrix in words: the number of correct predictions and the most frequent mistakes."""
    mistakes = sorted(
        ((int(count), i, j) for (i, j), count in np.ndenumerate(counts) if i != j and count),
        key=lambda found: (-found[0], *found[1:]),
    )
    words = [f"{count} labelled {names[i][:40]} but predicted {names[j][:40]}" for count, i, j in mistakes[:MISTAKES]]
    if rest := mistakes[MISTAKES:]:
        words.append(f"{sum(count for count, *_ in rest)} in {len(rest)} other pairs")
    return f"{int(np.trace(counts))} of {counts.sum()} examples are right." + (f" {'; '.join(words)}." if words else "")


def scatter(labels: Sequence[float], predictions: Sequence[float]) -> Picture:
    """A scatter plot of predicted numbers against labels."""
    drawing, axis = figure(3.4)
    low, high = min(*labels, *predictions), max(*labels, *predictions)
    axis.plot([low, high], [low, high], color="#888888", linewidth=1, linestyle="--")
    axis.scatter(labels, predictions, s=9, color=ACCENT, alpha=0.5, linewidths=0)
    axis.set_xlabel("labelled")
    axis.set_ylabel("predicted")
    error = float(np.mean(np.abs(np.subtract(labels, predictions))))
    alt = f"{len(labels)} examples; predictions are off by {error:.3g} on average. The dashed line marks correct predictions."
    return picture("Predictions against labels", alt, drawing)
