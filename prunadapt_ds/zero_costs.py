"""What an inventory costs at each ZeRO stage: bytes that a rank holds, bytes that it sends, seconds of a step.

Legend: n trainable elements, e bytes per stored element (2 for bf16).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from prunadapt_ds.config import Config
from prunadapt_ds.ds_config import DsConfig
from prunadapt_ds.inventory import Inventory, Size

MASTERS, MOMENTS = 4, 8  # bytes per element: an fp32 master; Adam's two moments
DEEPSPEED_REUSE_ELEMENTS = 1_000_000_000  # DeepSpeed's default for stage3_max_reuse_distance
DEEPSPEED_BUCKET_ELEMENTS = 500_000_000  # and for reduce_bucket_size
BYTES = ("frozen", "trainable", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True)
class Machine:
    """The hardware that a plan assumes. Rates are sustained ones, not those of a data sheet."""

    world_size: int = 1
    gpus_per_node: int = 8
    gpu_memory: float = 80 * 2**30  # bytes
    flops: float = 400e12  # floating-point operations/s of one GPU in a model's matrix products
    bandwidth: float = 400e9  # bytes/s of one GPU to the others in its node
    network_bandwidth: float = 25e9  # bytes/s of one GPU to other nodes
    host_bandwidth: float = 25e9  # bytes/s of one GPU to its host's memory
    reserve: float = 0.1  # share of the GPU's memory lost to the driver, libraries and fragmentation

    @property
    def link(self) -> float:
        """Bytes/s of a collective over all ranks: those of its slowest link."""
        return self.bandwidth if self.world_size <= self.gpus_per_node else self.network_bandwidth


def rank_bytes(stock: Inventory, ds: DsConfig, machine: Machine, *, recomputes: bool) -> dict[str, dict[str, int]]:
    """Bytes that one rank holds at the peak of a step: {"device": {...}, "host": {...}}, each by the kinds in `BYTES`."""
    world, stage, e = machine.world_size, ds.stage, _element_bytes(ds)
    zero = ds.values["zero_optimization"]
    n, share = stock.trainable, 1 / world if stage else 1.0
    if stage == 3:
        parts = [(ceil(size.elements / world), size.trains) for size in stock.tensors.values()]
        frozen = sum(part for part, trains in parts if not trains) * e
        trainable = (sum(part for part, trains in parts if trains) + stock.whole(zero)) * e
    else:
        frozen, trainable = stock.frozen * e, n * e
    summed_in_fp32 = ds.values.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    gradients = round(n * (4 if summed_in_fp32 else e) * (share if stage >= 2 else 1)) + (
        n * 4 if stage == 0 and e == 2 else 0
    )
    states = n * (MOMENTS if stage == 0 and e == 4 else MASTERS + MOMENTS)
    bucket = zero.get("reduce_bucket_size", DEEPSPEED_BUCKET_ELEMENTS) * e if stage else 0
    gathered = 0
    if stage == 3:
        live = max(stock.largest_module, _held_elements(stock, zero, recomputes))
        gathered = min(live + zero.get("stage3_prefetch_bucket_size", 0), stock.frozen + n) * e
    device = {
        "frozen": frozen,
        "trainable": trainable,
        "gradients": gradients,
        "optimizer": round(states * share),
        "activations": stock.activations,
        "buffers": bucket + gathered,
    }
    host = dict.fromkeys(BYTES, 0)
    stays = {"trainable": stock.whole(zero) * e if stage == 3 else 0}
    for block, names in (("offload_param", ("frozen", "trainable")), ("offload_optimizer", ("optimizer", "gradients"))):
        where = (zero.get(block) or {}).get("device", "none")
        for name in names if where != "none" else ():
            host[name], device[name] = device[name] - stays.get(name, 0), stays.get(name, 0)
        if where == "nvme":  # files hold them, and the host only pinned buffers, of parameters
            host |= dict.fromkeys(names, 0)
            if block == "offload_param":
                host["buffers"] += zero[block].get("buffer_count", 5) * zero[block].get("buffer_size", 10**8) * e
    return {"device": device, "host": host}


def _element_bytes(ds: DsConfig) -> int:
    return 2 if ds.dtype == "bf16" else 4


def _held_elements(stock: Inventory, zero: dict[str, Any], recomputes: bool) -> int:
    """Elements that ZeRO-3 keeps gathered between forward and backward pass because they are used again soon.

    A module stays gathered if its parameters are used again within `stage3_max_reuse_distance` elements. That holds for the
    last blocks: d elements before the end of the forward pass, the next use is 2 d elements away (3 d with recomputation).
    """
    reuse = zero.get("stage3_max_reuse_distance", DEEPSPEED_REUSE_ELEMENTS)
    return min(stock.frozen + stock.trainable, round(reuse / (3 if recomputes else 2)))


def accounted_bytes(stock: Inventory, ds: DsConfig, machine: Machine) -> int:
    """What a report's `live_tensor_bytes` would say: parameters, optimizer state, and the activations counted there."""
    parts = rank_bytes(stock, ds, machine, recomputes=False)
    total = sum(parts[place][name] for place in parts for name in ("frozen", "trainable", "optimizer"))
    return total + stock.accounted


def traffic(stock: Inventory, ds: DsConfig, machine: Machine, config: Config) -> dict[str, int]:
    """Bytes that a rank sends in an optimizer step: {"gather", "reduce"} to other ranks, {"host"} to and from host memory."""
    world, stage, e = machine.world_size, ds.stage, _element_bytes(ds)
    zero, train = ds.values["zero_optimization"], config.train
    others = (world - 1) / world
    steps = ds.values["gradient_accumulation_steps"]
    n = stock.trainable
    # Stages 2 and 3 reduce after every micro-batch. By default, all but stage 3 all-reduce, which sends everything twice.
    is_once = zero.get("reduce_scatter", True) if stage == 3 else not zero.get("use_multi_rank_bucket_allreduce", True)
    reduce = n * e * others * (1 if stage and is_once else 2) * (steps if stage >= 2 else 1)
    gather = host = 0.0
    if stage in (1, 2):
        gather = n * e * others
    if stage == 3:
        whole = stock.whole(zero)
        total = (stock.frozen + n - whole) * e
        held = _held_elements(stock, zero, train.gradient_checkpointing) / max(1, stock.frozen + n)
        passes = (2 - held) * steps
        gather = others * (total * passes + whole * e)
        if (zero.get("offload_param") or {}).get("device", "none") != "none":
            host += total / world * passes
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        host += 2 * n * e / world
    return {"gather": round(gather), "reduce": round(reduce), "host": round(host)}


def sent_bytes(tensors: dict[str, Size], ds: DsConfig, world_size: int, config: Config) -> int:
    """Bytes that a rank sends to other ranks in an optimizer step of a model with these tensors."""
    stock = Inventory(tensors, largest_module=0, activations=0, accounted=0, macs=0, exported=0)
    parts = traffic(stock, ds, Machine(world_size=world_size), config)
    return parts["gather"] + parts["reduce"]


def step_seconds(
    stock: Inventory, sent: dict[str, int], ds: DsConfig, machine: Machine, config: Config
) -> dict[str, float]:
    """Seconds of an optimizer step: {"compute", "communication", "total"}. Stage 3 overlaps its fetches with computation."""
    steps = ds.values["gradient_accumulation_steps"]
    compute = 2 * macs_per_step(stock, config, steps) / machine.flops
    travel = max(sent["gather"] / machine.link, sent["host"] / machine.host_bandwidth)
    reduce = sent["reduce"] / machine.link
    overlapped = max(compute, travel) if ds.stage == 3 else compute + travel
    return {"compute": compute, "communication": travel + reduce, "total": overlapped + reduce}


def macs_per_step(stock: Inventory, config: Config, accumulation_steps: int = 1) -> int:
    """Multiply-accumulates of a rank's step: forward pass, gradients of activations, recomputation.

    With --method full also the gradients of weights; those of adapters alone are neglected.
    """
    passes = 3 if config.prune.method == "full" else 2
    return stock.macs * (passes + config.train.gradient_checkpointing) * accumulation_steps
