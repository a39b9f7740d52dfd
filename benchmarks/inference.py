"""Measures the latency of exported folders against the dense model, over batch sizes and lengths, next to the ratio of MACs.

    python benchmarks/inference.py --exports ours@0.6=DIR ours@0.8=DIR [--model sample] [--dtype bfloat16 float32]

The dense and the exported model take turns in one process, so that noise on the machine affects both alike; medians are
compared. The MACs ratio is that of the blocks at the given length. The latency ratio stays above it because of embeddings,
norms, softmax, GELU and the lower efficiency of small matrices. Existing results are kept; those of another model, or of other
batches, lengths or repeats, are refused.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import stored
from ranks import ROOT

from prunadapt_ds.environment import prepare_environment


def macs(exported: Any, dense: Any, length: int) -> float:
    """Multiply-accumulates of the exported model's blocks as a ratio to the dense model's, for one sequence of `length` tokens."""
    whole = blocks(dense, length)
    pruned = getattr(exported.config, "pruned_structure", None)
    if pruned is None:  # of a stock class, by its own sizes
        return blocks(exported, length).dense_cost("macs") / whole.dense_cost("macs")
    structure = replace(whole, skips=pruned["layout"].get("skips", False))
    return structure.cost("macs", [count for row in pruned["kept"] for count in row]) / whole.dense_cost("macs")


def blocks(model: Any, length: int) -> Any:
    """The `Structure` of a stock model's blocks."""
    from prunadapt_ds.models.layouts import family_of, layout_of
    from prunadapt_ds.models.structure import structure_of

    layout = layout_of(family_of(model.config), model.config, model.base_model_prefix)
    return structure_of(model, layout, length)


def sweep(dense: Any, exported: Any, batches: list[int], lengths: list[int], repeats: int) -> list[dict]:
    import torch

    device = next(dense.parameters()).device
    rows = []
    for batch in batches:
        for length in lengths:
            inputs = {"input_ids": torch.randint(1000, 2000, (batch, length), device=device)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            seconds: dict[str, list[float]] = {"dense": [], "exported": []}
            for turn in range(repeats + 2):
                for name, model in (("dense", dense), ("exported", exported)):
                    start = time.perf_counter()
                    with torch.inference_mode():
                        model(**inputs)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if turn >= 2:  # the first two are a warm-up
                        seconds[name].append(time.perf_counter() - start)
            row = {"batch": batch, "length": length, "macs": macs(exported, dense, length)}
            row |= {f"{name}_ms": 1e3 * median(times) for name, times in seconds.items()}
            rows.append(row | {"latency": row["exported_ms"] / row["dense_ms"]})
    return rows


def draw(results: Path) -> None:
    """Draw latency ratio against MACs ratio, a point per batch and length. On the diagonal, latency falls as fast as MACs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 4))
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    for export, marker in zip(found, "osD^vP*X<>", strict=False):
        rows = export["rows"]
        label = f"{export['name']}, {export['dtype']}"
        axis.scatter([r["macs"] for r in rows], [r["latency"] for r in rows], marker=marker, label=label, alpha=0.7)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axis.set(xlim=(0, 1), ylim=(0, 1.1), xlabel="MACs of the blocks / dense", ylabel="latency / dense")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(results / "inference.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exports", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--model", default="sample")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128, 256])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/inference")
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args()
    prepare_environment()
    import torch
    from transformers import AutoModelForSequenceClassification

    from prunadapt_ds.model_folder import locate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    exports = dict(export.split("=", 1) for export in args.exports)
    paths = {(name, dtype): args.results / f"{name}-{dtype}.json" for name in exports for dtype in args.dtype}
    asked = {name: getattr(args, name) for name in ("model", "batches", "lengths", "repeats")}
    if problem := stored.refusal(dict.fromkeys(paths.values(), asked)):
        parser.error(problem)
    args.results.mkdir(parents=True, exist_ok=True)
    for name, folder in exports.items():
        for dtype in args.dtype:
            path = paths[name, dtype]
            if path.exists() or args.dry_run:
                print(f"{path.name}: {'there already' if path.exists() else 'would run, about 2 minutes on a CPU'}")
                continue
            load = AutoModelForSequenceClassification.from_pretrained
            dense = load(locate(args.model), dtype=getattr(torch, dtype)).to(device).eval()
            exported = load(folder, dtype=getattr(torch, dtype), trust_remote_code=True).to(device).eval()
            rows = sweep(dense, exported, args.batches, args.lengths, args.repeats)
            setting = {"dtype": dtype, "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
            path.write_text(json.dumps({"name": name, **asked, **setting, "rows": rows}, indent=1) + "\n")
    lines = [
        "| model | dtype | batch | length | dense ms | exported ms | latency | MACs |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for path in sorted(args.results.glob("*.json")):
        found = json.loads(path.read_text())
        for r in found["rows"]:
            cells = [found["name"], found["dtype"], str(r["batch"]), str(r["length"]), f"{r['dense_ms']:.1f}"]
            cells += [f"{r['exported_ms']:.1f}", f"{r['latency']:.2f}", f"{r['macs']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    (args.results / "table.md").write_text("\n".join(lines) + "\n")
    draw(args.results)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
