"""Measures the latency of generation with the KV cache: dense model, compact export (widths per layer) and uniform export.

    python benchmarks/generation.py [--shape small] [--sparsities 0.3 0.5] [--batches 1 32]
    python benchmarks/generation.py --models dense=DIR compact=DIR uniform=DIR

Without `--models`, a Llama-shaped model with random weights is trained for a few steps at each sparsity, with and without
`--uniform`, and deleted afterwards. Models take turns. Decoding is greedy, prompts are random, and the number of new tokens is
fixed. The table has the median latency of the prompt and of each token after it, and the ratio of MACs in a token's
projections: a lower bound for the ratio of latencies where matrix products dominate.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path
from statistics import median

import random_llama
from ranks import ENVIRONMENT, ROOT, deepspeed

from prunadapt_ds.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


@torch.inference_mode()
def one_turn(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and per token after it. prompt: int64 [B, T]."""
    start = _now(prompt.device)
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    middle = _now(prompt.device)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    for _ in range(new_tokens):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return middle - start, (_now(prompt.device) - middle) / new_tokens


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def exports(args: argparse.Namespace) -> dict[str, Path]:
    """A random model and its exports at each sparsity, by name. One rank trains each for a few steps."""
    dense = args.work_dir / "dense"
    dense.mkdir(parents=True)
    random_llama.write(dense, random_llama.SHAPES[args.shape])
    text = args.work_dir / "text.txt"
    text.write_text("the cat sat near the house and the sun was bright . " * 600)
    options = ["--task_type", "causal_lm", "--model_name_or_path", str(dense), "--train_file", str(text)]
    options += ["--validation_file", str(text), "--max_seq_length", "64", "--max_eval_samples", "4"]
    options += ["--max_train_samples", "64", "--per_device_train_batch_size", "4", "--num_train_epochs", "1"]
    options += ["--ds_config", str(ROOT / "ds_configs/zero0.json")]
    options += ["--latency_batch_size", "1", "--latency_seq_length", "8"]
    found = {"dense": dense}
    for sparsity in args.sparsities:
        for name, more in (("compact", []), ("uniform", ["--uniform"])):
            output = args.work_dir / f"{name}-{sparsity}"
            line = [*deepspeed(1), str(ROOT / "launcher/train.py"), *options, "--target_sparsity", str(sparsity), *more]
            line += ["--output_dir", str(output)]
            subprocess.run(line, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
            found[f"{name} {sparsity:.0%} gone"] = output / "exports" / name
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--shape", choices=random_llama.SHAPES, default="small")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs/generation")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/generation")
    args = parser.parse_args()
    if not args.models and args.work_dir.exists():
        parser.error(
            f"--work_dir {args.work_dir} exists, and what is there would be removed at the end; name a new folder"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folders = dict(model.split("=", 1) for model in args.models) if args.models else exports(args)
    models = {}
    for name, folder in folders.items():
        is_ours = name.startswith("compact")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, args.dtype), trust_remote_code=is_ours
        )
        models[name] = model.to(device).eval()
    if not args.models:
        shutil.rmtree(args.work_dir)
    rows = []
    for batch in args.batches:
        prompt = torch.randint(1000, 2000, (batch, args.prompt), device=device)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(args.repeats + 1):
            for name, model in models.items():
                seconds[name].append(one_turn(model, prompt, args.new_tokens))
        for name, times in seconds.items():
            prompts, tokens = zip(*times[1:], strict=True)  # the first is a warm-up
            rows.append({"model": name, "batch": batch, "prompt_s": median(prompts), "token_s": median(tokens)})
    for row in rows:
        model = models[row["model"]]
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["macs"] = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    args.results.mkdir(parents=True, exist_ok=True)
    found = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__}
    found |= {"dtype": args.dtype, "threads": torch.get_num_threads(), "shape": None if args.models else args.shape}
    found |= {"prompt": args.prompt, "new_tokens": args.new_tokens, "rows": rows}
    (args.results / "generation.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(rows)
    (args.results / "table.md").write_text(text)
    print(text)


def table(rows: list[dict]) -> str:
    first = {row["batch"]: row for row in reversed(rows)}  # the first model's row, by batch size
    lines = [
        "| model | million parameters | MACs of the first | batch | prompt ms | of the first | ms per token | of the first |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        macs = row["macs"] / first[row["batch"]]["macs"]
        cells = [row["model"], f"{row['parameters'] / 1e6:,.0f}", f"{macs:.2f}", str(row["batch"])]
        for key in ("prompt_s", "token_s"):
            cells += [f"{1e3 * row[key]:.2f}", f"{row[key] / first[row['batch']][key]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
