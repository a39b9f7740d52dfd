"""Turns the reports in a results folder into one table: `python benchmarks/table.py benchmarks/results/first_figures`."""

import json
import sys
from pathlib import Path

HEADER = (
    "| task | method | score | measures | encoder parameters kept | MACs kept | trainable "
    "| train s | live MiB per rank | latency ratio | steps |\n"
    "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"
)


def row(report: dict) -> str:
    """One report as a line. Scores are percentages, of the model exported at the last step."""
    exported = report["metric"]["exported"]
    measures = ", ".join(f"{k} {100 * v:.1f}" for k, v in exported.items() if k != "score")
    cells = (
        report["task"],
        report["method"],
        f"{100 * exported['score']:.1f}",
        measures,
        f"{report['params']['encoder_kept'] / report['params']['encoder_dense']:.1%}",
        f"{report['macs']['kept'] / report['macs']['dense']:.1%}",
        f"{report['params']['trainable']:,}",
        f"{report['time']['train_s']:.0f}",
        f"{report['memory']['live_tensor_bytes']['dense'] / 2**20:.0f}",
        f"{report['latency']['exported_ms'] / report['latency']['dense_ms']:.2f}",
        str(report["time"]["steps"]),
    )
    return "| " + " | ".join(cells) + " |"


def main(folder: Path) -> None:
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    print("\n".join([HEADER, *(row(report) for report in reports)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
