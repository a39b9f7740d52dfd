"""What a run would need, from the model's configuration alone: bytes, communication and seconds, before a GPU is booked.

The model is built on the meta device by the same code that trains it (records, adapters, gates, cuts), so that every size is
read off real shapes and every activation is one that autograd would really keep; no weight is read. What is added here is what
DeepSpeed does with those tensors at each ZeRO stage.

Legend: W ranks, N elements that train, e bytes of an element as it is stored (2 for bf16).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunadapt_ds import adapters, backbone, gates, memory, tmp, zero3
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.config import Config
from prunadapt_ds.ds_config import DsConfig, resolve_ds_config
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.families import Family, family_of, layout_of
from prunadapt_ds.models.modeling_prunadapt import Layout
from prunadapt_ds.models.structure import Structure, layers_of, measure
from prunadapt_ds.objective import sample_losses
from prunadapt_ds.resize import resize
from prunadapt_ds.schedule import PruningSchedule
from prunadapt_ds.session import check_target, no_dropout, train_norms

MASTERS, MOMENTS = 4, 8  # bytes of an element: an fp32 master; Adam's two moments
DEEPSPEED_REUSE_ELEMENTS = 1_000_000_000  # stage3_max_reuse_distance where a file does not say
DEEPSPEED_BUCKET_ELEMENTS = 500_000_000  # reduce_bucket_size, likewise
BYTES = ("frozen", "trainable", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True)
class Machine:
    """What the seconds rest on. Sustained rates, not those of a data sheet."""

    world_size: int = 1
    gpus_per_node: int = 8
    gpu_memory: float = 80 * 2**30  # bytes
    flops: float = 400e12  # floating-point operations/s of one GPU in these matrix products
    bandwidth: float = 400e9  # bytes/s of one GPU to the others of its node
    network_bandwidth: float = 25e9  # bytes/s of one GPU to other nodes
    host_bandwidth: float = 25e9  # bytes/s of one GPU to its host's memory
    reserve: float = 0.1  # share of the GPU's memory for the driver, libraries and fragments

    @property
    def link(self) -> float:
        """Bytes/s of a collective over all ranks: its slowest part."""
        return self.bandwidth if self.world_size <= self.gpus_per_node else self.network_bandwidth


class Size(NamedTuple):
    """Elements of a parameter, whether it trains, and elements of the block it is in (0: of none, or of a shared one)."""

    elements: int
    trains: bool
    block: int


@dataclass(frozen=True)
class Inventory:
    """What a model of one shape holds, keeps and computes.

    tensors: each parameter's size, by name.  largest_module: most elements of one module's own parameters.  activations:
    bytes kept for the backward pass of a micro-batch; accounted: those of them that memory.SavedActivations counts (it does
    not see what a block saves while it is computed again).  macs: of a micro-batch's forward pass.  exported: elements of
    the exported model.
    """

    tensors: dict[str, Size]
    largest_module: int
    activations: int
    accounted: int
    macs: int
    exported: int

    @property
    def trainable(self) -> int:
        return sum(size.elements for size in self.tensors.values() if size.trains)

    @property
    def frozen(self) -> int:
        return sum(size.elements for size in self.tensors.values() if not size.trains)

    def whole(self, zero: dict[str, Any]) -> int:
        """Elements of what trains and stays whole between steps under ZeRO-3: see `engine.keep_whole`."""
        threshold = zero.get("stage3_param_persistence_threshold", 0)
        small = [size for size in self.tensors.values() if size.trains and size.elements <= threshold]
        return sum(size.elements for size in small if not zero3.is_piece(size.block, zero))


@dataclass
class Skeleton:
    """A model on the meta device, as `session.setup` and `add_trainables` would have built it."""

    model: Any
    family: Family
    layout: Layout
    structure: Structure
    is_language: bool
    head: frozenset[str]


# ------------------------------------------------------------------------------------------------------- the model


def read_config(name: str, num_labels: int, *, is_language: bool, trust_remote_code: bool = False) -> Any:
    """The configuration of a hub id, a folder, or a JSON file. Raises UserError."""
    from transformers import AutoConfig

    labels = {} if is_language else {"num_labels": num_labels}
    path = Path(backbone.locate(name))
    if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix == ".json"):
        raise UserError(Problem("model_name_or_path", name, "there is no such file or folder"))
    offline = None if path.exists() else backbone.why_offline(name)
    try:
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(values.pop("model_type"), **{**values, **labels})
        return AutoConfig.from_pretrained(
            str(path) if path.exists() else name,
            trust_remote_code=trust_remote_code,
            local_files_only=bool(offline),
            **labels,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        remedy = f"no configuration can be read there ({reason}); name a hub id, a folder or a config.json"
        if offline:
            remedy = f"could not be read from the hub ({offline}), nor is it in the local cache; name a config.json"
        raise UserError(Problem("model_name_or_path", name, remedy)) from error


def skeleton(model_config: Any, config: Config, dtype: torch.dtype) -> Skeleton:
    """The dense model with everything that trains, on the meta device. Raises UserError as training would."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.initialization import no_init_weights

    is_language = config.data.task_type == "causal_lm"
    family = family_of(model_config)
    if is_language and not family.is_decoder:
        raise UserError(Problem("task_type", "causal_lm", f"{model_config.model_type} is no decoder"))
    if family.is_decoder:
        model_config.use_cache = False
        model_config.pad_token_id = model_config.pad_token_id or 0
    auto: Any = AutoModelForCausalLM if is_language else AutoModelForSequenceClassification
    _register()
    with torch.device("meta"), no_init_weights():
        model = auto.from_config(model_config, dtype=dtype, attn_implementation=NAME)
    layout = layout_of(family, model_config, model.base_model_prefix)
    structure = measure(model, layout, config.data.max_seq_length)
    check_target(config, structure)
    inside = f"{model.base_model_prefix}."
    below = tuple(f"{module}." for module in family.head)
    new = (n for n, _ in model.named_parameters() if n.startswith(below) or not (is_language or n.startswith(inside)))
    head = frozenset(new)
    backbone.freeze(model, head)
    no_dropout(model)
    method = config.prune.method
    if method == "full":
        model.requires_grad_(True)
    else:
        ranks = {}
        if method == "tmp":  # which layers get the higher rank makes no difference to any size
            important = round(layout.num_layers * tmp.IMPORTANT_FRACTION)
            ranks = {i: tmp.IMPORTANT_RANK if i < important else tmp.OTHER_RANK for i in range(layout.num_layers)}
        targets = adapters.target_modules(layout, config.lora.target_modules, only_head_inputs=method == "tmp")
        with torch.device("meta"):
            adapters.add_lora(
                model, layout, targets, r=config.lora.r, lora_alpha=config.lora.lora_alpha, rank_per_layer=ranks
            )
    if config.lora.train_norms:
        train_norms(model)
    if method == "prunadapt":
        gates.attach(model, layout, structure)
    return Skeleton(model, family, layout, structure, is_language, head)


NAME = "prunadapt_plan"


class _Kept(torch.autograd.Function):
    """What a fused attention keeps: q, k, v, the mask, its output, and a float per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise AssertionError("a plan has no backward pass")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> Any:
    """transformers' attention function on the meta device; keys and values of a group are repeated, as with any mask."""
    sharing = query.shape[1] // key.shape[1]
    if sharing > 1:
        key, value = key.repeat_interleave(sharing, 1), value.repeat_interleave(sharing, 1)
    return _Kept.apply(query, key, value, mask).transpose(1, 2).contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)

    def padded_mask(*args: Any, **options: Any) -> Tensor | None:
        """A batch is taken to be padded: nothing on the meta device can be looked at."""
        return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    AttentionMaskInterface.register(NAME, padded_mask)


def kept_bytes(built: Skeleton, batch_size: int, seq_length: int, num_labels: int) -> tuple[int, int, int, int]:
    """Bytes that a forward pass keeps: outside the blocks, in all blocks, in the largest block, and a block's input.

    A real forward pass on the meta device, with the loss, counted by `memory.SavedActivations`.
    """
    from torch.fx.experimental import _config as fx_config

    ids = torch.zeros(batch_size, seq_length, dtype=torch.long, device="meta")
    labels = ids if built.is_language else ids[:, 0]
    if num_labels == 1 and not built.is_language:
        labels = labels.float()
    saved, blocks, entered = memory.SavedActivations(), [], []
    hidden = 0

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal hidden
        hidden = args[0].numel() * args[0].element_size()
        entered.append(saved.bytes)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        blocks.append(saved.bytes - entered.pop())

    hooks = [
        h
        for _, layer in layers_of(built.model, built.layout)
        for h in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))
    ]
    try:
        everything_counts = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
        with everything_counts, saved.watch():  # every token of a language model is taken to be learnt
            logits = built.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            loss = sample_losses(logits, labels, is_regression=num_labels == 1 and not built.is_language)
    finally:
        for hook in hooks:
            hook.remove()
    del loss
    return saved.bytes - sum(blocks), sum(blocks), max(blocks), hidden * len(blocks)


def take_stock(
    built: Skeleton, config: Config, batch: int, num_labels: int, present: PruningPlan | None = None
) -> Inventory:
    """Count what the skeleton holds, keeps and computes: `present` (None: dense), micro-batches of `batch` samples."""
    model, structure, length = built.model, built.structure, config.data.max_seq_length
    outside, blocks, largest, inputs = kept_bytes(built, batch, length, num_labels)
    recomputes = config.train.gradient_checkpointing
    tensors = {name: Size(p.numel(), p.requires_grad, 0) for name, p in model.named_parameters()}
    for index, block in [] if built.family.shares_layers else layers_of(model, built.layout):
        total = sum(p.numel() for p in block.parameters())
        for name, _ in block.named_parameters(prefix=f"{built.layout.layers}.{index}"):
            tensors[name] = tensors[name]._replace(block=total)
    extra = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n or f".{gates.GATE_NAME}." in n)
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    head = model.get_output_embeddings().weight.numel() if built.is_language else 0
    block_macs = present.cost("macs") if present else structure.dense_cost("macs")
    return Inventory(
        tensors=tensors,
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        activations=outside + inputs + largest if recomputes else outside + blocks,
        accounted=outside + (inputs if recomputes else blocks),
        macs=batch * (block_macs + length * (lora * built.layout.passes + head)),
        exported=sum(size.elements for size in tensors.values()) - extra,
    )


def even_plan(
    structure: Structure, share: float, neuron_multiple: int, kinds: Sequence[str] = ("heads", "neurons")
) -> PruningPlan:
    """Every sub-layer of `kinds` loses the same share of its units: what a plan looks like before scores are known."""
    kept = []
    for s in structure.sublayers:
        step = neuron_multiple if s.kind == "neurons" else 1
        cut = round(share * s.num_units / step) * step if s.kind in kinds else 0
        kept.append(tuple(range(max(s.floor, s.num_units - cut))))
    return PruningPlan(structure, tuple(kept))


def plan_for(structure: Structure, target: float, budget: str, neuron_multiple: int) -> PruningPlan:
    """The even plan that comes nearest to the target sparsity."""
    per_unit = "params_per_unit" if budget == "params" else "macs_per_unit"
    cuttable = sum(s.num_units * getattr(s, per_unit) for s in structure.sublayers)
    return even_plan(structure, min(1.0, target * structure.dense_cost(budget) / cuttable), neuron_multiple)


# ------------------------------------------------------------------------------------------------------ DeepSpeed


def rank_bytes(stock: Inventory, ds: DsConfig, machine: Machine, *, recomputes: bool) -> dict[str, dict[str, int]]:
    """Bytes of one rank, {"device": {...}, "host": {...}}, by what they hold: `BYTES`. At the peak of a step."""
    world, stage, e = machine.world_size, ds.stage, _element_bytes(ds)
    zero = ds.values["zero_optimization"]
    n, share = stock.trainable, 1 / world if stage else 1.0
    if stage == 3:
        parts = [(ceil(size.elements / world), size.trains) for size in stock.tensors.values()]
        frozen_e = 1 if zero.get("zero_quantized_nontrainable_weights") else e
        frozen = sum(part for part, trains in parts if not trains) * frozen_e
        trainable = (sum(part for part, trains in parts if trains) + stock.whole(zero)) * e
    else:
        frozen, trainable = stock.frozen * e, n * e
    gradients = round(n * e * (share if stage >= 2 else 1)) + (n * 4 if stage == 0 and e == 2 else 0)
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
    for block, names in (("offload_param", ("frozen",)), ("offload_optimizer", ("optimizer",))):
        if (zero.get(block) or {}).get("device", "none") != "none":
            for name in names:
                host[name], device[name] = device[name], 0
    return {"device": device, "host": host}


def _element_bytes(ds: DsConfig) -> int:
    return 2 if ds.dtype == "bf16" else 4


def _held_elements(stock: Inventory, zero: dict[str, Any], recomputes: bool) -> int:
    """Elements that ZeRO-3 does not let go between forward and backward pass, because they are used again soon.

    A module whose parameters come again within `stage3_max_reuse_distance` elements stays gathered: those of the last blocks,
    which lie d elements before the turn and 2 d before their next use (3 d with recomputation).
    """
    reuse = zero.get("stage3_max_reuse_distance", DEEPSPEED_REUSE_ELEMENTS)
    return min(stock.frozen + stock.trainable, round(reuse / (3 if recomputes else 2)))


def accounted_bytes(stock: Inventory, ds: DsConfig, machine: Machine) -> int:
    """What a report's `live_tensor_bytes` would say: parameters, optimizer, and the activations that are counted.

    Without ZeRO and in fp32 the optimizer's masters are the parameters themselves, which are then counted twice.
    """
    parts = rank_bytes(stock, ds, machine, recomputes=False)
    total = sum(parts[place][name] for place in parts for name in ("frozen", "trainable", "optimizer"))
    twice = stock.trainable * MASTERS if ds.stage == 0 and ds.dtype == "fp32" else 0
    return total + twice + stock.accounted


def traffic(stock: Inventory, ds: DsConfig, machine: Machine, config: Config) -> dict[str, int]:
    """Bytes that a rank sends in an optimizer step: {"gather", "reduce", "host"}."""
    world, stage, e = machine.world_size, ds.stage, _element_bytes(ds)
    zero, train = ds.values["zero_optimization"], config.train
    others = (world - 1) / world
    n = stock.trainable
    reduce = n * e * others * (2 if stage == 0 else 1)
    gather = host = 0.0
    if stage in (1, 2):
        gather = n * e * others
    if stage == 3:
        whole = stock.whole(zero)
        quantised = zero.get("zero_quantized_nontrainable_weights") or zero.get("zero_quantized_weights")
        total = stock.frozen * (1 if quantised else e) + (n - whole) * e
        held = _held_elements(stock, zero, train.gradient_checkpointing) / max(1, stock.frozen + n)
        passes = (2 - held) * ds.values["gradient_accumulation_steps"]
        gather = others * (total * passes + whole * e)
        if (zero.get("offload_param") or {}).get("device", "none") != "none":
            host += total / world * passes
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        host += 2 * n * e / world
    return {"gather": round(gather), "reduce": round(reduce), "host": round(host)}


def step_seconds(
    stock: Inventory, sent: dict[str, int], ds: DsConfig, machine: Machine, config: Config
) -> dict[str, float]:
    """Seconds of an optimizer step: {"compute", "communication", "total"}; parameters travel while others compute."""
    steps = ds.values["gradient_accumulation_steps"]
    compute = 2 * macs_per_step(stock, config, steps) / machine.flops
    travel = max(sent["gather"] / machine.link, sent["host"] / machine.host_bandwidth)
    reduce = sent["reduce"] / machine.link
    overlapped = max(compute, travel) if ds.stage == 3 else compute + travel
    return {"compute": compute, "communication": travel + reduce, "total": overlapped + reduce}


def macs_per_step(stock: Inventory, config: Config, accumulation_steps: int = 1) -> int:
    """Multiply-accumulates of a rank's step: forward, the gradients of activations, those of weights that train, recomputation."""
    passes = 3 if config.prune.method == "full" else 2
    return stock.macs * (passes + config.train.gradient_checkpointing) * accumulation_steps


# ------------------------------------------------------------------------------------------------------- the plan


def plan(
    model_config: Any,
    config: Config,
    machine: Machine,
    files: Sequence[Path],
    *,
    dtype: str = "bf16",
    num_labels: int = 2,
    train_examples: int = 100_000,
) -> dict[str, Any]:
    """Everything that `launcher/plan.py` says, as JSON. Raises UserError as training would."""
    import copy

    resolved, problems = {}, []
    for file in files:
        train = dataclasses.replace(config.train, ds_config=str(file))
        try:
            resolved[file.name] = resolve_ds_config(
                dataclasses.replace(config, train=train),
                machine.world_size,
                lambda: dtype == "bf16",
                on_this_machine=False,
            )
        except UserError as error:
            problems += [dataclasses.replace(p, field=f"{file.name}: {p.field}") for p in error.problems]
    if problems:
        raise UserError(problems)
    shapes: dict[Any, list[tuple[str, float, Inventory]]] = {}
    for ds in resolved.values():
        if (key := _shape_key(ds)) in shapes:
            continue
        built = skeleton(copy.deepcopy(model_config), config, torch.bfloat16 if ds.dtype == "bf16" else torch.float32)
        if config.train.gradient_checkpointing and not built.model.supports_gradient_checkpointing:
            remedy = f"transformers cannot recompute the blocks of {built.family.model_type}; leave it out"
            raise UserError(Problem("gradient_checkpointing", True, remedy))
        shapes[key] = phases(built, config, ds.values["train_micro_batch_size_per_gpu"], num_labels)
    configs = [
        _outcome(name, ds, shapes[_shape_key(ds)], machine, config)
        for name, ds in sorted(resolved.items(), key=lambda item: (item[1].stage, item[0]))
    ]
    able = [c for c in configs if c["fits"]]
    best = min((c["run_s_per_step"] for c in able), default=0.0)
    names = next(iter(shapes.values()))
    first, last = names[0][2], names[-1][2]
    per_master = MASTERS + MOMENTS
    is_averaged = config.prune.method == "prunadapt" and config.prune.distill_weight > 0
    return {
        "model": {
            "architecture": model_config.model_type,
            "parameters": first.exported,
            "blocks": built.structure.dense_cost("params"),
            "trainable": first.trainable,
        },
        "machine": {**dataclasses.asdict(machine), "link": machine.link},
        "run": {
            "method": config.prune.method,
            "target_sparsity": names[-1][1],
            "per_device_train_batch_size": config.train.per_device_train_batch_size,
            "max_seq_length": config.data.max_seq_length,
            "gradient_checkpointing": config.train.gradient_checkpointing,
        },
        "macs_per_step": {
            name: macs_per_step(stock, config, config.train.gradient_accumulation_steps)
            for name, stock in (("dense", first), ("last", last))
        },
        "export_bytes": last.exported * {"float32": 4}.get(config.output.export_dtype, 2),
        "checkpoint_bytes": {"dense": first.trainable * per_master, "last": last.trainable * per_master},
        "teacher_bytes": {  # in host memory, on every rank
            "logits": 4 * train_examples * num_labels if is_averaged else 0,
            "mean_weights": MASTERS * first.trainable if is_averaged else 0,
        },
        "configs": configs,
        # Of those within 1 % of the best, the first: the lowest stage, which sends least.
        "fastest": next((c["file"] for c in able if c["run_s_per_step"] <= 1.01 * best), None),
    }


def phases(built: Skeleton, config: Config, batch: int, num_labels: int) -> list[tuple[str, float, Inventory]]:
    """(name, sparsity, stock) before the first cut and after each. Cuts the skeleton.

    The last shape is really cut and counted; those between lie on the line to it, as do their sparsities: every size grows
    linearly with the units that are left when all layers lose the same share.
    """
    prune, structure = config.prune, built.structure
    dense = take_stock(built, config, batch, num_labels)
    target = prune.target_sparsity or 0.0
    if prune.method == "tmp":
        cut = even_plan(structure, tmp.CUT_FRACTION, prune.neuron_multiple, ("heads",))
    elif prune.method == "prunadapt" and target:
        cut = plan_for(structure, target, prune.budget, prune.neuron_multiple)
    else:
        return [("dense", 0.0, dense)]
    cut_down(built, cut)
    small = take_stock(built, config, batch, num_labels, cut)
    achieved = cut.sparsity(prune.budget)
    if prune.method == "tmp":
        return [("after the cut", achieved, small)]
    steps = PruningSchedule.from_fractions(1000, prune.prune_start, prune.prune_end, prune.num_decisions, 1.0)
    ways = [steps.sparsity(step) for step in steps.decision_steps]
    between = [(f"decision {i}", way * achieved, _between(dense, small, way)) for i, way in enumerate(ways, 1)]
    return [("dense", 0.0, dense), *between[:-1], ("last", achieved, small)]


def cut_down(built: Skeleton, cut: PruningPlan) -> None:
    """Cut the skeleton. Its gates are made anew: masks have no values here that could be sliced."""
    had_gates = next(gates.gates_of(built.model), None) is not None
    gates.detach(built.model)
    resize(built.model, built.layout, cut)
    if had_gates:
        pairs = zip(built.structure.sublayers, cut.kept, strict=True)
        left = tuple(dataclasses.replace(s, num_units=len(kept)) for s, kept in pairs if kept)
        gates.attach(built.model, built.layout, dataclasses.replace(built.structure, sublayers=left))


def _shape_key(ds: DsConfig) -> tuple[str, int]:
    return ds.dtype, ds.values["train_micro_batch_size_per_gpu"]


def _between(dense: Inventory, small: Inventory, way: float) -> Inventory:
    def mix(a: int, b: int) -> int:
        return round(a + way * (b - a))

    gone = Size(0, False, 0)  # a sub-layer without units has no weights, and its output bias another name

    def mixed(name: str, trains: bool) -> Size:
        a, b = dense.tensors.get(name, gone), small.tensors.get(name, gone)
        return Size(mix(a.elements, b.elements), trains, mix(a.block, b.block or a.block))

    tensors = {name: mixed(name, size.trains) for name, size in {**small.tensors, **dense.tensors}.items()}
    names = ("largest_module", "activations", "accounted", "macs", "exported")
    return Inventory(tensors, *(mix(getattr(dense, name), getattr(small, name)) for name in names))


def _outcome(
    name: str, ds: DsConfig, shapes: list[tuple[str, float, Inventory]], machine: Machine, config: Config
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for phase, sparsity, stock in shapes:
        parts = rank_bytes(stock, ds, machine, recomputes=config.train.gradient_checkpointing)
        sent = traffic(stock, ds, machine, config)
        rows.append(
            {
                "phase": phase,
                "sparsity": sparsity,
                "device_bytes": parts["device"],
                "host_bytes": parts["host"],
                "device_total": sum(parts["device"].values()),
                "host_total": sum(parts["host"].values()),
                "accounted_bytes": accounted_bytes(stock, ds, machine),
                "sent_bytes": sent,
                "seconds": step_seconds(stock, sent, ds, machine, config),
            }
        )
    most = max(row["device_total"] for row in rows)
    # Time in each phase: up to the first cut, between cuts, after the last one. Dense and last stand for the halves.
    seconds = (rows[0]["seconds"]["total"] + rows[-1]["seconds"]["total"]) / 2
    fits = most <= machine.gpu_memory * (1 - machine.reserve)
    return {"file": name, "stage": ds.stage, "dtype": ds.dtype, "fits": fits, "run_s_per_step": seconds, "phases": rows}
