"""Writes Llama-shaped checkpoints of any size with random weights, for measurements that depend only on shapes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    words: int = 32000
    files: int = 4


SHAPES = {
    "tiny": Shape(layers=2, hidden=64, neurons=176, heads=4, kv_heads=2, files=2),
    "small": Shape(layers=12, hidden=768, neurons=2048, heads=12, kv_heads=4),
    "1b": Shape(layers=16, hidden=2048, neurons=8192, heads=32, kv_heads=8),
    "7b": Shape(layers=32, hidden=4096, neurons=11008, heads=32, kv_heads=32),
}


def write(folder: Path, shape: Shape, tokenizer: str = "sample") -> None:
    """Write a bf16 checkpoint with a language model's head and the given tokenizer, holding one file at a time in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prunadapt_ds.model_folder import locate

    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.neurons,
        vocab_size=shape.words,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(locate(tokenizer))
    words.model_max_length = config.max_position_embeddings
    words.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    names, where = list(shapes), {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for i in range(shape.files):
        part = names[i * len(names) // shape.files : (i + 1) * len(names) // shape.files]
        file = f"model-{i + 1:05}-of-{shape.files:05}.safetensors"
        tensors = {n: (torch.randn(shapes[n], device=device) * 0.02).bfloat16().cpu() for n in part}
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(2 * size.numel() for size in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
