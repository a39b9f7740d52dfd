"""Compares the bytes that `launcher/plan.py` predicts with those of small runs: `python benchmarks/plan_check.py`.

Each point trains a step, cuts, and trains another step. Compared are the report's `live_tensor_bytes` (parameters, optimizer,
tensors saved by autograd) on the rank that has most. Finished points are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from ranks import ENVIRONMENT, ROOT, measured, words_of_a_rank

RESULTS = ROOT / "benchmarks/results/plan_check"
SPARSITY, BATCH, LENGTH = 0.5, 8, 64


@dataclass(frozen=True)
class Point:
    family: str
    layers: int
    hidden: int
    ranks: int
    stage: int
    dtype: str = "bf16"
    recompute: bool = False
    method: str = "prunadapt"

    @property
    def name(self) -> str:
        end = f"{'-recompute' if self.recompute else ''}{'' if self.method == 'prunadapt' else '-' + self.method}"
        return f"{self.family}-{self.layers}x{self.hidden}-ranks{self.ranks}-zero{self.stage}-{self.dtype}{end}"

    @property
    def options(self) -> list[str]:
        words = ["--method", self.method, "--max_seq_length", str(LENGTH), "--per_device_train_batch_size", str(BATCH)]
        words += ["--target_sparsity", str(SPARSITY)] if self.method == "prunadapt" else []
        return words + (["--gradient_checkpointing"] if self.recompute else [])


POINTS = (
    Point("bert", 4, 256, 1, 0, "fp32"),
    Point("bert", 4, 256, 2, 0),
    Point("bert", 4, 256, 2, 2),
    Point("bert", 4, 256, 2, 3),
    Point("bert", 4, 256, 2, 3, "fp32"),
    Point("bert", 4, 256, 2, 3, recompute=True),
    Point("bert", 8, 512, 1, 3),
    Point("bert", 8, 512, 2, 3, "fp32"),
    Point("llama", 4, 256, 1, 2),
    Point("llama", 4, 256, 2, 3),
    Point("llama", 6, 512, 2, 3, "fp32"),
    Point("llama", 4, 256, 1, 0, "fp32", recompute=True),
    Point("bert", 4, 256, 2, 2, method="full"),
    Point("bert", 4, 256, 2, 3, method="lora"),
)


def prepare(point: Point, work: Path) -> list[str]:
    """Write a point's checkpoint, data (every sentence exceeds the limit) and ds_config. Returns the trainer's options."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from prunadapt_ds.model_folder import locate

    folder = work / f"{point.family}-{point.layers}x{point.hidden}"
    if not (folder / "config.json").exists():
        heads = point.hidden // 64
        config = AutoConfig.for_model(
            point.family,
            num_hidden_layers=point.layers,
            hidden_size=point.hidden,
            num_attention_heads=heads,
            intermediate_size=4 * point.hidden,
            vocab_size=30522,
            pad_token_id=0,
            **({"num_key_value_heads": heads // 2} if point.family == "llama" else {}),
        )
        AutoModel.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(locate("sample")).save_pretrained(folder)
    rows = "".join(f"{'good' if i % 2 else 'bad'}{' word' * LENGTH},{i % 2}\n" for i in range(64))
    for name in ("train", "validation"):
        (work / f"{name}.csv").write_text(f"sentence1,label\n{rows}")
    values = json.loads((ROOT / f"ds_configs/zero{point.stage}.json").read_text())
    values["bf16"] = {"enabled": point.dtype == "bf16"}
    (work / "ds.json").write_text(json.dumps(values))
    options = ["--model_name_or_path", str(folder), "--ds_config", str(work / "ds.json"), "--max_steps", "8"]
    options += ["--train_file", str(work / "train.csv"), "--validation_file", str(work / "validation.csv")]
    return [*options, "--output_dir", str(work / "out"), *point.options]


def measure(argv: list[str], result: Path) -> None:
    """Take a step, cut to the target at once, and take another step, on every rank; rank 0 writes the bytes held."""
    from prunadapt_ds import distributed, memory, state, train
    from prunadapt_ds.budget import decide
    from prunadapt_ds.config import parse

    session = train.setup(parse(argv))
    train.add_trainables(session)
    found = {}
    prunes = session.config.prune.method == "prunadapt"
    for phase in ("dense", "last") if prunes else ("dense",):
        record = prunes and phase == "dense"
        train.watched_step(session, 0, record=record)
        parts = {
            "parameters": memory.parameter_bytes(session.model),
            "optimizer": state.optimizer_bytes(session.engine),
            "activations": session.memory.activation_bytes,
        }
        found[phase] = {name: int(distributed.dist_max(value)) for name, value in parts.items()}
        found[phase]["live"] = int(distributed.dist_max(session.live()))
        if prunes and phase == "dense":
            scores = session.recorder.all_reduce().mean("grad_sq")
            session.plan = decide(scores, session.backbone.structure, SPARSITY)
            train.shrink_model(session)
    session.tracker.close()
    if distributed.rank() == 0:
        result.write_text(json.dumps(found, indent=1) + "\n")
    distributed.shutdown()


def predict(point: Point, work: Path) -> dict:
    from prunadapt_ds.commands import plan

    model = str(work / f"{point.family}-{point.layers}x{point.hidden}")
    ds_config = str(work / "ds.json")
    words = ["--model_name_or_path", model, "--ds_config", ds_config, "--world_size", str(point.ranks), "--json"]
    (found,) = json.loads(plan.run([*words, *point.options]))["configs"]
    return {row["phase"]: row for row in found["phases"]}


def run(point: Point, work: Path) -> None:
    argv = prepare(point, work)
    result = work / "measured.json"
    command = measured(point.ranks, __file__, result, *argv)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        print(f"{point.name}: failed with exit code {done.returncode}\n{(done.stdout + done.stderr)[-1500:]}")
        return
    found, planned = json.loads(result.read_text()), predict(point, work)
    for phase, row in found.items():
        row["predicted"] = planned[phase]["accounted_bytes"]
        row["ratio"] = row["predicted"] / row["live"]
        row["predicted_parts"] = planned[phase]["device_bytes"]
    (RESULTS / f"{point.name}.json").write_text(json.dumps({"point": asdict(point), **found}, indent=1) + "\n")
    print(point.name, {phase: round(row["ratio"], 3) for phase, row in found.items()}, flush=True)


def table() -> str:
    lines = [
        "| model | ranks | ZeRO | dtype | method | predicted MiB, dense / cut | measured MiB, dense / cut | ratio, dense / cut |",
        "|---|--:|--:|---|---|--:|--:|--:|",
    ]
    for file in sorted(RESULTS.glob("*.json")):
        found = json.loads(file.read_text())
        p, phases = Point(**found.pop("point")), list(found.values())
        cells = [f"{p.family} {p.layers} x {p.hidden}", str(p.ranks), str(p.stage), p.dtype]
        cells.append(p.method + (", recomputing" if p.recompute else ""))
        for key, scale, digits in (("predicted", 2**20, 1), ("live", 2**20, 1), ("ratio", 1, 3)):
            cells.append(" / ".join(f"{phase[key] / scale:.{digits}f}" for phase in phases))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs/plan_check")
    parser.add_argument("--table_only", action="store_true")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for point in () if args.table_only else POINTS:
        if not (RESULTS / f"{point.name}.json").exists():
            run(point, args.work_dir)
    (RESULTS / "table.md").write_text(table())  # copied into the README.md next to it, with the conditions
    print(table())


if __name__ == "__main__":
    if words := words_of_a_rank():
        measure(words[1:], Path(words[0]))
    else:
        main()
