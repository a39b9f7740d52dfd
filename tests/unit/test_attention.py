"""Our attention against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from prunadapt_ds.attention import _Attention, attention_forward

pytestmark = pytest.mark.fast


def tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 9, 8)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    mask = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    mask[1, :, :, 5:] = False
    return [t.requires_grad_() for t in (q, k, v)], mask, grad


@pytest.mark.parametrize("masked", [True, False])
def test_equal_to_torch_in_fp32(masked):
    inputs, mask, grad = tensors(torch.float64)
    mask = mask if masked else None
    wanted = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    bias = None if mask is None else torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(~mask, -1e30)
    found = _Attention.apply(*inputs, bias, 8**-0.5)
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_bf16_is_as_near_to_fp32_as_torch_s_own():
    inputs, mask, grad = tensors(torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    reference = torch.autograd.grad(F.scaled_dot_product_attention(*exact, attn_mask=mask), exact, grad.double())
    found, _ = attention_forward(torch.nn.Module(), *inputs, mask)
    mine = torch.autograd.grad(found.transpose(1, 2), inputs, grad)
    for m, r in zip(mine, reference, strict=True):
        assert (m - r).abs().max() < 0.02 * r.abs().max()


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "albert", "llama", "llama-mqa", "mistral", "gpt2", "opt"])
def test_a_real_model_computes_the_same_gradients(model_type):
    """Encoders, with and without windows, through ours; causal and grouped-query models through torch's own."""
    from prunadapt_ds.attention import register
    from prunadapt_ds.models.families import FAMILIES
    from tests.tiny import tiny_model

    losses = []
    for implementation in ("sdpa", register()):
        model = tiny_model(model_type, attn_implementation=implementation).bfloat16()
        family = FAMILIES[model.config.model_type]
        input_ids = torch.arange(5, 45).view(4, 10)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[2, 7:] = 0
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=torch.tensor([0, 1, 0, 1])).loss
        loss.backward()
        first = model.base_model.get_submodule(family.layers)[0].get_submodule(family.heads.inputs[0].path)
        losses.append((loss.detach(), first.weight.grad))
    exact = family.is_decoder
    torch.testing.assert_close(losses[0], losses[1], rtol=0 if exact else 5e-2, atol=0 if exact else 2e-3)
