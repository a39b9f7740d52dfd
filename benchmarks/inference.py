"""Measures the latency of exported folders against the dense model, over batch sizes and lengths, next to the ratio of MACs.

    python benchmarks/inference.py --exports ours@0.6=DIR ours@0.8=DIR [--model sample] [--dtype bfloat16 float32]

The dense and the exported model take turns in one process, so that noise on the machine affects both alike; medians are
compared. The MACs ratio is that of the blocks at the given length. The latency ratio stays above it because of embeddings,
norms, softmax, GELU and the lower efficiency of small matrices. Existing results are kept; those of another model, or of other
batches, lengths or repeats, are refused.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import stored
from ranks import ROOT

from prunadapt_ds.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

from prunadapt_ds.model_folder import locate  # noqa: E402


def macs(config: object, length: int) -> tuple[float, float]:
    """Multiply-accumulates of the blocks per token: (kept, dense), from the structure in the exported configuration."""
    structure = config.pruned_structure
    hidden = config.hidden_size
    width = [sum(sub["output"]["parts"]) for sub in structure["layout"]["sublayers"]]
    per_unit = [
        (len(s["inputs"]) + 1) * w * hidden for s, w in zip(structure["layout"]["sublayers"], width, strict=True)
    ]
    per_unit[0] += 2 * length * width[0]
    dense = structure["layout"]["num_layers"] * sum(
        cost * sub["num_units"] for cost, sub in zip(per_unit, structure["layout"]["sublayers"], strict=True)
    )
    kept = sum(cost * count for row in structure["kept"] for cost, count in zip(per_unit, row, strict=True))
    return kept, dense


@torch.inference_mode()
def sweep(
    dense: torch.nn.Module, exported: torch.nn.Module, batches: list[int], lengths: list[int], repeats: int
) -> list[dict]:
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
                    model(**inputs)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if turn >= 2:  # the first two are a warm-up
                        seconds[name].append(time.perf_counter() - start)
            kept, whole = macs(exported.config, length)
            row = {"batch": batch, "length": length, "macs": kept / whole}
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
