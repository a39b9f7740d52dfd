"""What a run leaves behind: report.json, and report.md and the final table from the same numbers.

A value that does not apply is null; a key is never absent.
"""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

from prunadapt_ds import files

SCHEMA_VERSION = 1


def _nothing(*keys: str) -> dict[str, Any]:
    return dict.fromkeys(keys)


_SCHEMA: dict[str, Any] = {
    "schema": SCHEMA_VERSION,
    **_nothing("status", "task", "method", "criterion", "model", "seed"),
    **_nothing("world_size", "zero_stage", "dtype", "device"),
    "versions": _nothing("torch", "deepspeed", "transformers", "peft"),
    "metric": _nothing("teacher", "masked", "exported"),
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
        "peak_rank_bytes": _nothing("dense_phase", "after_shrink"),
    },
    "latency": _nothing(
        "dense_ms", "exported_ms", "batch_size", "seq_length", "dtype", "threads", "repeats", "speedup"
    ),
    "parity": _nothing("max_abs_logit_diff", "tolerance", "examples"),
    "exports": {},
}
_OPEN = ("metric.teacher", "metric.masked", "metric.exported", "exports", "structure", "progress")  # any keys, or rows
_PROGRESS = ("step", "phase", "loss", "sparsity", "samples_per_s", "live_tensor_bytes", "train_s")  # a row an interval


def empty() -> dict[str, Any]:
    """A report with every key and no value."""
    return copy.deepcopy(_SCHEMA)


def validate(report: dict[str, Any]) -> None:
    """Raise ValueError that names every key too many or too few."""
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
    """What is wrong inside the parts whose keys a run chooses."""
    wrong = []
    for kind, measures in report["metric"].items():
        if measures is not None and (not isinstance(measures, dict) or "score" not in measures):
            wrong.append(f"metric.{kind} is neither null nor an object with a score")
    for i, row in enumerate(report["structure"]):
        wrong += _differences(row, _nothing("layer", "heads", "neurons"), f"structure[{i}].")
    for i, row in enumerate(report["progress"]):
        wrong += _differences(row, _nothing(*_PROGRESS), f"progress[{i}].")
    for kind, export in report["exports"].items():
        wrong += _differences(export, _nothing("path", "needs_remote_code"), f"exports.{kind}.")
    return wrong


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON cannot say: null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(output_dir: Path, report: dict[str, Any]) -> None:
    """Write report.json and report.md, each complete or not at all."""
    validate(report)
    report = _finite(report)
    files.replace(output_dir / "report.md", markdown(report))
    files.replace(output_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")


def _number(value: float | None, text: str = "{:,.0f}", scale: float = 1) -> str:
    return "-" if value is None else text.format(value / scale)


def _share(kept: float | None, dense: float | None) -> str:
    return f" ({kept / dense:.1%})" if kept is not None and dense else ""


def _bytes(dense: int | None, after: int | None) -> tuple[str, str, str]:
    return _number(dense, "{:,.1f}", 2**20), _number(after, "{:,.1f}", 2**20) + _share(after, dense), "-"


def rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The final table: (what, teacher, masked, exported)."""
    metric, params, macs = report["metric"], report["params"], report["macs"]
    latency, memory, time = report["latency"], report["memory"], report["time"]
    names = list(dict.fromkeys(key for kind in ("masked", "exported") for key in metric[kind] or {}))
    table = [
        (
            name,
            *(_number((metric[kind] or {}).get(name), "{:.2f}", 0.01) for kind in ("teacher", "masked", "exported")),
        )
        for name in names
    ]
    kept_params, kept_macs = params["encoder_kept"], macs["kept"]
    dense_params, dense_macs = params["encoder_dense"], macs["dense"]
    smaller = _number(kept_params) + _share(kept_params, dense_params)
    table += [
        ("encoder parameters", _number(dense_params), smaller, smaller),
        (
            f"MACs, {macs['seq_length']} tokens (M)",
            _number(dense_macs, scale=1e6),
            *[_number(kept_macs, scale=1e6) + _share(kept_macs, dense_macs)] * 2,
        ),
        (
            f"latency (ms), batch {latency['batch_size']}",
            _number(latency["dense_ms"], "{:,.1f}"),
            "-",
            _number(latency["exported_ms"], "{:,.1f}") + _share(latency["exported_ms"], latency["dense_ms"]),
        ),
        ("train time (s)", "-", _number(time["train_s"], "{:,.1f}"), "-"),
        (
            "live memory per rank (MiB)",
            *_bytes(memory["live_tensor_bytes"]["dense"], memory["live_tensor_bytes"]["after_shrink"]),
        ),
        (
            "peak memory per rank (MiB)",
            *_bytes(memory["peak_rank_bytes"]["dense_phase"], memory["peak_rank_bytes"]["after_shrink"]),
        ),
    ]
    return table


_HEADER = ("", "teacher / dense", "masked", "exported")


def table(report: dict[str, Any]) -> str:
    """The final table as text, 100 columns wide at most."""
    from rich.console import Console
    from rich.table import Table

    title = f"{report['task']}  {report['method']}  sparsity {_number(report['sparsity']['achieved'], '{:.3f}')}"
    drawn = Table(title=title, title_justify="left")
    for i, name in enumerate(_HEADER):
        drawn.add_column(name, justify="left" if i == 0 else "right")
    for row in rows(report):
        drawn.add_row(*row)
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(drawn)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _progress_cells(row: dict[str, Any]) -> tuple[str, ...]:
    cells = (
        _number(row["loss"], "{:.4f}"),
        _number(row["sparsity"], "{:.3f}"),
        _number(row["samples_per_s"], "{:,.1f}"),
    )
    return str(row["step"]), str(row["phase"]), *cells, _number(row["live_tensor_bytes"], "{:,.1f}", 2**20)


def markdown(report: dict[str, Any]) -> str:
    """The report for reading."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cells) + " |"

    parity, time = report["parity"], report["time"]
    structure = [line((str(r["layer"]), str(r["heads"]), str(r["neurons"]))) for r in report["structure"]]
    seconds = [line((k, _number(v, "{:,.2f}"))) for k, v in time.items()]
    parts = [
        f"# {report['task']}: {report['method']} on {report['model']}",
        f"Status **{report['status']}**, seed {report['seed']}, {report['world_size']} rank(s), "
        f"ZeRO stage {report['zero_stage']}, {report['dtype']} on {report['device']}. "
        f"Sparsity {_number(report['sparsity']['achieved'], '{:.4f}')} "
        f"(target {_number(report['sparsity']['target'], '{:.4f}')}), plan `{report['plan_hash']}`.",
        "\n".join([line(_HEADER), "|---|---:|---:|---:|", *(line(row) for row in rows(report))]),
        f"Exported and trained model differ by at most {_number(parity['max_abs_logit_diff'], '{:.2e}')} in their logits "
        f"on {_number(parity['examples'])} examples (allowed: {_number(parity['tolerance'], '{:.2e}')}).",
        "## Kept units",
        "\n".join([line(("layer", "heads", "neurons")), "|---:|---:|---:|", *structure]),
        "## Time",
        "\n".join([line(("", "")), "|---|---:|", *seconds]),
        "## Progress",
        "\n".join(
            [
                line(("step", "phase", "loss", "sparsity", "samples/s", "live MiB per rank")),
                "|---:|---|---:|---:|---:|---:|",
                *(line(_progress_cells(row)) for row in report["progress"]),
            ]
        ),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"
