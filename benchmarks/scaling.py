"""Measures bytes held, bytes sent and seconds per step over ranks and model sizes, dense and after a cut.

    python benchmarks/scaling.py [--ranks 1 2 4] [--sizes sample base large] [--sparsity 0.6]

Bytes are counted, not estimated: live bytes on the rank that has most, and all collectives of DeepSpeed during one step (ring
algorithms: an all-gather of n shards sends n - 1 of them, a reduce-scatter (n - 1) / n of its tensor, an all-reduce twice that).
`base` and `large` have random weights in BERT's usual shapes. Existing results are kept, those of another sparsity or batch
refused; the picture and the table show all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from statistics import median

import stored
from ranks import ENVIRONMENT, ROOT, measured, words_of_a_rank

SHAPES = {"base": (12, 768), "large": (24, 1024)}  # layers, hidden size; heads of 64, 4 * hidden neurons
STEPS = 6


def model_folder(size: str, work: Path) -> str:
    """A checkpoint of that size, with the sample's tokenizer; "sample" is the sample itself."""
    if size == "sample":
        return size
    from transformers import AutoTokenizer, BertConfig, BertModel

    from prunadapt_ds.model_folder import locate

    folder, (layers, hidden) = work / size, SHAPES[size]
    if not (folder / "config.json").exists():
        config = BertConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
        )
        BertModel(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(locate("sample")).save_pretrained(folder)
    return str(folder)


def sent_share(name: str, n: int) -> float:
    """Bytes that each of `n` ranks sends in a collective, per byte that DeepSpeed logs: of a shard to gather, else of all."""
    if "all_reduce" in name:
        return 2 * (n - 1) / n
    return (n - 1) / n if "reduce_scatter" in name else n - 1


class Traffic:
    """Counts DeepSpeed's collectives. `take` returns, since its last call, (calls, bytes that this rank sent) by kind."""

    def __init__(self) -> None:
        import deepspeed

        deepspeed.comm.configure(enabled=True, prof_all=True)
        self.logger = deepspeed.comm.comm.comms_logger
        self.take()

    def take(self) -> tuple[dict[str, int], dict[str, int]]:
        from prunadapt_ds.distributed import world_size

        n, calls, sent = world_size(), {}, {}
        for name, by_size in self.logger.comms_dict.items():
            calls[name] = sum(entry[0] for entry in by_size.values())
            sent[name] = int(sent_share(name, n) * sum(size * entry[0] for size, entry in by_size.items()))
        self.logger.comms_dict.clear()
        return calls, sent


def measure(argv: list[str], result: Path) -> None:
    """Take some dense steps, cut to the target at once, and take some more, on every rank; rank 0 writes the counts."""
    import torch

    from prunadapt_ds import distributed, memory, train
    from prunadapt_ds.budget import decide
    from prunadapt_ds.config import parse

    session = train.setup(parse(argv))
    train.add_trainables(session)
    traffic, found = Traffic(), {}
    for phase in ("dense", "after"):
        seconds = []
        for step in range(STEPS):
            start = time.perf_counter()
            train.watched_step(session, step, record=False)
            seconds.append(time.perf_counter() - start)
            calls, sent = traffic.take()
        found[phase] = {
            "step_s": median(seconds[2:]),
            "sent_bytes": sum(sent.values()),
            "sent_by": {name: size for name, size in sent.items() if size},
            "gathers": sum(count for name, count in calls.items() if "all_gather" in name),
            "live_bytes": int(distributed.dist_max(session.live())),
            "frozen_bytes": int(distributed.dist_max(memory.parameter_bytes(session.model, only_frozen=True))),
        }
        if phase == "dense":
            train.watched_step(session, STEPS, record=True)
            scores = session.recorder.all_reduce().mean("grad_sq")
            start = time.perf_counter()
            session.plan = decide(scores, session.backbone.structure, session.config.prune.target_sparsity)
            train.shrink_model(session)
            found["rebuild_s"] = time.perf_counter() - start
    session.tracker.close()
    if distributed.rank() == 0:
        device = distributed.device_name(session.device)
        batch_size = session.config.train.per_device_train_batch_size * distributed.world_size()
        found |= {"sparsity": session.config.prune.target_sparsity, "batch_size": batch_size}
        found |= {"ranks": distributed.world_size(), "device": device, "torch": torch.__version__}
        result.write_text(json.dumps(found, indent=1) + "\n")
    distributed.shutdown()


def draw(results: Path) -> str:
    """Draw bytes held and bytes sent against the number of ranks. Returns the table as Markdown."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [(p.stem.rsplit("-", 1)[0], json.loads(p.read_text())) for p in sorted(results.glob("*.json"))]
    lines = [
        "| model | ranks | frozen MiB per rank | live MiB per rank, dense / after | gathers in a step, dense / after "
        "| MiB sent per step, dense / after | step s, dense / after | rebuild s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for size in dict.fromkeys(name for name, _ in found):
        rows = sorted((r for name, r in found if name == size), key=lambda r: r["ranks"])
        for r in rows:
            pairs = [[r[phase][key] for phase in ("dense", "after")] for key in ("live_bytes", "sent_bytes", "step_s")]
            live, sent = ([value / 2**20 for value in pair] for pair in pairs[:2])
            cells = [size, str(r["ranks"]), f"{r['dense']['frozen_bytes'] / 2**20:.1f}"]
            gathers = [r[phase].get("gathers", "-") for phase in ("dense", "after")]  # older results have none
            cells += [f"{live[0]:.0f} / {live[1]:.0f}", "{} / {}".format(*gathers), f"{sent[0]:.1f} / {sent[1]:.1f}"]
            cells += [f"{pairs[2][0]:.2f} / {pairs[2][1]:.2f}", f"{r['rebuild_s']:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
        for axis, key, scale in zip(axes, ("live_bytes", "sent_bytes"), (2**20, 2**20), strict=True):
            for phase, style in (("dense", "-o"), ("after", "--s")):
                x, y = [r["ranks"] for r in rows], [r[phase][key] / scale for r in rows]
                axis.plot(x, y, style, label=f"{size}, {phase}")
    for axis, name in zip(axes, ("live MiB per rank", "MiB sent per rank and step"), strict=True):
        axis.set_xlabel("ranks")
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(results / "scaling.png", dpi=120)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--sizes", nargs="+", choices=["sample", *SHAPES], default=["sample", "base", "large"])
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--batch_size", type=int, default=32, help="of all ranks together")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/scaling")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs/scaling")
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args()
    if uneven := [n for n in args.ranks if args.batch_size % n]:
        parser.error(f"--batch_size {args.batch_size}: {' and '.join(map(str, uneven))} ranks cannot share it evenly")
    results = {(size, n): args.results / f"{size}-{n}.json" for size in args.sizes for n in args.ranks}
    asked = {"sparsity": args.sparsity, "batch_size": args.batch_size}
    if problem := stored.refusal(dict.fromkeys(results.values(), asked)):
        parser.error(problem)
    args.results.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell, path in results.items() if not path.exists()]
    if args.dry_run:
        print("\n".join(f"{size} on {n} ranks" for size, n in todo) + f"\n{len(todo)} runs, about 2 minutes each")
        return
    for size, n in todo:
        options = ["--model_name_or_path", model_folder(size, args.work_dir)]
        options += ["--output_dir", str(args.work_dir / "out")]
        options += ["--ds_config", str(ROOT / "ds_configs/zero3.json"), "--target_sparsity", str(args.sparsity)]
        options += ["--per_device_train_batch_size", str(args.batch_size // n)]
        command = measured(n, __file__, results[size, n], *options)
        code = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL).returncode
        print(f"{size} on {n} ranks: {'done' if code == 0 else f'failed with exit code {code}'}", flush=True)
    text = draw(args.results)
    (args.results / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if words := words_of_a_rank():
        measure(words[1:], Path(words[0]))
    else:
        main()
