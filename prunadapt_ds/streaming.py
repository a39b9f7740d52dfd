"""Load safetensors straight into ZeRO-3's partitions: every rank reads its own part of every tensor, and nothing is sent.

`from_pretrained` stays in charge: it finds the files, builds the model, initialises what the checkpoint lacks, ties weights.
Under ZeRO-3 it would read the whole checkpoint on rank 0 and send every tensor to every rank, which keeps only a part of it;
this step alone is replaced here. A partition is a contiguous run of the flattened tensor, so a rank maps a tensor, copies
its run, and unmaps the tensor before the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from prunadapt_ds.distributed import rank, together
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.structure import full_shape, is_sharded
from prunadapt_ds.weight_files import shapes
from prunadapt_ds.zero3 import own_run


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file that has not been read yet."""

    file: str
    key: str
    shape: tuple[int, ...]

    def flat(self) -> Tensor:
        """The flattened tensor, memory-mapped: pages are loaded as they are read, and unmapped with the last reference."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.key).reshape(-1)


@contextmanager
def streaming(name: str) -> Iterator[list[str]]:
    """Make `from_pretrained` stream under ZeRO-3 while the context lasts; nothing changes at other stages.

    Yields a list, to which loading adds notes for the user. `name`: of the model, for messages. If transformers converts weights
    as it loads (splits or merges them), a partition is not a run of a stored tensor: rank 0 then reads the whole checkpoint, as
    `from_pretrained` does by itself, and a note says so.
    """
    from transformers import modeling_utils
    from transformers.integrations import is_deepspeed_zero3_enabled

    notes: list[str] = []
    if not is_deepspeed_zero3_enabled():
        yield notes
        return
    read, load = modeling_utils.load_state_dict, getattr(modeling_utils, "_load_state_dict_into_zero3_model", None)
    if load is None:
        notes.append(f"{name}: this release of transformers loads weights in another way; rank 0 may read all of them")
        yield notes
        return

    def look(checkpoint_file: Any, *args: Any, **options: Any) -> dict[str, Stored]:
        return _stored(str(checkpoint_file))

    def fill(model: Any, stored: Mapping[str, Stored], load_config: Any) -> tuple[list[str], set[str]]:
        converting = _converters(load_config.weight_mapping or [], stored)
        if not converting:
            return [], _fill_model(name, model, stored, load_config.weight_mapping or [])
        notes.append(f"{name}: its checkpoint is converted as it loads ({converting}), so rank 0 reads all of it")
        whole: dict[str, Tensor] = {}
        for file in dict.fromkeys(tensor.file for tensor in stored.values()):
            whole |= read(file, map_location="cpu" if rank() == 0 else "meta")
        return load(model, whole, load_config)

    with (
        patch.object(modeling_utils, "load_state_dict", look),
        patch.object(modeling_utils, "_load_state_dict_into_zero3_model", fill),
    ):
        yield notes


def _stored(file: str) -> dict[str, Stored]:
    return {key: Stored(file, key, shape) for key, shape in shapes(file).items()}


def _converters(weight_mapping: list[Any], stored: Mapping[str, Stored]) -> str:
    """The pattern of a conversion, beyond renaming, that applies to a stored key; "" if there is none."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    converters = [entry for entry in weight_mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in weight_mapping if isinstance(entry, WeightRenaming)]
    patterns = (rename_source_key(key, renamings, converters)[1] for key in stored) if converters else ()
    return next((pattern for pattern in patterns if pattern is not None), "")


def _fill_model(name: str, model: Any, stored: Mapping[str, Stored], weight_mapping: list[Any]) -> set[str]:
    """Fill partitions and buffers; returns the model's keys that the checkpoint lacks or holds in another shape. Collective."""
    model._weight_conversions = weight_mapping  # transformers keeps it for saving
    targets: dict[str, Any] = model.state_dict(keep_vars=True)
    sources = _renamed(model, targets, stored, weight_mapping)
    fitting = {key: source for key, source in sources.items() if source.shape == full_shape(targets[key])}

    def fill_own() -> list[str]:
        left = []
        for key, source in fitting.items():
            try:
                if not _fill_own(targets[key], source):
                    left.append(key)
            except Exception as error:  # the file has vanished, or is damaged after its header
                remedy = f"{Path(source.file).name}: {key} cannot be read ({error}); fetch it again"
                raise UserError(Problem("model_name_or_path", name, remedy)) from error
            targets[key]._is_hf_initialized = True  # or transformers would initialise it again
        return left

    import deepspeed

    for key in together(fill_own):
        with deepspeed.zero.GatheredParameters([targets[key]], modifier_rank=0), torch.no_grad():
            if rank() == 0:
                targets[key].copy_(fitting[key].flat().view(fitting[key].shape))
    return set(targets) - set(fitting)


def _renamed(
    model: Any, targets: Mapping[str, Any], stored: Mapping[str, Stored], weight_mapping: list[Any]
) -> dict[str, Stored]:
    """Stored tensors by the model's keys; transformers itself translates old names and the base model's prefix."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in weight_mapping if isinstance(entry, WeightRenaming)]
    found = {}
    for key, source in stored.items():
        renamed, _ = rename_source_key(key, renamings, [], model.base_model_prefix, targets)  # type: ignore[arg-type]
        if renamed in targets:
            found[renamed] = source
    return found


@torch.no_grad()
def _fill_own(target: Any, source: Stored) -> bool:
    """Copy this rank's run of a stored tensor into its partition; False if that is not plainly in this rank's memory."""
    if not is_sharded(target):  # a buffer
        target.copy_(source.flat().view(source.shape))
        return True
    own = own_run(target)
    if own is None:
        return False
    start, run = own
    run.copy_(source.flat()[start : start + len(run)])
    return True
