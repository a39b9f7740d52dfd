"""Writes an unpruned run's LoRA matrices and trained head as a folder that PEFT loads onto the base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prunadapt_ds import export, hub, labels
from prunadapt_ds.adapters import ADAPTER, PREFIX, is_lora
from prunadapt_ds.backbone import Backbone
from prunadapt_ds.distributed import on_rank_0, rank
from prunadapt_ds.engine import gathered
from prunadapt_ds.files import whole_folder
from prunadapt_ds.model_folder import folder_of
from prunadapt_ds.models import auto_classes


def write(
    backbone: Backbone,
    base: str,
    targets: list[str],
    lora: Any,
    folder: Path,
    *,
    head: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (fp32) to `folder`, complete or not at all.

    Collective; rank 0 writes. base: folder or hub ID of the base model; a folder is stored with its absolute path, an ID with
    its revision. lora: the run's LoRA options. head: (factor, shift) to apply to parameters by name, see `label_scale.fold`.
    """
    tensors = {
        PREFIX + name: export.affine(*head[name], value) if head and name in head else value
        for name, value in _trained(backbone)
    }
    on_rank_0(f"writing the export {folder}", lambda: _write(backbone, base, targets, lora, folder, tensors))


def _write(
    backbone: Backbone, base: str, targets: list[str], lora: Any, folder: Path, tensors: dict[str, Tensor]
) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    repository, revision = (str(Path(base).resolve()), None) if Path(base).is_dir() else hub.split(base)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(targets),
        fan_in_fan_out=any(m.fan_in_fan_out for m in backbone.model.modules() if is_lora(m)),
        modules_to_save=saved_modules(backbone) or None,
        base_model_name_or_path=repository,
        revision=revision,
        inference_mode=True,
    )
    with whole_folder(folder) as unfinished:
        config.save_pretrained(str(unfinished))
        save_file(tensors, unfinished / "adapter_model.safetensors", {"format": "pt"})
        export.to_save(backbone.tokenizer).save_pretrained(unfinished)
        if auto_classes.name_for(type(backbone.model).__name__) == auto_classes.CLASSIFIER:
            labels.write(backbone.model.config, unfinished)


def saved_modules(backbone: Backbone) -> list[str]:
    """Modules that are saved whole: the task head, and everything else that was trained without LoRA."""
    heads = [
        name for name in backbone.family.task_head if any(n.startswith(name + ".") for n in backbone.task_head_names)
    ]
    others = {name.rpartition(".")[0] for name in _plain_trainables(backbone)}
    return heads + sorted(o for o in others if not any(f"{o}.".startswith(f"{h}.") for h in heads))


def _plain_trainables(backbone: Backbone) -> list[str]:
    return [n for n, p in backbone.model.named_parameters() if p.requires_grad and "lora_" not in n]


def _trained(backbone: Backbone) -> list[tuple[str, Tensor]]:
    """Names and fp32 tensors of everything in the adapter, on the CPU of rank 0; [] on other ranks. Collective."""
    parts = tuple(f"{name}." for name in saved_modules(backbone))
    found = []
    for name, parameter in backbone.model.named_parameters():
        if "lora_" not in name and not name.startswith(parts):
            continue
        with gathered([parameter]):
            if rank() == 0:
                found.append((name.replace(f".{ADAPTER}.", "."), parameter.detach().float().cpu().clone()))
    return found


def base_of(backbone: Backbone, base: str) -> dict[str, Any]:
    """What a fresh process needs to load the base model: its folder, its auto class, and its label count and padding token ID."""
    return {
        "model": str(folder_of(base).resolve()),
        "auto_class": auto_classes.name_for(type(backbone.model).__name__),
        "num_labels": backbone.model.config.num_labels,
        "pad_token_id": backbone.model.config.pad_token_id,
    }
