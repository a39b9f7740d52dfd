"""Measures what a step costs, and what gates add to it: `lora`, gates that do not record, and gates that do.

    python benchmarks/step.py [--ranks 2] [--rounds 12] [--batch_size 16] [--seq_length 128]

All variants live in the same processes and take turns on the same samples, so that noise on the machine affects all alike.
The table has CPU seconds of rank 0, the median over rounds of the ratio to `lora`, and the bytes that autograd saves for a
micro-batch. In "module by module", ZeRO-3 fetches each module of a block separately and keeps small trainable tensors whole,
as it does by default; in "norms keep inputs", norms save their inputs for the backward pass, as torch's do.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from ranks import ENVIRONMENT, ROOT, from_anywhere, measured, words_of_a_rank


class Variant(NamedTuple):
    method: str
    records: bool = False
    in_pieces: bool = True
    keeps_outputs: bool = True


VARIANTS = {
    "lora": Variant("lora"),
    "lora, module by module": Variant("lora", in_pieces=False),
    "lora, norms keep inputs": Variant("lora", keeps_outputs=False),
    "gates": Variant("prunadapt"),
    "gates, recording": Variant("prunadapt", records=True),
    "gates, recording, module by module": Variant("prunadapt", records=True, in_pieces=False),
    "gates, recording, norms keep inputs": Variant("prunadapt", records=True, keeps_outputs=False),
}


def measure(result: Path, rounds: int, options: list[str]) -> None:
    """Time the variants on every rank; rank 0 writes seconds [round][variant]."""
    import torch

    from prunadapt_ds import distributed, norms, train, zero3
    from prunadapt_ds.config import parse
    from prunadapt_ds.step import train_step

    pieces, keep_outputs, sessions, kept = zero3.PIECE_ELEMENTS, norms.keep_outputs, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, variant in VARIANTS.items():
            zero3.PIECE_ELEMENTS = pieces if variant.in_pieces else 0
            norms.keep_outputs = keep_outputs if variant.keeps_outputs else lambda model: None
            argv = [
                "--output_dir",
                str(Path(folder, name)),
                "--method",
                variant.method,
                "--train_norms",
                "True",
                *options,
            ]
            sessions[name] = session = train.setup(parse(argv))
            train.add_trainables(session)
            train.watched_step(session, 0, record=variant.records)
            kept[name] = session.memory.activation_bytes
        seconds = []
        for step in range(rounds + 2):
            row = {}
            for name, session in sessions.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                train_step(session, step, record=VARIANTS[name].records)
                if session.device.type == "cuda":
                    torch.cuda.synchronize()
                row[name] = {"cpu": time.process_time() - cpu_start, "wall": time.perf_counter() - start}
            seconds.append(row)
        for session in sessions.values():
            session.tracker.close()
    if distributed.rank() == 0:
        found = {"ranks": distributed.world_size(), "device": distributed.device_name(session.device)}
        found |= {"torch": torch.__version__, "options": options, "kept_bytes": kept, "seconds": seconds[2:]}
        result.write_text(json.dumps(found, indent=1) + "\n")
    distributed.shutdown()


def table(found: dict) -> str:
    rows = [
        f"{found['device']}, {found['ranks']} ranks, torch {found['torch']}, {len(found['seconds'])} rounds;",
        " ".join(found["options"]),
        "",
        "| step | CPU s, median | of `lora`, CPU (quartiles) | of `lora`, wall (quartiles) | kept by autograd (MiB) |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in found["seconds"][0]:  # older results have other variants
        cells = [f"{median(row[name]['cpu'] for row in found['seconds']):.3f}"]
        for kind in ("cpu", "wall"):
            low, middle, high = quantiles((row[name][kind] / row["lora"][kind] for row in found["seconds"]), n=4)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        cells.append(f"{found['kept_bytes'][name] / 2**20:.1f}" if "kept_bytes" in found else "")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=16, help="per rank")
    parser.add_argument("--seq_length", type=int, default=128)
    parser.add_argument("--model", default="sample")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/step")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    result = args.results.resolve() / f"batch{args.batch_size}-ranks{args.ranks}.json"
    options = ["--ds_config", "ds_configs/zero3.json", "--model_name_or_path", from_anywhere(args.model)]
    options += ["--max_seq_length", str(args.seq_length), "--per_device_train_batch_size", str(args.batch_size)]
    command = measured(args.ranks, __file__, result, args.rounds, *options)
    subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT)
    tables = [table(json.loads(path.read_text())) for path in sorted(args.results.glob("*.json"))]
    (args.results / "table.md").write_text("\n".join(tables))
    print("\n".join(tables))


if __name__ == "__main__":
    if words := words_of_a_rank():
        measure(Path(words[0]), int(words[1]), words[2:])
    else:
        main()
