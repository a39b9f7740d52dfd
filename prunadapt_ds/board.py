"""What TensorBoard shows besides curves: pictures and histograms of every decision, and the run as a row in "HParams".

All functions take a SummaryWriter and are called only on rank 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunadapt_ds import figures
from prunadapt_ds.budget import PruningPlan

TAGS = {
    "sparsity/target": "pruning/target_sparsity",
    "sparsity/achieved": "pruning/sparsity",
    "samples/s": "efficiency/samples_per_second",
    "memory/parameters(bytes)": "efficiency/parameters_MiB",
    "memory/live(bytes)": "efficiency/live_MiB",
    "communication/sent(bytes)": "efficiency/sent_per_step_MiB",
    "time/train(s)": "efficiency/train_seconds",
}
"""Metrics that have another name in TensorBoard than in metrics.jsonl. Memory and bytes sent are per rank."""
DOTS_PER_INCH = 200  # high, because pictures are viewed enlarged

LAYOUT = {
    "run": {
        "score": ["Multiline", ["eval/score"]],
        "sparsity": ["Multiline", [TAGS["sparsity/achieved"], TAGS["sparsity/target"]]],
        "speed": ["Multiline", [TAGS["samples/s"]]],
        "loss": ["Multiline", ["train/loss"]],
        "memory (MiB)": ["Multiline", [TAGS["memory/live(bytes)"], TAGS["memory/parameters(bytes)"]]],
    }
}


def tag(metric: str) -> str:
    """A metric's name in TensorBoard, in the group train, distillation, eval, pruning or efficiency."""
    return TAGS.get(metric, metric.replace("learning_rate/", "train/learning_rate_"))


def scaled(metric: str, value: float) -> float:
    """The value that TensorBoard shows: MiB where metrics.jsonl has bytes, which would be shown as 5.5e+7."""
    return value / 2**20 if metric.endswith("(bytes)") else value


def begin(writer: Any) -> None:
    """Add a dashboard with score, sparsity, speed, loss and memory ("Custom Scalars")."""
    writer.add_custom_scalars(LAYOUT)


def decision(writer: Any, *, step: int, plan: PruningPlan, scores: Tensor, gates: Tensor) -> None:
    """Write one decision: the scores, float [U], the plan made from them, and `gates`, float [physically present units]."""
    tables = score_tables(plan, scores)
    for name, draw, table in (
        ("importance", importance_figure, tables),
        ("kept", kept_figure, figures.kept_tables(plan.to_dict())),
    ):
        figure = figures.drawn(draw, table)
        figure.set_dpi(DOTS_PER_INCH)
        writer.add_figure(f"pruning/{name}", figure, step)
    for kind in tables:
        values = torch.cat([scores[s.span] for s in plan.structure.sublayers if s.kind == kind]).float()
        writer.add_histogram(f"pruning/log10_scores_{kind}", values.clamp(min=1e-20).log10(), step)
    writer.add_histogram("pruning/gates", gates, step)
    counts = [f"| {row['layer']} | {row.get('heads', '-')} | {row.get('neurons', '-')} |" for row in plan.counts()]
    writer.add_text("plan", "\n".join(["| layer | heads | neurons |", "|---|---|---|", *counts]), step)
    for kind in tables:
        kept = sum(len(k) for s, k in zip(plan.structure.sublayers, plan.kept, strict=True) if s.kind == kind)
        writer.add_scalar(f"pruning/kept_{kind}", kept, step)


def score_tables(plan: PruningPlan, scores: Tensor) -> dict[str, np.ndarray]:
    """log10 of the scores: "heads" [layers, max heads] and "neurons" [layers, BLOCKS], the mean of each group of neurons."""
    tables = {}
    for kind in dict.fromkeys(s.kind for s in plan.structure.sublayers):
        rows = [scores[s.span].double().cpu().numpy() for s in plan.structure.sublayers if s.kind == kind]
        table = figures.padded(rows) if kind == "heads" else figures.in_blocks(rows)
        tables[kind] = np.log10(np.maximum(table, 1e-20))
    return tables


def importance_figure(tables: Mapping[str, np.ndarray]) -> Any:
    """A heatmap per kind, dark where important. Each panel has its own scale, which starts at the 5th percentile."""
    figure, axes = figures.figure(1.2 + 0.2 * max(map(len, tables.values())), 1, len(tables), squeeze=False)
    for axis, (kind, table) in zip(axes[0], tables.items(), strict=True):
        lowest = float(np.nanpercentile(table, 5))
        axis.set_xlabel("head" if kind == "heads" else "group of neurons")
        drawn = figures.heatmap(axis, table, f"{kind}: log10 importance", lowest=lowest)
        figure.colorbar(drawn, ax=axis, shrink=0.8)
    axes[0][0].set_ylabel("layer")
    return figure


def kept_figure(tables: Mapping[str, np.ndarray]) -> Any:
    """A heatmap per kind, dark where units are kept, light where they are cut."""
    figure, axes = figures.figure(1.0 + 0.2 * max(map(len, tables.values())), 1, len(tables), squeeze=False)
    for axis, (kind, table) in zip(axes[0], tables.items(), strict=True):
        axis.set_xlabel("head" if kind == "heads" else "group of neurons")
        figures.heatmap(axis, table, f"{kind} kept", lowest=-0.12, highest=1)
    axes[0][0].set_ylabel("layer")
    return figure


def result(
    writer: Any, options: Mapping[str, Any], measures: Mapping[str, float | None], given: Collection[str] = ()
) -> None:
    """Write the run as one row of TensorBoard's table of runs ("HParams").

    By default the table shows five options: those marked as differing between runs, then the others alphabetically. So the
    options that distinguish most runs are marked, and those that the user chose (`given`).
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in options.items()}
    known = {f"result/{name}": value for name, value in measures.items() if value is not None}
    table, *row = hparams(plain, known)
    content = table.value[0].metadata.plugin_data
    head = HParamsPluginData.FromString(content.content)
    for info in head.experiment.hparam_infos:
        info.differs = info.name in _ALWAYS_SHOWN or info.name in set(given) - _SAME_IN_A_SWEEP
    content.content = head.SerializeToString()
    for summary in (table, *row):
        writer.file_writer.add_summary(summary)
    for name, value in known.items():
        writer.add_scalar(name, value)


def measures_of(report: Mapping[str, Any]) -> dict[str, float | None]:
    """The results by which the runs of a sweep are compared."""
    metric, params, latency = (
        report["metric"]["exported"] or report["metric"]["masked"] or {},
        report["params"],
        report["latency"],
    )
    dense = params["encoder_dense"]
    return {
        "score": metric.get("score"),
        "sparsity": report["sparsity"]["achieved"],
        "parameters_of_dense": params["encoder_kept"] / dense if dense else None,
        "latency_of_dense": latency["exported_ms"] / latency["dense_ms"] if latency["dense_ms"] else None,
        "train_seconds": report["time"]["train_s"],
    }


def options_of(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options shown in a sweep's table, by name."""
    flat = {name: value for section in config.values() for name, value in section.items()}
    return {name: flat[name] for name in _COMPARED if flat.get(name) is not None}


_ALWAYS_SHOWN = {"method", "target_sparsity"}
_SAME_IN_A_SWEEP = {"model_name_or_path", "task_name", "num_train_epochs"}
_COMPARED = (
    *("model_name_or_path", "task_name", "method", "criterion", "target_sparsity", "budget", "r", "lora_alpha"),
    *("learning_rate", "gate_learning_rate", "distill_weight", "num_train_epochs", "num_decisions", "seed"),
)
