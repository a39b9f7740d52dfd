"""Seconds of a decision (ranking, plan, hash, masks) on synthetic scores: `python benchmarks/decision.py`."""

import time
from statistics import median

import torch

from prunadapt_ds.budget import decide
from prunadapt_ds.models.structure import Structure, SubLayer

SHAPES = {  # layers, heads, neurons, parameters of a head, of a neuron
    "BERT-base": (12, 12, 3072, 4 * 64 * 768 + 3 * 64, 2 * 768 + 1),
    "80 layers, 64 heads, 28,672 neurons": (80, 64, 28672, 4 * 128 * 8192, 3 * 8192),
}


def structure(layers: int, heads: int, neurons: int, head_params: int, neuron_params: int) -> Structure:
    sublayers, start = [], 0
    for layer in range(layers):
        for kind, count, params in (("heads", heads, head_params), ("neurons", neurons, neuron_params)):
            sublayers.append(SubLayer(layer, kind, start, count, params, params))
            start += count
    return Structure(tuple(sublayers), 5000 * layers, 0, 128)


def main() -> None:
    for name, shape in SHAPES.items():
        model = structure(*shape)
        scores = torch.rand(model.num_units, generator=torch.Generator().manual_seed(0))
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            plan = decide(scores, model, 0.5)
            digest, mask = plan.hash, plan.mask()
            seconds.append(time.perf_counter() - start)
        print(
            f"{name}: {1e3 * median(seconds):.0f} ms ({model.num_units:,} units, {int(mask.sum()):,} kept, {digest[:8]})"
        )


if __name__ == "__main__":
    main()
