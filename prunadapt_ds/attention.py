"""Attention for bf16 training on a CPU: plain matrix products over a few samples at a time that save only inputs and output.

In the bf16 backward pass, PyTorch's fused CPU kernel takes four times as long as these products do, and attention that
lets autograd save the probabilities needs memory for T * S of them per head. In all other cases (accelerators, other
dtypes, dropout, causal or grouped-query attention, no gradients) PyTorch's own `scaled_dot_product_attention` runs.

Legend: B samples, b of them at a time, N heads, T tokens, S tokens attended to, W head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAME = "prunadapt"


_CHUNK_BYTES = 16 * 2**20  # of probabilities computed at a time


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        out = torch.empty_like(q)
        for part in _parts(q, k):
            torch.matmul(_probabilities(q[part], k[part], _of(bias, part), scale), v[part], out=out[part])
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, bias, out = ctx.saved_tensors
        grad = grad_outputs[0]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(q, k):
            p = _probabilities(q[part], k[part], _of(bias, part), ctx.scale)  # [b, N, T, S]
            torch.matmul(p.mT, grad[part], out=dv[part])
            inner = (grad[part].float() * out[part]).sum(-1, keepdim=True)  # [b, N, T, 1]
            ds = (grad[part] @ v[part].mT).sub_(inner).mul_(p).mul_(ctx.scale)
            torch.matmul(ds, k[part], out=dq[part])
            torch.matmul(ds.mT, q[part], out=dk[part])
        return dq, dk, dv, None, None


def _parts(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the batch, each with at most `_CHUNK_BYTES` of probabilities or a single sample."""
    per_sample = q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
    size = max(1, _CHUNK_BYTES // max(1, per_sample))
    return (slice(start, start + size) for start in range(0, len(q), size))


def _of(bias: Tensor | None, part: slice) -> Tensor | None:
    return bias if bias is None or len(bias) == 1 else bias[part]


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale + bias): [b, N, T, S]."""
    scores = (q @ k.mT).mul_(scale)
    if bias is not None:
        scores.add_(bias)
    return scores.softmax(-1)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function for transformers: query [B, N, T, W], key and value [B, N, S, W] -> [B, T, N, W].

    attention_mask: bool (True: attend) or additive, [B or 1, 1 or N, T or 1, S]. Grouped-query keys and values have fewer heads.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    ours = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout
    if not ours or key.shape[1] != query.shape[1] or not torch.is_grad_enabled() or getattr(module, "is_causal", False):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    bias = attention_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=query.dtype).masked_fill_(~bias, torch.finfo(query.dtype).min)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _Attention.apply(query, key, value, bias, scale)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Register `attention_forward` with transformers; returns the name to pass as `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
