"""Adapters: LoRA through PEFT, optionally with a rank per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from prunadapt_ds import norms
from prunadapt_ds.config import Config
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.modeling_prunadapt import Layout, RemovedAttention

ADAPTER = "default"  # PEFT's name for the only adapter
PREFIX = "base_model.model."  # PEFT's prefix of parameter names in adapter files


def target_modules(layout: Layout, wanted: Sequence[str] | None = None, *, only_head_inputs: bool = False) -> list[str]:
    """Full names of the projections that get LoRA: by default all in the layout.

    `wanted`: only those whose path ends in one of these names. `only_head_inputs`: only query, key and value projections.
    Raises UserError for a wanted name that matches no projection.
    """
    below = []
    for sublayer in layout.sublayers:
        if only_head_inputs and sublayer.kind != "heads":
            continue
        below += [p.path for p in sublayer.inputs] + ([] if only_head_inputs else [sublayer.output.path])
    if wanted:
        unmatched = [w for w in wanted if not any(_ends_with(path, w) for path in below)]
        if unmatched:
            raise UserError(
                Problem(
                    "target_modules", unmatched, f"no projection has such a name; this model has {', '.join(below)}"
                )
            )
        below = [path for path in below if any(_ends_with(path, w) for w in wanted)]
    return [f"{layout.layers}.{i}.{path}" for i in range(layout.num_layers) for path in below]


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def prepare(
    model: nn.Module, layout: Layout, targets: Sequence[str], config: Config, rank_per_layer: Mapping[int, int]
) -> None:
    """Make trainable what the run's method trains besides the head: LoRA on `targets` and, if requested, norms; or everything.

    In place. All norms save their output instead of their input for the backward pass, see norms.py.
    """
    if config.prune.method == "full":
        model.requires_grad_(True)
    else:
        add_lora(
            model,
            layout,
            targets,
            r=config.lora.r,
            lora_alpha=config.lora.lora_alpha,
            lora_dropout=config.lora.lora_dropout,
            rank_per_layer=rank_per_layer,
        )
    if config.lora.train_norms:
        train_norms(model)
    norms.keep_outputs(model)


def add_lora(
    model: nn.Module,
    layout: Layout,
    targets: Sequence[str],
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    rank_per_layer: Mapping[int, int] | None = None,
) -> None:
    """Add LoRA to the named projections, in the model's own dtype. In place; the model itself is not wrapped.

    `rank_per_layer` overrides `r` for some layers. Their lora_alpha is scaled along, so the scaling lora_alpha / r is the same
    everywhere.
    """
    from peft import LoraConfig, inject_adapter_in_model

    ranks, alphas = {}, {}
    for layer, rank in (rank_per_layer or {}).items():
        pattern = rf"{re.escape(f'{layout.layers}.{layer}')}\..*"
        ranks[pattern], alphas[pattern] = rank, lora_alpha * rank / r
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
        target_modules=list(targets),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        bias="none",
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    dtype = next(model.parameters()).dtype
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)  # ZeRO needs all trainable parameters in one dtype
            parameter.requires_grad_(True)
        else:  # PEFT freezes everything that is not an adapter
            parameter.requires_grad_(name.replace(".base_layer", "") in trained or name in trained)


def train_norms(model: nn.Module) -> None:
    """Make the parameters of every normalisation layer trainable, except those left unread where an attention was removed."""
    modules = list(model.modules())
    unread = {norm for m in modules if isinstance(m, RemovedAttention) for norm in m.modules()}
    for module in modules:
        if norms.is_norm(module) and module not in unread:
            module.requires_grad_(True)


def is_lora(module: Any) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")
