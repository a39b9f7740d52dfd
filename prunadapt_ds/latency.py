"""Measured times of attention and feed-forward at every width: the table behind `--budget latency`.

One block of the model is built at several widths and timed on the run's own device and dtype. The time of all blocks is taken
to be the sum of a fixed time for each and of their sub-layers' times, which are read off measured curves.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from prunadapt_ds.distributed import cores
from prunadapt_ds.models.modeling_prunadapt import Layout, narrow
from prunadapt_ds.models.structure import Structure

# Of every measured latency, unless an option sets another.
SETTING = {"batch_size": 32, "seq_length": 128, "repeats": 20}
POINTS = 8  # evenly spaced widths of each kind, besides `least` and `least + multiple`
LEAST_ROUNDS, MOST_ROUNDS = 3, 40  # of timing every width once
SECONDS = 20.0  # after which rounds end, but not before LEAST_ROUNDS
SETTLED = 0.05  # rounds end when the two shortest times of every width differ by no more
ROUGH = 0.2  # above this difference the times are useless: the machine is too busy
CALLS = 8  # in a row on an accelerator, to hide launch overhead as in a whole model
VOCABULARY = 64  # of the model around the block; its embeddings are not timed


@dataclass(frozen=True)
class LatencyTable:
    """Times of one block's parts, and how they were measured.

    `layer_ns`: a block with as few units as possible (norms, residual sums, output biases). `heads`, `neurons`: (units kept, ns
    beyond `layer_ns`) as measured. `clock`: "wall", or "cpu" for CPU time on a busy machine. `spread`: the relative difference
    between a width's two shortest times, the largest of all widths.
    """

    device: str
    dtype: str
    threads: int | None  # on a CPU
    batch_size: int
    seq_length: int  # tokens
    clock: str
    spread: float
    layer_ns: int
    heads: tuple[tuple[int, int], ...]
    neurons: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatencyTable:
        points = {kind: tuple((int(units), int(ns)) for units, ns in values[kind]) for kind in ("heads", "neurons")}
        return cls(**{**values, **points})


def curve(points: tuple[tuple[int, int], ...], num_units: int) -> tuple[int, ...]:
    """ns by number of units kept, [num_units + 1]: linear interpolation between measured points made non-decreasing.

    It is the nearest non-decreasing curve in least squares, since fewer units taking longer can only be noise; it starts at 0.
    """
    from scipy.optimize import isotonic_regression

    units, ns = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    rising = isotonic_regression(ns).x
    return tuple(np.interp(np.arange(num_units + 1), units, rising - rising[0]).round().astype(int).tolist())


def with_times(structure: Structure, layout: Layout, table: LatencyTable) -> Structure:
    """The same structure with the times of `table`."""
    curves = {}
    for sub in layout.sublayers:
        found = curve(getattr(table, sub.kind), sub.num_units)
        curves[sub.kind] = tuple(layout.passes * ns for ns in found)
    sublayers = tuple(replace(s, latency=curves[s.kind]) for s in structure.sublayers)
    fixed = layout.passes * layout.num_layers * table.layer_ns
    return replace(structure, sublayers=sublayers, fixed_latency=fixed)


def sizes(num_units: int, least: int, multiple: int) -> list[int]:
    """The numbers of units to time: `least`, `least + multiple`, all, and some evenly spaced ones between."""
    between = {least + round(i * (num_units - least) / POINTS / multiple) * multiple for i in range(1, POINTS)}
    return sorted(n for n in {least, least + multiple, num_units} | between if n <= num_units)


def measure(
    model: Any,
    layout: Layout,
    *,
    batch_size: int,
    seq_length: int,
    neuron_multiple: int,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> LatencyTable:
    """Time a block like the model's, with random weights, at several widths. Only the class and configuration of `model` are used.

    Widths take turns and the shortest time of each counts, so that other load on the machine matters little. If it still
    matters too much on a CPU, the CPU time of a single thread counts, which other load hardly stretches. `name`: the
    device's. The random generators are left as they were.
    """
    heads, neurons = layout.sublayers
    fewest = min(heads.floors, default=0)  # if attention cannot be removed, its fewest heads belong to the block
    widths = {(n, 0) for n in sizes(heads.num_units, fewest, 1)}
    widths |= {(fewest, n) for n in sizes(neurons.num_units, 0, neuron_multiple)}
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=generators), all_cores(device) as threads:
        block, args, kwargs = one_block(model, layout, batch_size, seq_length, dtype, device)
        blocks = {kept: narrowed(block, layout, kept) for kept in sorted(widths)}
        clock = "wall"
        ns, spread = least_times(blocks, args, kwargs, device, time.perf_counter)
        if spread > ROUGH and device.type == "cpu":
            torch.set_num_threads(1)
            clock, threads = "cpu", 1
            ns, spread = least_times(blocks, args, kwargs, device, time.thread_time)
    base = ns[fewest, 0]
    return LatencyTable(
        device=name,
        dtype=str(dtype).removeprefix("torch."),
        threads=threads,
        batch_size=batch_size,
        seq_length=seq_length,
        clock=clock,
        spread=spread,
        layer_ns=base,
        heads=tuple((n, ns[n, 0] - base) for n, none in sorted(ns) if none == 0),
        neurons=tuple((n, ns[fewest, n] - base) for least, n in sorted(ns) if least == fewest),
    )


@contextlib.contextmanager
def all_cores(device: torch.device) -> Iterator[int | None]:
    """On a CPU, use the cores of the waiting ranks too, as an exported model is served alone; yields the number of threads."""
    if device.type != "cpu":
        yield None
        return
    before = torch.get_num_threads()
    torch.set_num_threads(len(cores()))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def one_block(
    model: Any, layout: Layout, batch_size: int, seq_length: int, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A dense block of the model's class on the device, and the args and kwargs with which its base model calls it."""
    config = copy.deepcopy(model.config)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, VOCABULARY, 1
    config.use_cache = False  # a cache would grow from call to call
    with torch.device(device):
        base = type(model.base_model)(config).to(dtype).eval()
        input_ids = torch.randint(2, VOCABULARY, (batch_size, seq_length))
    layers: Any = base.get_submodule(layout.layers.removeprefix(f"{model.base_model_prefix}."))
    block, seen = layers[0], []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        base(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    hook.remove()
    return block, *seen[0]


def narrowed(block: nn.Module, layout: Layout, kept: tuple[int, int]) -> nn.Module:
    """A copy of a dense block with `kept` = (heads, neurons)."""
    holder = nn.Module()
    holder.add_module("layers", nn.ModuleList([copy.deepcopy(block)]))
    narrow(holder, replace(layout, layers="layers"), [list(kept)])
    return holder.get_submodule("layers.0")


def least_times(
    blocks: dict[tuple[int, int], nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    clock: Callable[[], float],
) -> tuple[dict[tuple[int, int], int], float]:
    """The shortest time of each block, in ns, and the largest spread; rounds go on until it is small or time is up."""
    taken: dict[tuple[int, int], list[float]] = {kept: [] for kept in blocks}
    start, calls, unrest = time.perf_counter(), CALLS if device.type == "cuda" else 1, 0.0
    with torch.inference_mode():
        for done in range(1, MOST_ROUNDS + 1):
            for kept, block in blocks.items():
                taken[kept].append(seconds(block, args, kwargs, device, calls, clock))
            unrest = max(spread(times) for times in taken.values())
            if done >= LEAST_ROUNDS and (unrest <= SETTLED or time.perf_counter() - start > SECONDS):
                break
    return {kept: round(1e9 * min(times)) for kept, times in taken.items()}, unrest


def spread(times: list[float]) -> float:
    """By how much the second shortest time exceeds the shortest, relative to it; 0 for a single time."""
    least, *others = sorted(times)
    return others[0] / least - 1 if others else 0.0


def seconds(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    calls: int,
    clock: Callable[[], float],
) -> float:
    """Seconds of one call, the mean of `calls` in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    for _ in range(calls):
        block(*args, **kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - start) / calls
