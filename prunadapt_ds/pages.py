"""The report as pages: report.md for terminals and code hosts, and a self-contained report.html for browsers.

They are made from the content of report.json and from plan.json, predictions.jsonl and metrics.jsonl. Files that are missing,
as after a run that ended early, are left out.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunadapt_ds import clocks, figures, files, report
from prunadapt_ds.figures import Picture

WORST = 10  # number of examples shown
Texts = Callable[[str, int], str]  # (validation set, index) -> the example's text
Prediction = Mapping[str, Any]  # a line of predictions.jsonl


def write(output_dir: Path, result: dict[str, Any], texts: Texts | None = None) -> None:
    """Write report.html, report.md and, last, report.json. `texts` looks up the texts of the worst examples."""
    result = report.finite(result)
    predictions = _lines(output_dir / "predictions.jsonl")
    examples = worst(predictions, result["labels"], texts)
    files.replace(output_dir / "report.html", page(result, pictures(output_dir, result, predictions), examples))
    report.write(output_dir, result, _examples_markdown(examples))


def _lines(path: Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                found.append(json.loads(line))
            except ValueError:
                if not skip_damaged:
                    raise
    return found


# ----------------------------------------------------------------------------------------------- worst examples

EXAMPLE_HEADER = ("example", "label", "prediction", "how wrong")


def worst(predictions: Sequence[Prediction], labels: Sequence[str], texts: Texts | None) -> list[report.Row]:
    """The exported model's `WORST` wrong answers, worst first: (example, label, prediction, how wrong)."""
    ranked = sorted(
        ((*_wrongness(p, labels), p) for p in predictions), key=lambda found: (-found[0], found[2]["index"])
    )
    rows = []
    for wrong, words, p in ranked[:WORST]:
        if wrong <= 0:
            break
        name = f"{p['split']} {p['index']}"
        text = texts(p["split"], p["index"]) if texts else ""
        rows.append((f"{name}: {text}" if text else name, *words))
    return rows


def _wrongness(p: Prediction, labels: Sequence[str]) -> tuple[float, report.Row]:
    """How wrong an answer is, 0 if it is right, and the texts (label, prediction, how wrong)."""
    answer = p["exported"]
    if "nll" in answer:
        nll = answer["nll"] / max(1, answer["tokens"])
        return nll, ("-", "-", f"{nll:.2f} nats per token")
    if not labels:
        error = abs(answer["prediction"] - p["label"])
        return error, (f"{p['label']:g}", f"{answer['prediction']:.6g}", f"off by {error:.3g}")
    wrong, right = answer["prediction"], p["label"]
    if wrong == right:
        return 0.0, ("", "", "")
    odds = [math.exp(z - max(answer["logits"])) for z in answer["logits"]]
    words = f"{odds[wrong] / sum(odds):.1%} sure"
    return answer["logits"][wrong] - answer["logits"][right], (labels[right], labels[wrong], words)


def _examples_markdown(examples: Sequence[report.Row]) -> str:
    if not examples:
        return ""
    return "\n## Worst examples\n\n" + report.markdown_table(EXAMPLE_HEADER, examples, 4) + "\n"


# ---------------------------------------------------------------------------------------------------- pictures


def pictures(output_dir: Path, result: Mapping[str, Any], predictions: Sequence[Prediction]) -> list[Picture]:
    """All pictures that can be drawn from the run's files."""
    found: list[Picture | None] = []
    plan = output_dir / "plan.json"
    if plan.is_file():
        found.append(figures.drawn(figures.structure, json.loads(plan.read_text(encoding="utf-8"))))
    if result["progress"]:
        found.append(figures.drawn(figures.course, result["progress"], scores_over_steps(output_dir)))
    found.append(_outcome(predictions, result["labels"]))
    found.append(figures.drawn(figures.bars, "Where the training time went", _seconds(result["time"]), "s"))
    found.append(figures.drawn(figures.bars, "Memory per rank", _memory(result["memory"]), "MiB", 2**20))
    return [picture for picture in found if picture is not None]


def scores_over_steps(output_dir: Path) -> list[tuple[int, float]]:
    """(step, score) of every evaluation in metrics.jsonl, in order; of several at one step, the last."""
    lines = _lines(output_dir / "metrics.jsonl", skip_damaged=True)  # a full disk leaves half a line
    return sorted({line["step"]: line["eval/score"] for line in lines if line.get("eval/score") is not None}.items())


def _outcome(predictions: Sequence[Prediction], labels: Sequence[str]) -> Picture | None:
    answers = [(p["label"], p["exported"]["prediction"]) for p in predictions if "label" in p]
    if not answers:
        return None
    true, predicted = zip(*answers, strict=True)
    if labels:
        return figures.drawn(figures.confusion, true, predicted, labels)
    return figures.drawn(figures.scatter, true, predicted)


def _seconds(time: Mapping[str, Any]) -> dict[str, float | None]:
    return {name.replace("_", " "): time.get(f"{name}_s") for name in clocks.TRAINING}


def _memory(memory: Mapping[str, Any]) -> dict[str, float | None]:
    """Counted live bytes and their parts, then measured peaks and the frozen shard."""
    parts, live, peak = memory["live_parts_bytes"], memory["live_tensor_bytes"], memory["peak_rank_bytes"]
    found: dict[str, float | None] = {}
    for kind, name in (("dense", "dense"), ("after_shrink", "pruned")):
        found[f"live, {name}"] = live[kind]
        found |= {f"{part}, {name}": parts[kind][part] for part in report.LIVE_PARTS}
    return found | {
        "peak, dense phase": peak["dense_phase"],
        "peak, pruned": peak["after_shrink"],
        "frozen shard": memory["frozen_shard_bytes"],
    }


# -------------------------------------------------------------------------------------------------------- html


def html_table(header: report.Row, rows: Sequence[report.Row], caption: str, text_columns: int = 1) -> str:
    """An HTML table with a caption; the first cell of each row is the row's heading."""

    def cell(text: str, place: int, scope: str) -> str:
        kind = "first" if place == 0 else "text" if place < text_columns else "number"
        tag, attributes = ("th", f' scope="{scope}"') if scope == "col" or place == 0 else ("td", "")
        return f'<{tag}{attributes} class="{kind}">{html.escape(text)}</{tag}>'

    def row(cells: report.Row, scope: str) -> str:
        return f"<tr>{''.join(cell(text, place, scope) for place, text in enumerate(cells))}</tr>"

    body = "".join(row(cells, "row") for cells in rows)
    label = html.escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead>{row(header, 'col')}</thead><tbody>{body}</tbody></table></div>"
    )


def image(picture: Picture) -> str:
    """The picture as an inline `<figure>`, with its alternative text."""
    data = base64.b64encode(picture.svg.encode()).decode()
    title, alt = html.escape(picture.title), html.escape(picture.alt)
    return f'<figure><figcaption>{title}</figcaption><img alt="{alt}" src="data:image/svg+xml;base64,{data}"></figure>'


def page(result: dict[str, Any], drawn: Sequence[Picture], examples: Sequence[report.Row]) -> str:
    """The text of report.html."""
    title = html.escape(f"{result['task']}: {result['method']} on {report.short_model(str(result['model']))}")
    cards = "".join(
        f"<li><b>{html.escape(figure)}</b> <span>{html.escape(what)}</span> <small>{html.escape(beside)}</small></li>"
        for what, figure, beside in report.headline(result)
    )
    setting = html.escape(report.setting(result)).replace("**", "").replace("`", "")
    parts = [
        f"<h1>{title}</h1><p>{setting}</p><ul class=cards>{cards}</ul>",
        html_table(report.SCORE_HEADER, report.scores(result), "Scores"),
        html_table(report.COST_HEADER, report.costs(result), "Costs"),
        *(f"<p>{html.escape(note)}</p>" for note in report.notes(result)),
        f"<div class=pictures>{''.join(map(image, drawn))}</div>",
    ]
    if examples:
        parts.append(html_table(EXAMPLE_HEADER, examples, "Worst examples of the exported model", 4))
    rows = [report.progress_cells(row) for row in result["progress"]]
    parts.append(
        f"<details><summary>Every interval</summary>{html_table(report.PROGRESS_HEADER, rows, 'Progress')}</details>"
    )
    if result["command"]:
        label = 'class=scroll tabindex=0 role=region aria-label="Command"'
        parts.append(f"<h2>Command</h2><pre {label}>{html.escape(result['command'])}</pre>")
    parts.append(f"<p>{html.escape(report.versions(result))}</p>")
    return document(title, "\n".join(parts))


def document(title: str, body: str) -> str:
    """A page in this package's style. `title` and `body` must already be HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_CSS}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


_CSS = """
body { margin: 0; background: #fff; color: #1b2a41; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; }
p { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; padding: 0; list-style: none; }
.cards li { border: 1px solid #b8c0cc; border-radius: .5rem; padding: .6rem .7rem; }
.cards b { display: block; font-size: 1.55rem; line-height: 1.2; }
.cards small { display: block; color: #4a5568; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; font-weight: 600; font-size: 1.1rem; padding: .3rem 0; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #d5dae1; vertical-align: top; }
thead th { border-bottom: 2px solid #1b2a41; }
tbody th { font-weight: inherit; }
.first, .text { text-align: left; } .first { min-width: 9rem; } .number { text-align: right; white-space: nowrap; }
.pictures { columns: 26rem; column-gap: 1rem; }
figure { margin: 0 0 1rem; break-inside: avoid; border: 1px solid #d5dae1; border-radius: .5rem; padding: .6rem; }
figcaption { font-weight: 600; padding-bottom: .3rem; }
img { width: 100%; height: auto; }
pre { background: #f3f5f8; padding: .7rem; border-radius: .5rem; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 30rem) {
  th, td { padding: .3rem .25rem; font-size: .82rem; }
  .first { min-width: 5.5rem; overflow-wrap: anywhere; }
  .number { white-space: normal; }
}
@media print { details { display: block; } .scroll { overflow: visible; } }
"""
