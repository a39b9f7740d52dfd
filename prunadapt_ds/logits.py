"""Logits of a dataset, computed by all ranks, every row exactly once.

Legend: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunadapt_ds import watchdog, zero3
from prunadapt_ds.batches import Rows, evaluation_batches
from prunadapt_ds.distributed import all_gather_rows, rank, world_size
from prunadapt_ds.reload import summary


def forward_passes(
    engine: Any, rows: Rows, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
    """This rank's batches of an evaluation: (positions in `rows`, inputs on the device, logits). Collective.

    A rank without rows of its own keeps the others company: its batch is empty and the logits are another row's.
    `engine`: a DeepSpeed engine or a module.
    """
    was_training = engine.module.training if hasattr(engine, "module") else engine.training
    engine.eval()
    zero3.forget_trace(engine)
    for batch in evaluation_batches(rows.lengths, batch_size, rank(), world_size()):
        watchdog.beat()
        inputs = {k: v.to(device) for k, v in rows.inputs(batch or [0]).items()}
        with torch.no_grad():
            logits = engine(**inputs).logits
        yield batch, inputs, logits
    engine.train(was_training)
    zero3.forget_trace(engine)


@torch.no_grad()
def predict(engine: Any, rows: Rows, batch_size: int, device: torch.device) -> Tensor:
    """float32 [N, C] in the order of `rows`, on the CPU of every rank: the logits, or what `reload.summary` keeps of
    language. `engine`: a DeepSpeed engine or a module."""
    positions, logits = [], []
    for batch, inputs, output in forward_passes(engine, rows, batch_size, device):
        if output.dim() == 3:
            labels = rows.padded_labels(batch or [0], output.shape[1])
            output = summary(output, inputs["attention_mask"], None if labels is None else labels.to(device))
        output = output.float()
        padding = batch_size - len(batch)
        index = torch.tensor(batch + [-1] * padding, device=device)
        positions.append(index)
        logits.append(F.pad(output[: len(batch)], (0, 0, 0, padding)))
    index, values = all_gather_rows(torch.cat(positions)).cpu(), all_gather_rows(torch.cat(logits)).cpu()
    result = torch.full((len(rows), values.shape[1]), torch.nan)
    real = index >= 0
    result[index[real]] = values[real]
    return result


_UPCAST = {F.linear, F.embedding, F.layer_norm, torch.matmul, torch.Tensor.matmul, torch.addmm, torch.Tensor.addmm}


class _Upcast(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _UPCAST:
            args = tuple(_float32(a) for a in args)
            kwargs = {k: _float32(v) for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _float32(value: Any) -> Any:
    is_low = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32
    return value.float() if is_low else value


@contextmanager
def upcast_parameters(model: nn.Module) -> Iterator[None]:
    """Compute as if every parameter were stored in fp32: weights are upcast where they are used, shard by shard.

    This is how a bf16 model is compared with its export: same numbers, no rounding in between.
    """
    adapters: list[Any] = [m for m in model.modules() if hasattr(m, "cast_input_dtype_enabled")]
    for module in adapters:  # PEFT would round the input of LoRA to the dtype of its matrices
        module.cast_input_dtype_enabled = False
    try:
        with _Upcast():
            yield
    finally:
        for module in adapters:
            module.cast_input_dtype_enabled = True
