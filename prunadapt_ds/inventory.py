"""Counts the parameters, saved activations and operations of a model of one shape, without allocating any weights.

The model is built on the meta device by the same code that trains it (records, adapters, gates, cuts), so the activations
counted are those that autograd would save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunadapt_ds import adapters, backbone, gates, memory, tmp, zero3
from prunadapt_ds.budget import PruningPlan, check_target
from prunadapt_ds.config import Config
from prunadapt_ds.engine import trainable_counts
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.auto_classes import auto_class
from prunadapt_ds.models.families import Family
from prunadapt_ds.models.layouts import family_of, layout_of, most_tokens, with_floors
from prunadapt_ds.models.modeling_prunadapt import Layout
from prunadapt_ds.models.structure import Structure, full_numel, layers_of, structure_of
from prunadapt_ds.objective import sample_losses
from prunadapt_ds.resize import resize

NAME = "prunadapt_plan"  # name under which its attention is registered with transformers


class Size(NamedTuple):
    """Elements of a parameter, whether it trains, and elements of its whole block (0 if it is in none, or in a shared one)."""

    elements: int
    trains: bool
    block: int


@dataclass(frozen=True)
class Inventory:
    """The sizes of a model of one shape.

    `tensors`: each parameter's size, by name.
    `largest_module`: elements of the module with the largest parameters of its own.
    `activations`: bytes of a micro-batch at the peak of a step: those saved for the backward pass, and a language model's logits.
    `accounted`: those that memory.SavedActivations counts, which does not see what a block saves while it is recomputed.
    `macs`: multiply-accumulates of a micro-batch's forward pass.
    `exported`: elements of the exported model.
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
        """Elements of the trainable parameters that stay whole between steps under ZeRO-3, see `engine.keep_whole`.

        zero: the ds_config's `zero_optimization`.
        """
        threshold = zero.get("stage3_param_persistence_threshold", 0)
        small = [size for size in self.tensors.values() if size.trains and size.elements <= threshold]
        return sum(size.elements for size in small if not zero3.is_piece(size.block, zero))


@dataclass
class Skeleton:
    """A model on the meta device, built as `setup.setup` and `session.add_trainables` would, but without dropout."""

    model: Any
    family: Family
    layout: Layout
    structure: Structure
    is_language: bool
    head: frozenset[str]


def skeleton(model_config: Any, config: Config, dtype: torch.dtype) -> Skeleton:
    """Build the dense model with all trainable parts on the meta device. Raises UserError as training would."""
    from transformers.initialization import no_init_weights

    is_language = config.is_language
    family = family_of(model_config)
    if is_language and not family.is_decoder:
        raise UserError(Problem("task_type", "causal_lm", f"{model_config.model_type} is not a decoder"))
    if family.is_decoder:
        model_config.use_cache = False
        model_config.pad_token_id = model_config.pad_token_id or 0
    _register()
    name = config.model.model_name_or_path
    with backbone.refusals(name), torch.device("meta"), no_init_weights():
        model = auto_class(is_language).from_config(model_config, dtype=dtype, attn_implementation=NAME)
    layout = layout_of(family, model_config, model.base_model_prefix)
    backbone.refuse_no_layers(name, layout)
    most = most_tokens(model)
    if most is not None and config.data.max_seq_length > most:
        raise UserError(Problem("max_seq_length", config.data.max_seq_length, f"the model takes at most {most} tokens"))
    prune = config.prune
    structure = with_floors(family, structure_of(model, layout, config.data.max_seq_length), model_config, prune)
    check_target(structure, prune.target_sparsity or 0.0, prune.budget, prune.target_speedup)
    inside = f"{model.base_model_prefix}."
    below = tuple(f"{module}." for module in family.task_head)
    new = (n for n, _ in model.named_parameters() if n.startswith(below) or not (is_language or n.startswith(inside)))
    head = frozenset(new)
    backbone.freeze(model, head)
    backbone.no_dropout(model)
    method = config.prune.method
    ranks = {}
    if method == "tmp":  # which layers get the higher rank does not affect any size
        important = round(layout.num_layers * tmp.IMPORTANT_FRACTION)
        ranks = {i: tmp.IMPORTANT_RANK if i < important else tmp.OTHER_RANK for i in range(layout.num_layers)}
    targets = adapters.target_modules(layout, config.lora.target_modules, only_head_inputs=method == "tmp")
    with torch.device("meta"):
        adapters.prepare(model, layout, targets, config, ranks)
    if method == "prunadapt":
        gates.attach(model, layout, structure)
    return Skeleton(model, family, layout, structure, is_language, head)


class _Kept(torch.autograd.Function):
    """Saves what a fused attention would: q, k, v, the mask, the output, and a float per head and token."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise AssertionError("a plan has no backward pass")


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> Any:
    """The attention function for the meta device. It repeats keys and values of a group, as transformers does with a mask."""
    sharing = query.shape[1] // key.shape[1]
    if sharing > 1:
        key, value = key.repeat_interleave(sharing, 1), value.repeat_interleave(sharing, 1)
    return _Kept.apply(query, key, value, mask).transpose(1, 2).contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)

    def padded_mask(*args: Any, **options: Any) -> Tensor | None:
        """Assumes that the batch is padded: values on the meta device cannot be inspected."""
        return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    AttentionMaskInterface.register(NAME, padded_mask)


def kept_bytes(built: Skeleton, batch_size: int, seq_length: int, num_labels: int) -> tuple[int, int, int, int]:
    """Bytes that a forward pass saves: outside the blocks, in all blocks, in the largest block, and as the blocks' inputs.

    Runs a forward pass with the loss on the meta device and counts with `memory.SavedActivations`.
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
        with everything_counts, saved.watch():  # assumes that no token of a language model is ignored
            logits = built.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            loss = sample_losses(logits, labels, is_regression=num_labels == 1 and not built.is_language)
    finally:
        for hook in hooks:
            hook.remove()
    del loss
    return saved.bytes - sum(blocks), sum(blocks), max(blocks), hidden * len(blocks)


def sizes(model: nn.Module, blocks: Iterable[tuple[int, nn.Module]], path: str) -> dict[str, Size]:
    """Every parameter's size by name, sharded or not. blocks: (index below `path`, block); empty if layers are shared."""
    found = {name: Size(full_numel(p), p.requires_grad, 0) for name, p in model.named_parameters()}
    for index, block in blocks:
        total = sum(full_numel(p) for p in block.parameters())
        for name, _ in block.named_parameters(prefix=f"{path}.{index}"):
            found[name] = found[name]._replace(block=total)
    return found


def take_stock(
    built: Skeleton, config: Config, batch: int, num_labels: int, present: PruningPlan | None = None
) -> Inventory:
    """Take the skeleton's inventory for micro-batches of `batch` samples. `present`: the plan it was cut to (None: dense)."""
    model, structure, length = built.model, built.structure, config.data.max_seq_length
    outside, blocks, largest, inputs = kept_bytes(built, batch, length, num_labels)
    recomputes = config.train.gradient_checkpointing
    tensors = sizes(
        model, layers_of(model, built.layout) if not built.family.shares_layers else (), built.layout.layers
    )
    counts = trainable_counts(model, built.head)
    lora = counts.get("adapters", 0)
    output = model.get_output_embeddings().weight if built.is_language else None
    head, logits = (output.numel(), _logit_bytes(output, batch * length)) if output is not None else (0, 0)
    block_macs = present.cost("macs") if present else structure.dense_cost("macs")
    return Inventory(
        tensors=tensors,
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        activations=outside + (inputs + max(largest, logits) if recomputes else blocks + logits),
        accounted=outside + (inputs if recomputes else blocks),
        macs=batch * (block_macs + length * (lora * built.layout.passes + head)),
        exported=sum(size.elements for size in tensors.values()) - lora - counts.get("gates", 0),
    )


def _logit_bytes(output: Tensor, tokens: int) -> int:
    """Bytes that the logits of that many tokens take at the peak of a step, beside the fp32 copy that the loss saves.

    These are the logits themselves, and two gradients in fp32: of the loss's picks, and of the softmax before them. `output`:
    the weight of the output embedding, [V, D].
    """
    return tokens * output.shape[0] * (output.element_size() + 4 + 4)


def cut_down(built: Skeleton, cut: PruningPlan) -> None:
    """Cut the skeleton, in place. Its gates are rebuilt, because masks on the meta device have no values to slice."""
    had_gates = next(gates.gates_of(built.model), None) is not None
    gates.detach(built.model)
    resize(built.model, built.layout, cut)
    if had_gates:
        pairs = zip(built.structure.sublayers, cut.kept, strict=True)
        left = tuple(dataclasses.replace(s, num_units=len(kept)) for s, kept in pairs if kept)
        gates.attach(built.model, built.layout, dataclasses.replace(built.structure, sublayers=left))


def between(dense: Inventory, small: Inventory, way: float) -> Inventory:
    """Interpolate linearly between two inventories. way: 0 for `dense`, 1 for `small`."""

    def mix(a: int, b: int) -> int:
        return round(a + way * (b - a))

    gone = Size(0, False, 0)  # a sub-layer without units has no weights, and its output bias has another name

    def mixed(name: str, trains: bool) -> Size:
        a, b = dense.tensors.get(name, gone), small.tensors.get(name, gone)
        return Size(mix(a.elements, b.elements), trains, mix(a.block, b.block or a.block))

    tensors = {name: mixed(name, size.trains) for name, size in {**small.tensors, **dense.tensors}.items()}
    names = ("largest_module", "activations", "accounted", "macs", "exported")
    return Inventory(tensors, *(mix(getattr(dense, name), getattr(small, name)) for name in names))
