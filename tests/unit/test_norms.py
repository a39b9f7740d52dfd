"""Norms that keep their output: the same numbers and gradients, and less that is kept."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from prunadapt_ds import adapters, norms
from prunadapt_ds.memory import SavedActivations
from prunadapt_ds.models.families import FAMILIES
from tests.tiny import layout_and_structure, tiny_model

pytestmark = pytest.mark.fast
WIDTH = 48


class StrangeRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) + x


KINDS = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "without a shift": lambda: nn.LayerNorm(WIDTH, bias=False),
    "Llama": lambda: LlamaRMSNorm(WIDTH),
    "Gemma": lambda: GemmaRMSNorm(WIDTH),
    "strange": lambda: StrangeRMSNorm(WIDTH),
    "without an epsilon": lambda: nn.RMSNorm(WIDTH),
}


def norm_of(kind, dtype=torch.float32, *, hard=True, trains=False):
    torch.manual_seed(1)
    norm = KINDS[kind]()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(WIDTH) * 0.3 + (kind != "Gemma"))
        if hard:
            norm.weight[[3, 40]] = -1.0 if kind == "Gemma" else 0.0
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(torch.randn(WIDTH) * 0.5)
    return norm.to(dtype).requires_grad_(trains)


def gradients(norm, x, dy):
    """The output, and the gradients of the input and of what trains."""
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters() if p.requires_grad)]


@pytest.mark.parametrize("shape", [(3, 5, WIDTH), (7, WIDTH), (2, 3, 4, WIDTH)])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("hard", [False, True], ids=["all told", "scales of zero"])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_gradients_are_those_of_the_plain_norm(kind, hard, trains, shape, monkeypatch):
    monkeypatch.setitem(norms.FP32_COPY_ELEMENTS, "cpu", 300)  # more than one run
    norm, x, dy = norm_of(kind, hard=hard, trains=trains), torch.randn(shape) * 3 + 1, torch.randn(shape)
    expected = gradients(copy.deepcopy(norm), x, dy)
    norms.keep_outputs(norm)
    for _ in range(2):
        y, *found = gradients(copy.deepcopy(norm), x, dy)
        assert torch.equal(y, expected[0])
        assert len(found) == 1 + trains * len(list(norm.parameters()))
        for one, other in zip(found, expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_gradients_differ_by_its_rounding(kind):
    x, dy = (torch.randn(64, 7, WIDTH) * 3 + 1).bfloat16(), torch.randn(64, 7, WIDTH).bfloat16()
    exact = gradients(norm_of(kind), x.float(), dy.float())[1]
    norm = norm_of(kind, torch.bfloat16)
    plain = gradients(norm, x, dy)[1].float() - exact
    norms.keep_outputs(norm)
    error = gradients(norm, x, dy)[1].float() - exact
    assert error.norm() < 1.5 * plain.norm() and abs(error.mean()) < 1e-3


def test_a_scale_that_crosses_zero_does_no_harm():
    """More of them than are kept: what the output does not tell is taken for nothing, not for anything, and is alone in that."""
    norm = norm_of("LayerNorm", hard=False)
    with torch.no_grad():
        norm.weight[:20] = torch.linspace(-1e-8, 1e-8, 20)
    x, dy = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    expected = gradients(norm, x, dy)[1]
    norms.keep_outputs(norm)
    found = gradients(norm, x, dy)[1]
    torch.testing.assert_close(found[:, 20:], expected[:, 20:], rtol=1e-3, atol=1e-4)
    assert found.abs().max() <= 1.5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_output_is_kept(kind):
    norm = norm_of(kind)
    norms.keep_outputs(norm)
    saved = SavedActivations()
    x = torch.randn(20, 10, WIDTH, requires_grad=True)
    with saved.watch():
        norm(x)
    one, row = x.numel() * 4, x[..., 0].numel() * 4
    alone = kind in ("strange", "without an epsilon")
    assert saved.bytes <= one + 6 * row or alone, "a number for each row, and four entries"


def test_a_first_input_of_zeros_says_nothing_of_the_scale():
    norm, x, dy = norm_of("Gemma"), torch.randn(3, 5, WIDTH), torch.randn(3, 5, WIDTH)
    expected = gradients(norm, x, dy)[1]
    norms.keep_outputs(norm)
    gradients(norm, torch.zeros(3, 5, WIDTH), dy)
    torch.testing.assert_close(gradients(norm, x, dy)[1], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_the_epsilon_outweighs(kind):
    norm, x, dy = norm_of(kind), torch.randn(3, 5, WIDTH) * 3e-4, torch.randn(3, 5, WIDTH)
    expected = gradients(copy.deepcopy(norm), x, dy)[1]
    norms.keep_outputs(norm)
    found = gradients(norm, x, dy)[1]
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_norms_are_known_by_their_names_still():
    model = nn.Sequential(*(norm_of(kind) for kind in KINDS))
    names = [type(m).__name__ for m in model]
    norms.keep_outputs(model)
    changed = [type(m) for m in model]
    assert [kind.__name__ for kind in changed] == names and all(
        issubclass(kind, norms._KeepsOutput) for kind in changed
    )
    norms.keep_outputs(model)
    assert [type(m) for m in model] == changed, "once is enough"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_trains_the_same_with_less(model_type):
    """Gradients of every LoRA matrix and of every norm."""
    torch.manual_seed(0)
    model = tiny_model(model_type).eval()
    layout, _ = layout_and_structure(model, 12)
    model.requires_grad_(False)
    adapters.add_lora(model, layout, adapters.target_modules(layout), r=2, lora_alpha=4)
    adapters.train_norms(model)
    inputs = torch.randint(5, 60, (3, 12))

    def step():
        model.zero_grad()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.01)
        saved = SavedActivations()
        with saved.watch():
            loss = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits.square().sum()
        loss.backward()
        return saved.bytes, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    bytes_before, before = step()
    norms.keep_outputs(model)
    bytes_after, after = step()
    assert before.keys() == after.keys() and len(before) >= 3 * layout.num_layers
    for name, expected in before.items():
        torch.testing.assert_close(after[name], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-7)
    assert bytes_after < bytes_before
