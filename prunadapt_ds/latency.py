"""What attention and feed-forward take at every width, measured: the table behind `--budget latency`.

One block of the model is built at several widths and timed on the run's own device and dtype. The time of a whole encoder is
taken to be the sum of its sub-layers' times, each of which is read off a measured curve.
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

SETTING = {
    "batch_size": 32,
    "seq_length": 128,
    "repeats": 20,
}  # of every measured latency, where no option says otherwise
POINTS = 8  # widths of each kind, beside nothing and the least
LEAST_ROUNDS, MOST_ROUNDS = 3, 40  # over all widths
SECONDS = 20.0  # after which there are no more than the least rounds
SETTLED = 0.05  # by which the two least times of a width may differ, so that there are no more rounds
ROUGH = 0.2  # from which on the times are worth nothing: the machine is too busy
CALLS = 8  # in a row on an accelerator, so that what launches them is hidden as in a whole model
VOCABULARY = 64  # of the model around the block, whose embeddings are not timed


@dataclass(frozen=True)
class LatencyTable:
    """Times of one block's parts, and how they were taken.

    `layer_ns`: a block without units: norms, residual sums, output biases. `heads`, `neurons`: (units kept, ns beyond that)
    as measured. `clock`: "wall", or on a busy machine "cpu": seconds of the processor. `spread`: how much the two least
    times of a width differ, of the width where they differ most.
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
    """ns by the number of units kept, [num_units + 1]: the measured points made monotone, straight lines between them.

    The nearest curve that never falls, in least squares: fewer units never take longer, what says so is noise.
    """
    from scipy.optimize import isotonic_regression

    units, ns = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    rising = isotonic_regression(ns).x
    return tuple(np.interp(np.arange(num_units + 1), units, rising - rising[0]).round().astype(int).tolist())


def with_times(structure: Structure, layout: Layout, table: LatencyTable) -> Structure:
    """The same structure whose sub-layers know what they take."""
    curves = {}
    for sub in layout.sublayers:
        found = curve(getattr(table, sub.kind), sub.num_units)
        curves[sub.kind] = tuple(layout.passes * ns for ns in found)
    sublayers = tuple(replace(s, latency=curves[s.kind]) for s in structure.sublayers)
    fixed = layout.passes * layout.num_layers * table.layer_ns
    return replace(structure, sublayers=sublayers, fixed_latency=fixed)


def sizes(num_units: int, least: int, multiple: int) -> list[int]:
    """The numbers of units that are timed: `least`, one step of `multiple` more, all, and some evenly between."""
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
    """Time a block like the model's, with random weights, at all widths. Nothing of `model` is read but class and configuration.

    Widths take turns, and of each the least time counts, so that what else runs on the machine disturbs little. Where it
    disturbs too much, on a CPU, what counts is the processor's time on one thread, which others hardly stretch. `name`:
    the device's. Random generators are as they were afterwards.
    """
    heads, neurons = layout.sublayers
    fewest = min(heads.floors, default=0)  # where attention cannot go, its least number belongs to the block
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
    """On a CPU, take the cores of the other ranks as well, which wait: an exported model is served alone."""
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
    """A dense block of the model's class on the device, and what its base model calls it with."""
    config = copy.deepcopy(model.config)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, VOCABULARY, 1
    config.use_cache = False  # it would grow from call to call
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
    """A copy of a dense block with so many heads and neurons."""
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
    """The least ns that a call of each block took, and the spread. Until they settle, or it has taken long enough."""
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
    """By how much the second least is more than the least."""
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
