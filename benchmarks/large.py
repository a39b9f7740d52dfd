"""Measures a training step on 1 to 7 billion random weights: LoRA, gates, cuts of 30 and 50 %, and PEFT with HF Trainer.

    python benchmarks/large.py [--shapes 1b 7b] [--sparsities 0.3 0.5] [--batch_size 4] [--seq_length 1024]

Llama-shaped classifiers under the same ZeRO configuration, on the ranks of one machine; every sequence has `seq_length` tokens.
Seconds are the median time from the start of one step to the start of the next. Peak memory is the allocator's (on a CPU:
resident memory) after the first step, or the first after a cut. FLOP/s are given as a share of those that a large plain matrix
product reaches on the device, which a run of `lora` or `ours` measures. A step counts 4 FLOPs per multiply-accumulate, for the
forward pass and the gradients of inputs: frozen weights need no gradients. Existing results are kept; those of other settings
are refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import random_llama
import stored
from ranks import ENVIRONMENT, ROOT, deepspeed, measured, words_of_a_rank

if TYPE_CHECKING:
    import torch

    from prunadapt_ds.session import Session

STEPS, WARM_UP = 14, 4
METHODS = ("peft", "lora", "ours")


def measure(result: Path, sparsities: list[float], argv: list[str]) -> None:
    """Time steps on every rank, dense and after each cut; rank 0 writes a row for each."""
    import torch

    from prunadapt_ds import distributed, train
    from prunadapt_ds.budget import decide
    from prunadapt_ds.config import parse

    session = train.setup(parse(argv))
    train.add_trainables(session)
    rows = []
    if session.config.prune.method == "prunadapt":
        rows.append(phase(session, 0.0, record=True))
        scores = session.recorder.all_reduce().mean("grad_sq")
    rows.append(phase(session, 0.0, record=False))
    for sparsity in sparsities if session.recorder is not None else ():
        start = time.perf_counter()
        session.plan = decide(scores, session.backbone.structure, sparsity)
        train.shrink_model(session)
        rebuild_s = time.perf_counter() - start
        rows.append({**phase(session, sparsity, record=False), "rebuild_s": rebuild_s})
    session.tracker.close()
    if distributed.rank() == 0:
        found = {"device": distributed.device_name(session.device), "ranks": distributed.world_size(), "rows": rows}
        found |= {"torch": torch.__version__, "flops_per_s": product_speed(session.device), "options": argv}
        result.write_text(json.dumps(found, indent=1) + "\n")
    distributed.shutdown()


def phase(session: Session, sparsity: float, *, record: bool) -> dict:
    """Time some steps of the model as it is, and measure their memory."""
    import torch

    from prunadapt_ds import distributed, train
    from prunadapt_ds.step import train_step

    train.watched_step(session, 0, record=record)  # counts live bytes, and is a first warm-up
    session.memory.peak.reset()
    starts = []
    for step in range(STEPS):
        starts.append(time.perf_counter())
        train_step(session, step, record=record)
    if session.device.type == "cuda":
        torch.cuda.synchronize()
    starts.append(time.perf_counter())
    seconds = [end - start for start, end in itertools.pairwise(starts)]
    return {
        "sparsity": sparsity,
        "record": record,
        "step_s": median(seconds[WARM_UP:]),
        "macs": session.present.cost("macs"),
        "live_bytes": int(distributed.dist_max(session.live())),
        "peak_bytes": int(distributed.dist_max(session.memory.peak.bytes())),
    }


def product_speed(device: torch.device) -> float:
    """FLOP/s that a plain bf16 matrix product reaches on the device."""
    import torch

    size, times = (8192, 10) if device.type == "cuda" else (2048, 4)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for count in (2, times):
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return 2 * size**3 * times / seconds


def prepare(args: argparse.Namespace, shape: str) -> list[str]:
    """Write a shape's checkpoint and data. Returns the options that all methods share."""
    folder = args.work_dir / shape
    if not (folder / "model.safetensors.index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        random_llama.write(folder, random_llama.SHAPES[shape], args.tokenizer)
    words = " word" * args.seq_length
    rows = [f"{'good' if i % 2 else 'bad'}{words},{i % 2}\n" for i in range((STEPS + 1) * args.batch_size * args.ranks)]
    for name, some in (("train", rows), ("validation", rows[: 2 * args.ranks])):
        (args.work_dir / f"{name}.csv").write_text("sentence1,label\n" + "".join(some))
    options = ["--model_name_or_path", str(folder), "--ds_config", str(Path(args.ds_config).resolve())]
    options += ["--train_file", str(args.work_dir / "train.csv")]
    options += ["--validation_file", str(args.work_dir / "validation.csv")]
    options += ["--max_seq_length", str(args.seq_length), "--per_device_train_batch_size", str(args.batch_size)]
    options += ["--per_device_eval_batch_size", "1", "--num_train_epochs", "1"]
    options += ["--output_dir", str(args.work_dir / "out")]
    return options + (["--gradient_checkpointing"] if args.gradient_checkpointing else [])


def settings(method: str, args: argparse.Namespace) -> dict[str, object]:
    """What a result is measured with, beside its name."""
    found = {name: getattr(args, name) for name in ("ranks", "batch_size", "seq_length", "gradient_checkpointing")}
    found["ds_config"] = json.loads(Path(args.ds_config).read_text())
    return found | ({"sparsities": args.sparsities} if method == "ours" else {})


def run(method: str, shape: str, args: argparse.Namespace) -> None:
    options = prepare(args, shape)
    shutil.rmtree(args.work_dir / "out", ignore_errors=True)
    result = args.work_dir / "measured.json"
    if method == "peft":
        script = str(ROOT / "benchmarks/peft_trainer.py")
        command = [*deepspeed(args.ranks), script, *options, "--method", "lora"]
    else:
        of_method = ["--method", "lora"] if method == "lora" else ["--target_sparsity", str(max(args.sparsities))]
        sparsities = ",".join(map(str, args.sparsities))
        command = measured(args.ranks, __file__, result, sparsities, *options, *of_method)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-2000:]
        print(f"{shape} {method}: failed with exit code {done.returncode}\n{said}", flush=True)
        return
    if method == "peft":
        found = json.loads((args.work_dir / "out/result.json").read_text())
        row = {"sparsity": 0.0, "record": False, "step_s": found["steady_step_s"], "live_bytes": found["live_bytes"]}
        found = {"device": found["device"], "rows": [row | {"peak_bytes": found["steady_peak_bytes"]}]}
    else:
        found = json.loads(result.read_text())
    found |= {"shape": asdict(random_llama.SHAPES[shape]), **settings(method, args)}
    (args.results / f"{shape}-{method}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(shape, method, found["rows"], flush=True)


def table(results: Path) -> str:
    lines = [
        "| shape | step | s | of peft | tokens/s per rank | of a plain product's FLOP/s "
        "| live GiB | of peft | peak GiB | of peft |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for shape in random_llama.SHAPES:
        found = {m: json.loads(p.read_text()) for m in METHODS if (p := results / f"{shape}-{m}.json").exists()}
        base = found["peft"]["rows"][0] if "peft" in found else {}
        counted = next((f for m, f in found.items() if m != "peft"), None)  # its model is PEFT's too
        for method, of_method in found.items():
            for row in of_method["rows"]:
                name = method
                if method == "ours":
                    name = f"ours, {row['sparsity']:.0%} gone" if row["sparsity"] else "gates"
                tokens = of_method["batch_size"] * of_method["seq_length"]
                used = "-"
                if counted:
                    macs = row.get("macs") or counted["rows"][0]["macs"]
                    used = f"{4 * macs * of_method['batch_size'] / row['step_s'] / counted['flops_per_s']:.0%}"
                cells = [shape, name + (", recording" if row["record"] else ""), f"{row['step_s']:.3f}"]
                cells += [_of(row, base, "step_s"), f"{tokens / row['step_s']:,.0f}", used]
                for key in ("live_bytes", "peak_bytes"):
                    cells += [f"{row[key] / 2**30:.2f}", _of(row, base, key)]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _of(row: dict, base: dict, key: str) -> str:
    return f"{row[key] / base[key]:.2f}" if base else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(random_llama.SHAPES), default=["1b", "7b"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=4, help="per rank")
    parser.add_argument("--seq_length", type=int, default=1024)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--ds_config", default=str(ROOT / "ds_configs/zero3.json"))
    parser.add_argument("--tokenizer", default="sample", help="a folder with one")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/large")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs/large", help="holds the checkpoints")
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args()
    args.work_dir = args.work_dir.resolve()
    results = {(s, m): args.results / f"{s}-{m}.json" for s in args.shapes for m in args.methods}
    if problem := stored.refusal({path: settings(method, args) for (_, method), path in results.items()}):
        parser.error(problem)
    args.results.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell, path in results.items() if not path.exists()]
    if args.dry_run:
        names = "\n".join(f"{shape} {method}" for shape, method in todo)
        print(f"{names}\n{len(todo)} runs, about a minute each on a GPU")
        return
    for shape, method in todo:
        run(method, shape, args)
    text = table(args.results)
    (args.results / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if words := words_of_a_rank():
        measure(Path(words[0]), [float(s) for s in words[1].split(",")], words[2:])
    else:
        main()
