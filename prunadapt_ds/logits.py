"""Logits of a dataset, computed by all ranks, every row exactly once.

Legend: N rows, B rows of a batch, C classes, T tokens, V vocabulary.
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
    """Yield this rank's batches of an evaluation: (positions in `rows`, inputs on the device, logits). Collective.

    Logits are [B, C], or [B, T, V] for language models. A rank without rows of its own takes part in the forward pass all the
    same: its batch is empty, and the logits are another row's. `engine`: a DeepSpeed engine or a module.
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
    """Logits of all rows, float32 [N, C] in the order of `rows`, on the CPU of every rank. Collective.

    For language models, what `reload.summary` keeps: [N, 2], or [N, V] for rows without token labels. `engine`: a DeepSpeed
    engine or a module.
    """
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


_UPCAST = {
    F.linear,
    F.embedding,
    F.layer_norm,
    F.conv1d,
    torch.matmul,
    torch.Tensor.matmul,
    torch.addmm,
    torch.Tensor.addmm,
}


class _Upcast(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _UPCAST:
            args = tuple(_float32(a) for a in args)
            kwargs = {k: _float32(v) for k, v in kwargs.items()}
        found = func(*args, **kwargs)
        # A cast to the weights' dtype, which stands for fp32 here: it must not round.
        is_rounded = func is torch.Tensor.to and args[0].dtype == torch.float32 and _is_low(found)
        return args[0].to(found.device) if is_rounded else found


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < torch.float32.itemsize


def _float32(value: Any) -> Any:
    return value.float() if _is_low(value) else value


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute fp32 matrix products in full precision, even if the environment allows TF32, as NVIDIA's NGC containers do."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def upcast_parameters(model: nn.Module) -> Iterator[None]:
    """Compute as if every parameter were stored in fp32: each weight is upcast only while it is used.

    This is how a bf16 model is compared with its export: the same weights, and no rounding in between.
    """
    adapters: list[Any] = [m for m in model.modules() if hasattr(m, "cast_input_dtype_enabled")]
    scaled: list[Any] = [m for m in model.modules() if hasattr(m, "scalar_embed_scale")]
    stored = [module.embed_scale for module in scaled]
    for module in adapters:  # PEFT would round LoRA's input to the dtype of its matrices
        module.cast_input_dtype_enabled = False
    for module in scaled:  # Gemma rounds the root of its width to the dtype of its weights
        module.embed_scale = torch.full_like(module.embed_scale, module.scalar_embed_scale, dtype=torch.float32)
    try:
        with _Upcast():
            yield
    finally:
        for module in adapters:
            module.cast_input_dtype_enabled = True
        for module, scale in zip(scaled, stored, strict=True):
            module.embed_scale = scale
