"""What a plain step costs, and what of it the gates: `lora`, gates at rest and gates that record, turn and turn about.

    python benchmarks/step.py [--ranks 2] [--rounds 12] [--batch_size 16] [--seq_length 128]

All variants live in the same processes and take their steps in turns on the same samples, so that whatever else the
machine does falls on all of them alike. CPU seconds of rank 0, medians over rounds of the ratio to `lora`. "as hooks"
are steps in which ZeRO-3 fetches each of the modules that PEFT makes of a projection by itself, as it does by default.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VARIANTS = {  # name: (method, records, adapters are leaves)
    "lora": ("lora", False, True),
    "lora as hooks": ("lora", False, False),
    "gates": ("prunadapt", False, True),
    "gates, recording": ("prunadapt", True, True),
    "gates, recording, as hooks": ("prunadapt", True, False),
}


def measure(result: Path, rounds: int, options: list[str]) -> None:
    """On every rank; rank 0 writes seconds [round][variant]."""
    import torch

    from prunadapt_ds import distributed, finish, train, zero3
    from prunadapt_ds.config import parse

    leaves, sessions = zero3.adapters_as_leaves, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (method, _, is_leaf) in VARIANTS.items():
            zero3.adapters_as_leaves = leaves if is_leaf else lambda model: None
            argv = ["--output_dir", str(Path(folder, name)), "--method", method, "--train_norms", "True", *options]
            sessions[name] = train.setup(parse(argv))
            train.add_trainables(sessions[name])
        seconds = []
        for step in range(rounds + 2):
            row = {}
            for name, session in sessions.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                train.train_step(session, step, record=VARIANTS[name][1])
                row[name] = {"cpu": time.process_time() - cpu_start, "wall": time.perf_counter() - start}
            seconds.append(row)
        for session in sessions.values():
            session.tracker.close()
    if distributed.rank() == 0:
        found = {"ranks": distributed.world_size(), "device": finish.device_name(session.device)}
        found |= {"torch": torch.__version__, "options": options, "seconds": seconds[2:]}
        result.write_text(json.dumps(found, indent=1) + "\n")
    distributed.shutdown()


def table(found: dict) -> str:
    rows = [
        f"{found['device']}, {found['ranks']} ranks, torch {found['torch']}, {' '.join(found['options'])}",
        "",
        "| step | CPU s, median | of `lora`, CPU | of `lora`, wall |",
        "|---|--:|--:|--:|",
    ]
    for name in VARIANTS:
        cpu, wall = (
            median(row[name][kind] / row["lora"][kind] for row in found["seconds"]) for kind in ("cpu", "wall")
        )
        rows.append(f"| {name} | {median(row[name]['cpu'] for row in found['seconds']):.3f} | {cpu:.3f} | {wall:.3f} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=16, help="per rank")
    parser.add_argument("--seq_length", type=int, default=128)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/step")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    result = args.results / f"batch{args.batch_size}-ranks{args.ranks}.json"
    options = ["--ds_config", "ds_configs/zero3.json", "--max_seq_length", str(args.seq_length)]
    options += ["--per_device_train_batch_size", str(args.batch_size)]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(args.ranks)]
    command = [*launcher, __file__, "--measure", str(result), str(args.rounds), *options]
    subprocess.run(command, check=True, cwd=ROOT)
    tables = [table(json.loads(path.read_text())) for path in sorted(args.results.glob("*.json"))]
    (args.results / "table.md").write_text("\n".join(tables))
    print("\n".join(tables))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    if words[:1] == ["--measure"]:
        from prunadapt_ds.cli import prepare_environment

        prepare_environment()
        measure(Path(words[1]), int(words[2]), words[3:])
    else:
        main()
