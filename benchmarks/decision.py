"""Measures time and memory of a decision (ranking, plan, hash, masks) on synthetic scores: `python benchmarks/decision.py`.

The table also gives the bytes of scores that every rank holds between two decisions and sends once for each.
"""

import json
import resource
import time
from pathlib import Path
from statistics import median

import torch

from prunadapt_ds.budget import decide
from prunadapt_ds.importance import STATISTICS
from prunadapt_ds.models.structure import Structure, SubLayer

RESULTS = Path(__file__).resolve().parent / "results/decision"
SCORE_BYTES = 4 * len(STATISTICS)  # per unit: the window's sums
SHAPES = {  # layers, heads, neurons, parameters of a head, of a neuron
    "BERT-base": (12, 12, 3072, 4 * 64 * 768 + 3 * 64, 2 * 768 + 1),
    "80 layers, 64 heads, 28,672 neurons": (80, 64, 28672, 4 * 128 * 8192, 3 * 8192),
}


def structure(layers: int, heads: int, neurons: int, head_params: int, neuron_params: int) -> Structure:
    sublayers, start = [], 0
    for layer in range(layers):
        for kind, count, params in (("heads", heads, head_params), ("neurons", neurons, neuron_params)):
            sublayers.append(SubLayer(layer, kind, start, count, params, params))
            start += count
    return Structure(tuple(sublayers), 5000 * layers, 0, 128)


def main() -> None:
    rows = []
    for name, shape in SHAPES.items():
        model = structure(*shape)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        scores = torch.rand(model.num_units, generator=torch.Generator().manual_seed(0))
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            plan = decide(scores, model, 0.5)
            digest, mask = plan.hash, plan.mask()
            seconds.append(time.perf_counter() - start)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB; the smaller model comes first
        rows.append({"model": name, "units": model.num_units, "seconds": median(seconds), "peak_bytes": 1024 * grown})
        print(f"{name}: {int(mask.sum()):,} of {model.num_units:,} units kept, plan {digest[:8]}")
    found = {"torch": torch.__version__, "score_bytes_per_unit": SCORE_BYTES, "rows": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "decision.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "table.md").write_text(table(rows))
    print(table(rows))


def table(rows: list[dict]) -> str:
    lines = ["| model | units | scores of a rank, MB | a decision, ms | memory it takes, MB |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        scores = SCORE_BYTES * row["units"] / 1e6
        cells = [row["model"], f"{row['units']:,}", f"{scores:.1f}", f"{1e3 * row['seconds']:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{row['peak_bytes'] / 1e6:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
