"""A run's report.json, and report.md and the final table with the same numbers.

A value that does not apply is null; no key is ever absent.
"""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prunadapt_ds import files
from prunadapt_ds.hub import could_be_id

SCHEMA_VERSION = 1


LIVE_PARTS = ("parameters", "optimizer", "activations")  # they add up to live_tensor_bytes


PACKAGES = ("prunadapt_ds", "torch", "deepspeed", "transformers", "peft")


def _nothing(*keys: str) -> dict[str, Any]:
    return dict.fromkeys(keys)


_SCHEMA: dict[str, Any] = {
    "schema": SCHEMA_VERSION,
    **_nothing("status", "task", "method", "criterion", "model", "seed"),
    **_nothing("world_size", "zero_stage", "dtype", "device"),
    **_nothing("launcher", "nodes", "command"),
    "labels": [],
    "versions": _nothing("python", *PACKAGES),
    "metric": _nothing("teacher", "masked", "exported"),
    "distillation": _nothing("r2", "followed"),  # the teacher's R2 on training examples, and whether it was used
    "params": _nothing("encoder_dense", "encoder_kept", "total_dense", "total_kept", "trainable"),
    "macs": _nothing("dense", "kept", "seq_length"),
    "sparsity": _nothing("target", "achieved"),
    "structure": [],
    "plan_hash": None,
    "time": _nothing(
        "train_s",
        "train_cpu_s",
        "dense_phase_s",
        "prune_phase_s",
        "recover_phase_s",
        "teacher_s",
        "importance_s",
        "shrink_s",
        "checkpoint_s",
        "steps",
        "samples_per_s",
        "dense_step_s",
        "last_step_s",
        "last_step_cpu_s",
        "dense_step_cpu_s",
    ),
    "progress": [],
    "memory": {
        "frozen_shard_bytes": None,
        "live_tensor_bytes": _nothing("dense", "after_shrink"),
        "live_parts_bytes": {kind: _nothing(*LIVE_PARTS) for kind in ("dense", "after_shrink")},
        "peak_rank_bytes": _nothing("dense_phase", "after_shrink"),
    },
    "communication": {"sent_bytes": _nothing("dense", "after_shrink")},  # per rank and optimizer step
    "latency": _nothing(
        *("dense_ms", "exported_ms", "batch_size", "seq_length", "dtype", "threads", "repeats", "speedup"),
        *("target_speedup", "table_speedup", "dense_ms_batch_1", "exported_ms_batch_1"),
    ),
    "parity": _nothing("max_abs_logit_diff", "tolerance", "examples"),
    "exports": {},
}
_OPEN = ("metric.teacher", "metric.masked", "metric.exported", "exports", "structure", "progress")  # free keys, or rows
_OF_EXPORT = dict.fromkeys(("onnx", "torch_export"), ("parity", "latency"))  # proven and timed separately
_PROGRESS = ("step", "phase", "loss", "sparsity", "samples_per_s", "live_tensor_bytes", "train_s")  # per interval


def empty() -> dict[str, Any]:
    """A report with all keys, where no value is known yet."""
    return copy.deepcopy(_SCHEMA)


def fill(report: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """Set fields of a report, in place; of a field that is an object, only what `facts` has of it."""
    for name, fact in facts.items():
        report[name] = {**report[name], **fact} if isinstance(fact, dict) else fact


def validate(report: dict[str, Any]) -> None:
    """Raise ValueError if the report does not follow the schema. It names every missing and every unknown key."""
    wrong = sorted(_differences(report, _SCHEMA, ""))
    if not wrong:
        wrong = sorted(_contents(report))
    if wrong:
        raise ValueError("the report does not follow its schema: " + "; ".join(wrong))


def _differences(found: Any, wanted: dict[str, Any], prefix: str) -> list[str]:
    if not isinstance(found, dict):
        return [f"{prefix.rstrip('.')} is not an object"]
    wrong = [f"{prefix}{key} is missing" for key in wanted.keys() - found.keys()]
    wrong += [f"{prefix}{key} is unknown" for key in found.keys() - wanted.keys()]
    for key in wanted.keys() & found.keys():
        if isinstance(wanted[key], dict) and f"{prefix}{key}" not in _OPEN:
            wrong += _differences(found[key], wanted[key], f"{prefix}{key}.")
    return wrong


def _contents(report: dict[str, Any]) -> list[str]:
    """The errors in the parts of a report whose keys or rows depend on the run."""
    wrong = []
    for kind, measures in report["metric"].items():
        if measures is not None and (not isinstance(measures, dict) or "score" not in measures):
            wrong.append(f"metric.{kind} is neither null nor an object with a score")
    for i, row in enumerate(report["structure"]):
        wrong += _differences(row, _nothing("layer", "heads", "neurons"), f"structure[{i}].")
    for i, row in enumerate(report["progress"]):
        wrong += _differences(row, _nothing(*_PROGRESS), f"progress[{i}].")
    for kind, export in report["exports"].items():
        wrong += _differences(
            export, _nothing("path", "needs_remote_code", *_OF_EXPORT.get(kind, ())), f"exports.{kind}."
        )
    return wrong


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON cannot represent."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite(report: dict[str, Any]) -> dict[str, Any]:
    """The report in the form that report.json has. Raises ValueError if it does not follow the schema."""
    validate(report)
    return _finite(report)


def write(output_dir: Path, report: dict[str, Any], more: str = "") -> None:
    """Write report.json and report.md (with `more` appended), each complete or not at all."""
    report = finite(report)
    files.replace(output_dir / "report.md", markdown(report) + more)
    files.replace(output_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")


def _number(value: float | None, text: str = "{:,.0f}", scale: float = 1) -> str:
    return "-" if value is None else text.format(value / scale)


def _share(kept: float | None, dense: float | None) -> str:
    return f" ({kept / dense:.1%})" if kept is not None and dense else ""


def short_model(model: str) -> str:
    """The last part of a path to a folder; a name on the hub, which has at most one slash, is unchanged."""
    return model if could_be_id(model) else model.rstrip("/").rpartition("/")[2]


Row = tuple[str, ...]
SCORE_HEADER = ("score", "teacher", "masked", "exported")
COST_HEADER = ("cost", "dense", "pruned")


def scores(report: dict[str, Any]) -> list[Row]:
    """The rows of the score table: every measure in percent, except perplexity.

    The teacher is the run's own model before its first cut.
    """
    metric = report["metric"]
    kinds = SCORE_HEADER[1:]
    names = list(dict.fromkeys(key for kind in kinds for key in metric[kind] or {}))
    scale = 1 if report["task"] == "causal_lm" else 0.01
    return [(name, *(_number((metric[kind] or {}).get(name), "{:.2f}", scale) for kind in kinds)) for name in names]


def _compared(name: str, dense: float | None, pruned: float | None, text: str = "{:,.1f}", scale: float = 1) -> Row:
    return name, _number(dense, text, scale), _number(pruned, text, scale) + _share(pruned, dense)


def costs(report: dict[str, Any]) -> list[Row]:
    """The rows of the cost table: the dense model, the pruned one, and their ratio."""
    params, macs, latency, time = report["params"], report["macs"], report["latency"], report["time"]
    live, peak = report["memory"]["live_tensor_bytes"], report["memory"]["peak_rank_bytes"]
    sent = report.get("communication", _SCHEMA["communication"])["sent_bytes"]  # older reports lack these keys
    single = latency.get("dense_ms_batch_1"), latency.get("exported_ms_batch_1")
    return [
        _compared("encoder parameters", params["encoder_dense"], params["encoder_kept"], "{:,.0f}"),
        _compared(f"MACs, {macs['seq_length']} tokens (M)", macs["dense"], macs["kept"], "{:,.0f}", 1e6),
        *([_compared("latency (ms), batch 1", *single)] if latency["batch_size"] != 1 else []),
        _compared(f"latency (ms), batch {latency['batch_size']}", latency["dense_ms"], latency["exported_ms"]),
        _compared("training step (s)", time["dense_step_s"], time["last_step_s"], "{:,.3f}"),
        _compared("live memory per rank (MiB)", live["dense"], live["after_shrink"], scale=2**20),
        _compared("peak memory per rank (MiB)", peak["dense_phase"], peak["after_shrink"], scale=2**20),
        _compared("sent per rank and step (MiB)", sent["dense"], sent["after_shrink"], scale=2**20),
        ("train time (s), in total", "-", _number(time["train_s"], "{:,.1f}")),
    ]


def headline(report: Mapping[str, Any]) -> list[Row]:
    """The run's main results: (name, value, what it is compared with)."""
    time, latency, live = report["time"], report["latency"], report["memory"]["live_tensor_bytes"]
    dense = "of the dense model's"
    shares = [
        ("parameters", report["params"]["encoder_kept"], report["params"]["encoder_dense"], f"{dense}, blocks only"),
        ("MACs", report["macs"]["kept"], report["macs"]["dense"], dense),
        ("latency", latency["exported_ms"], latency["dense_ms"], f"{dense}, batch {latency['batch_size']}"),
        ("training step", time["last_step_s"], time["dense_step_s"], "of the dense model's"),
        ("memory", live["after_shrink"], live["dense"], "of the dense phase's live bytes"),
    ]
    cards: list[Row] = _score_card(report)
    cards += [(name, f"{kept / of:.0%}", beside) for name, kept, of, beside in shares if kept is not None and of]
    if time["train_s"] is not None:
        cards.append(("training", f"{time['train_s']:,.0f} s", f"{time['steps']} steps"))
    return cards


def _score_card(report: Mapping[str, Any]) -> list[Row]:
    """The exported model's score and the share of the teacher's that it keeps; for perplexity, the ratio of the two."""
    exported, teacher = ((report["metric"][kind] or {}).get("score") for kind in ("exported", "teacher"))
    if exported is None:
        return []
    is_language = report["task"] == "causal_lm"
    name, scale = ("perplexity", 1) if is_language else ("score", 100)
    beside = "exported model"
    if teacher is not None:
        beside = f"teacher: {teacher * scale:.1f}"
    if teacher is not None and teacher > 0:
        beside += f", {exported / teacher:.2f} times that" if is_language else f", {exported / teacher:.1%} kept"
    return [(name, f"{exported * scale:.1f}", beside)]


def table(report: dict[str, Any]) -> str:
    """The final tables as text, at most 100 columns wide."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    title = f"{report['task']}  {report['method']}  sparsity {_number(report['sparsity']['achieved'], '{:.3f}')}"
    for header, rows in ((SCORE_HEADER, scores(report)), (COST_HEADER, costs(report))):
        drawn = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            drawn.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn)
        title = ""
    if text := speedup(report):
        console.print(text, highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def markdown_table(header: Row, rows: Iterable[Row], text_columns: int = 1) -> str:
    """A Markdown table. The first `text_columns` columns are aligned as text, the others as numbers."""

    def line(cells: Row) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "---|" * text_columns + "---:|" * (len(header) - text_columns)
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


PROGRESS_HEADER = ("phase", "step", "loss", "sparsity", "samples/s", "live MiB per rank")


def progress_cells(row: dict[str, Any]) -> Row:
    cells = (
        _number(row["loss"], "{:.4f}"),
        _number(row["sparsity"], "{:.3f}"),
        _number(row["samples_per_s"], "{:,.1f}"),
    )
    return str(row["phase"]), str(row["step"]), *cells, _number(row["live_tensor_bytes"], "{:,.1f}", 2**20)


def setting(report: dict[str, Any]) -> str:
    """The run's settings in one paragraph."""
    launcher = f" by {report['launcher']}" if report["launcher"] else ""
    where = f"{report['world_size']} rank(s){launcher} on {report['nodes'] or 1} node(s)"
    return (
        f"Status **{report['status']}**, seed {report['seed']}, {where}, "
        f"ZeRO stage {report['zero_stage']}, {report['dtype']} on {report['device']}. "
        f"Sparsity {_number(report['sparsity']['achieved'], '{:.4f}')} "
        f"(target {_number(report['sparsity']['target'], '{:.4f}')}), plan `{report['plan_hash']}`."
    )


def notes(report: dict[str, Any]) -> list[str]:
    """Notes that the tables need; none about anything the run did not do."""
    return [text for text in (teacher(report), parity(report), speedup(report)) if text]


def teacher(report: dict[str, Any]) -> str:
    if report["metric"]["teacher"] is None:
        return ""
    text, found = "The teacher comes from this run's own dense phase, before the first cut.", report["distillation"]
    if found["followed"] is False:
        text += f" It was not used, because its R2 on training examples was only {found['r2']:.1%}."
    return text


def parity(report: dict[str, Any]) -> str:
    found = report["parity"]
    if found["max_abs_logit_diff"] is None:  # nothing has been exported yet
        return ""
    return (
        f"The exported and the trained model differ by at most {_number(found['max_abs_logit_diff'], '{:.2e}')} in their logits, "
        f"computed in fp32, on {_number(found['examples'])} examples (tolerance: {_number(found['tolerance'], '{:.2e}')})."
    )


def live_parts(report: dict[str, Any]) -> list[Row]:
    """A rank's live bytes by kind, in MiB; [] if no step was taken."""
    parts = report["memory"]["live_parts_bytes"]
    rows = [(name, parts["dense"][name], parts["after_shrink"][name]) for name in LIVE_PARTS]
    return [_compared(*row, scale=2**20) for row in rows if row[1:] != (None, None)]


def speedup(report: dict[str, Any]) -> str:
    """The requested, the predicted and the measured speed-up in one sentence; "" if no speed-up was requested."""
    found = report["latency"]
    if found["target_speedup"] is None:
        return ""
    target, table, measured = (_number(found[key], "{:.2f}") for key in ("target_speedup", "table_speedup", "speedup"))
    return (
        f"Speed-up: {target} requested, {table} predicted from the times of single sub-layers, {measured} measured on "
        f"the whole exported model (batch {found['batch_size']}, {found['seq_length']} tokens, {found['dtype']})."
    )


def versions(report: dict[str, Any]) -> str:
    return "Versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + "."


def markdown(report: dict[str, Any]) -> str:
    """The text of report.md."""
    structure = [(str(r["layer"]), str(r["heads"]), str(r["neurons"])) for r in report["structure"]]
    seconds = [(key, _number(value, "{:,.2f}")) for key, value in report["time"].items()]
    memory = live_parts(report)
    parts = [
        f"# {report['task']}: {report['method']} on {short_model(str(report['model']))}",
        "\n".join(f"- **{figure}** {what} ({beside})" for what, figure, beside in headline(report)),
        setting(report),
        markdown_table(SCORE_HEADER, scores(report)),
        markdown_table(COST_HEADER, costs(report)),
        *notes(report),
        "## Kept units",
        markdown_table(("layer", "heads", "neurons"), structure, 0),
        "## Time",
        markdown_table(("", ""), seconds),
        *(["## Live memory per rank (MiB)", markdown_table(("", "dense", "pruned"), memory)] if memory else []),
        "## Progress",
        markdown_table(PROGRESS_HEADER, map(progress_cells, report["progress"])),
        versions(report),
    ]
    if report["command"]:
        parts.append(f"Command:\n\n```\n{report['command']}\n```")
    return "\n\n".join(filter(None, parts)) + "\n"
