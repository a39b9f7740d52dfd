"""Measures each rank's memory while a model of several GB is loaded, exported and cut under ZeRO-3.

    python benchmarks/loading.py

Writes a random Llama-shaped checkpoint (bf16, four files) to `--work_dir`, loads it on two ranks with plain `from_pretrained`
("before") and streamed ("after"), and deletes it. The streamed model then gets LoRA and gates; an export leaves out half of
its units, and then they are cut. Sampled every 2 ms, and counted above the level just before: anonymous memory, which belongs
to the process, and pages mapped from files, which the kernel can reclaim.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import random_llama
from ranks import ENVIRONMENT, ROOT, measured, words_of_a_rank

if TYPE_CHECKING:
    from prunadapt_ds.backbone import Backbone

RESULTS = ROOT / "benchmarks/results/loading"
SHAPE = random_llama.Shape(layers=18, hidden=2560, neurons=6912, heads=20, kv_heads=20)


class Sampler:
    """The highest anonymous and mapped bytes of this process while the block runs, above those at its start."""

    def __enter__(self) -> Sampler:
        self.start, self.most, self.done = self.now(), [0, 0], False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.thread.join()

    def now(self) -> list[int]:
        from prunadapt_ds.memory import _status_bytes

        return [_status_bytes("RssAnon"), _status_bytes("RssFile")]

    def watch(self) -> None:
        while not self.done:
            self.most = [max(m, v - s) for m, v, s in zip(self.most, self.now(), self.start, strict=True)]
            time.sleep(0.002)


def measure(folder: str, way: str, result: Path) -> None:
    """Load the model on every rank and measure; rank 0 writes the results of all."""
    import torch

    from prunadapt_ds import backbone, distributed, engine, memory

    distributed.init()
    values = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    zero3 = engine.shard_while_loading(values)
    backbone.load("sample", num_labels=2, dtype=torch.bfloat16)  # loads libraries and buffers that every run needs
    if way == "before":
        backbone.streaming = lambda name: contextlib.nullcontext(SimpleNamespace(notes=[]))
    distributed.barrier()
    start = time.perf_counter()
    with Sampler() as sampler:
        loaded = backbone.load(folder, num_labels=2, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    model = loaded.model
    largest = max(p.ds_numel * p.element_size() for p in model.parameters())
    found = {
        "anonymous": sampler.most[0],
        "mapped": sampler.most[1],
        "shard": memory.parameter_bytes(model),
        "seconds": seconds,
    }
    if way == "after":
        found |= export_and_cut(loaded, result.with_name("exported"))
    ranks = distributed.all_gather_objects({**found, "largest_tensor": largest})
    if distributed.rank() == 0:
        result.write_text(json.dumps(ranks, indent=1) + "\n")
    assert zero3 is not None
    distributed.shutdown()


def export_and_cut(loaded: Backbone, folder: Path) -> dict[str, int]:
    """Peak bytes above the loaded model's while every second unit is left out of an export, and while they are cut."""
    from prunadapt_ds import adapters, engine, export, gates, memory
    from prunadapt_ds.budget import PruningPlan
    from prunadapt_ds.resize import resize

    model, layout, structure = loaded.model, loaded.layout, loaded.structure
    adapters.add_lora(model, layout, adapters.target_modules(layout), r=8, lora_alpha=16)
    gates.attach(model, layout, structure)
    plan = PruningPlan(structure, tuple(tuple(range(0, s.num_units, 2)) for s in structure.sublayers))
    memory.return_freed()
    with Sampler() as exporting:
        export.export(model, layout, plan, loaded.tokenizer, folder)
    memory.return_freed()
    with Sampler() as cutting:
        resize(model, layout, plan, None, engine.rewriting)
    return {"exporting": exporting.most[0], "cutting": cutting.most[0]}


def table() -> str:
    lines = [
        "| loading | rank | seconds | anonymous, peak GiB | above the shard, in largest tensors | mapped, peak GiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for way in ("before", "after"):
        for rank, r in enumerate(json.loads((RESULTS / f"{way}.json").read_text())):
            above = (r["anonymous"] - r["shard"]) / r["largest_tensor"]
            gib = [r[name] / 2**30 for name in ("anonymous", "mapped")]
            lines.append(f"| {way} | {rank} | {r['seconds']:.1f} | {gib[0]:.2f} | {above:.2f} | {gib[1]:.2f} |")
    lines += [
        "",
        "| afterwards, rank | exporting, GiB more | in largest tensors | cutting, GiB more | in largest tensors |",
        "|--:|--:|--:|--:|--:|",
    ]
    for rank, r in enumerate(json.loads((RESULTS / "after.json").read_text())):
        cells = [f"{r[what] / 2**30:.2f} | {r[what] / r['largest_tensor']:.2f}" for what in ("exporting", "cutting")]
        lines.append(f"| {rank} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work_dir", type=Path, default=ROOT / "outputs/loading", help="needs about 4 GB; deleted afterwards"
    )
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    if args.work_dir.exists():
        parser.error(f"--work_dir {args.work_dir} exists, and would be removed at the end; name a new folder")
    RESULTS.mkdir(parents=True, exist_ok=True)
    args.work_dir.mkdir(parents=True)
    try:
        random_llama.write(args.work_dir, SHAPE)
        for way in ("before", "after"):
            result = args.work_dir / f"{way}.json"
            command = measured(args.ranks, __file__, args.work_dir, way, result)
            subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
            shutil.copy(result, RESULTS)
    finally:
        shutil.rmtree(args.work_dir)
    (RESULTS / "table.md").write_text(table())  # copied into the README.md next to it, with the conditions
    print(table())


if __name__ == "__main__":
    if words := words_of_a_rank():
        measure(words[0], words[1], Path(words[2]))
    else:
        main()
