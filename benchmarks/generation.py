"""Latency of generating with the KV cache: dense model, compact export (widths per layer) and uniform export, turn and turn about.

    python benchmarks/generation.py --models dense=DIR compact=DIR uniform=DIR [--batches 1 32]

Greedy, random prompts, as many new tokens for all. Given are medians: of the pass over the prompt, and of each token after it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

from prunadapt_ds.cli import prepare_environment

prepare_environment()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@torch.inference_mode()
def one_turn(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and of a token after it. prompt: int64 [B, T]."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/generation")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {}
    for name, folder in (model.split("=", 1) for model in args.models):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=name == "compact")
        models[name] = model.to(device).eval()
    rows = []
    for batch in args.batches:
        prompt = torch.randint(1000, 2000, (batch, args.prompt), device=device)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(args.repeats + 1):
            for name, model in models.items():
                seconds[name].append(one_turn(model, prompt, args.new_tokens))
        for name, times in seconds.items():
            prompts, tokens = zip(*times[1:], strict=True)  # the first warms up
            rows.append({"model": name, "batch": batch, "prompt_s": median(prompts), "token_s": median(tokens)})
    for row in rows:
        row["parameters"] = sum(p.numel() for p in models[row["model"]].parameters())
    args.results.mkdir(parents=True, exist_ok=True)
    found = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__}
    found |= {"prompt": args.prompt, "new_tokens": args.new_tokens, "rows": rows}
    (args.results / "generation.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(rows)
    (args.results / "table.md").write_text(text)
    print(text)


def table(rows: list[dict]) -> str:
    first = {row["batch"]: row for row in reversed(rows)}  # of each batch size
    lines = [
        "| model | million parameters | batch | prompt ms | of the first | ms per token | of the first |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row["model"], f"{row['parameters'] / 1e6:,.0f}", str(row["batch"])]
        for key in ("prompt_s", "token_s"):
            cells += [f"{1e3 * row[key]:.2f}", f"{row[key] / first[row['batch']][key]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
