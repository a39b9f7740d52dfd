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


def test_a_real_model_computes_the_same_gradients():
    from prunadapt_ds.attention import register
    from tests.tiny import tiny_model

    losses = []
    for implementation in ("sdpa", register()):
        model = tiny_model("bert", attn_implementation=implementation).bfloat16()
        input_ids = torch.arange(5, 45).view(4, 10)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[2, 7:] = 0
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=torch.tensor([0, 1, 0, 1])).loss
        loss.backward()
        losses.append((loss.detach(), model.bert.encoder.layer[0].attention.self.key.weight.grad))
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-2, atol=2e-3)
