"""Measures the share of the training time that checkpoints take at the default interval, on the built-in sample.

    python benchmarks/checkpointing.py [--ranks 2] [--epochs 3] [--batch_size 16]

The target is less than 2 %. Runs shorter than the interval of a minute write a checkpoint only at their end, so the share of
a short run says little; the table also shows the training time. Seconds are those of rank 0, which writes. Existing results
are kept.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from ranks import ENVIRONMENT, ROOT, measured, words_of_a_rank

AIM = 0.02


def measure(result: Path, argv: list[str]) -> None:
    """Do one whole run on every rank; rank 0 writes the seconds it spent on checkpoints and on training."""
    from prunadapt_ds import distributed, resume, train
    from prunadapt_ds.config import parse

    sessions, saves = [], []
    setup, save = train.setup, resume.save

    def remembered(*arguments):
        sessions.append(setup(*arguments))
        return sessions[-1]

    def counted(session):
        start = time.perf_counter()
        save(session)
        saves.append({"step": session.step, "seconds": time.perf_counter() - start})

    train.setup, resume.save = remembered, counted
    report = train.run(parse(argv))
    (session,) = sessions
    found = {"ranks": report["world_size"], "device": report["device"], "steps": session.total_steps, "saves": saves}
    for kind, seconds, total in (
        ("wall", session.clocks.seconds, session.clocks.train_seconds()),
        ("cpu", session.clocks.cpu_seconds, session.clocks.train_cpu_seconds()),
    ):
        found[kind] = {"train_s": total, "checkpoint_s": seconds["checkpoint"]}
    if distributed.rank() == 0:
        result.write_text(json.dumps(found, indent=1) + "\n")
    distributed.shutdown()


def share(found: dict, kind: str) -> float:
    """The checkpoints' share of the training time, in wall ("wall") or CPU seconds ("cpu")."""
    return found[kind]["checkpoint_s"] / found[kind]["train_s"]


def table(runs: dict[str, dict]) -> str:
    rows = [
        "| run | ranks | steps | training (s) | checkpoints | of each (s), median | share, wall | share, CPU | below 2 % |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for name, found in runs.items():
        each = median(save["seconds"] for save in found["saves"])
        shares = [share(found, kind) for kind in ("wall", "cpu")]
        cells = [name, str(found["ranks"]), str(found["steps"]), f"{found['wall']['train_s']:.1f}"]
        cells += [str(len(found["saves"])), f"{each:.3f}", *(f"{value:.2%}" for value in shares)]
        rows.append(f"| {' | '.join([*cells, 'yes' if max(shares) < AIM else 'no'])} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch_size", type=int, default=16, help="per rank")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/checkpointing")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    result = args.results.resolve() / f"sample-ranks{args.ranks}-epochs{args.epochs:g}-batch{args.batch_size}.json"
    if not result.exists():
        options = ["--ds_config", "ds_configs/zero3.json", "--num_train_epochs", str(args.epochs)]
        options += ["--per_device_train_batch_size", str(args.batch_size)]
        with tempfile.TemporaryDirectory() as folder:
            command = measured(args.ranks, __file__, result, "--output_dir", folder, *options)
            subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT)
    text = table({path.stem: json.loads(path.read_text()) for path in sorted(args.results.glob("*.json"))})
    (args.results / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if words := words_of_a_rank():
        measure(Path(words[0]), words[1:])
    else:
        main()
