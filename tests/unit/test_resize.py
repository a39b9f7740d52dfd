"""Cutting: every family's layout, the cost model against really cut models, and masked == resized."""

from dataclasses import replace

import pytest
import torch

from prunadapt_ds import adapters, export, gates
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.models.modeling_prunadapt import Layout, narrow
from prunadapt_ds.resize import resize
from tests.tiny import VARIANTS, layout_and_structure, tiny_language_model, tiny_model

pytestmark = pytest.mark.fast
TOKENS = 10
MODELS = [*FAMILIES, *VARIANTS]
CUTS = [(model, how) for model in MODELS for how in ("unequal", "no-heads", "no-neurons", "nothing")]
CUTS += [(name, "skipped") for name, family in FAMILIES.items() if family.drops_layers]


def adapted(model_type, seed=0, skips=False, of_language=False):
    """A tiny model with LoRA and gates, everything random, biases too. `skips`: layers without units are skipped."""
    build = tiny_language_model if of_language else tiny_model
    model = build(model_type, num_labels=3, seed=seed)
    layout, structure = layout_and_structure(model, TOKENS)
    layout, structure = replace(layout, skips=skips), replace(structure, skips=skips)
    torch.manual_seed(seed)
    adapters.add_lora(model, layout, adapters.target_modules(layout), r=2, lora_alpha=4)
    gates.attach(model, layout, structure)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "delta" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0, 0.1)
        elif "base_layer" in name:  # attention as it is initialised is too even to tell heads of another width
            torch.nn.init.normal_(parameter, 0, 0.5)
    return model, layout, structure


def plan_of(structure, how):
    """Unequal counts in every layer, or whole sub-layers gone, or everything that may go."""
    keep = torch.ones(structure.num_units, dtype=torch.bool)
    generator = torch.Generator().manual_seed(7)
    for i, sub in enumerate(structure.sublayers):
        if how == "unequal" or (how == "skipped" and sub.layer != 1):
            keep[sub.span] = torch.rand(sub.num_units, generator=generator) > 0.15 + 0.12 * i
            keep[sub.start + i % sub.num_units] = True
        elif (
            (how == "no-heads" and sub.kind == "heads" and sub.layer == 1)
            or (how == "no-neurons" and sub.kind == "neurons" and sub.layer != 1)
            or how == "nothing"
            or how == "skipped"
        ):
            keep[sub.span] = False
        keep[sub.start + 1 : sub.start + 1 + sub.floor] = True
    return PruningPlan.from_mask(structure, keep)


def inputs():
    input_ids = torch.randint(5, 150, (4, TOKENS), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.mark.parametrize(("model_type", "how"), CUTS)
@torch.no_grad()
def test_masked_equals_resized(model_type, how):
    model, layout, structure = adapted(model_type, skips=how == "skipped")
    plan = plan_of(structure, how)
    dense = model(**inputs()).logits
    gates.apply_mask(model, plan.mask())
    masked = model(**inputs()).logits
    resize(model, layout, plan)
    resized = model(**inputs()).logits
    torch.testing.assert_close(resized, masked, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dense, masked, atol=1e-4), "the cut must matter, or this test proves nothing"


@pytest.mark.parametrize(("model_type", "how"), CUTS)
def test_cost_model_counts_what_is_really_left(model_type, how):
    model, layout, structure = adapted(model_type, skips=how == "skipped")
    plan = plan_of(structure, how)
    resize(model, layout, plan)
    blocks = model.get_submodule(layout.layers)
    left = sum(p.numel() for n, p in blocks.named_parameters() if "lora_" not in n and "prune_gate" not in n)
    assert left == plan.cost("params")
    assert PruningPlan.dense(structure).cost("params") == structure.dense_cost("params")


@pytest.mark.parametrize("model_type", MODELS)
def test_macs_are_linear_maps_and_attention(model_type):
    """Counted on a really cut model: weights of every projection times tokens, plus attention."""
    model, layout, structure = adapted(model_type)
    plan = plan_of(structure, "unequal")
    resize(model, layout, plan)
    gates.detach(model)
    heads = layout.sublayers[0]
    macs = 0
    for layer, counts in zip(model.get_submodule(layout.layers), plan.counts(), strict=True):
        macs += TOKENS * (2 * TOKENS + heads.relative_positions) * heads.width * counts["heads"]
        for sub in layout.sublayers:
            for projection in (*sub.inputs, sub.output):
                if projection.per_token:
                    macs += TOKENS * layer.get_submodule(projection.path).base_layer.weight.numel()
    assert macs * layout.passes == plan.cost("macs")


@pytest.mark.parametrize(("model_type", "how"), CUTS)
@torch.no_grad()
def test_folded_and_narrowed_equals_masked(model_type, how, monkeypatch):
    """The export's tensors, a few rows at a time, fit the model that the export's own file builds, and compute the same, layer
    by layer."""
    monkeypatch.setattr(export, "ROWS_NUMEL", 200)
    model, layout, structure = adapted(model_type, skips=how == "skipped")
    plan = plan_of(structure, how)
    gates.apply_mask(model, plan.mask())
    masked = model(**inputs(), output_hidden_states=True)
    stock = tiny_model(model_type, num_labels=3, seed=99)
    kept = [[c["heads"], c["neurons"]] for c in plan.counts()]
    narrow(stock, Layout.from_dict(layout.to_dict()), kept)
    tensors = exported(model, layout, plan)
    stock.load_state_dict(tensors, strict=True)
    found = stock(**inputs(), output_hidden_states=True)
    torch.testing.assert_close(found.logits, masked.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.hidden_states, masked.hidden_states, rtol=1e-3, atol=1e-3)


def exported(model, layout, plan, present=None):
    tensors = {}
    for name, tensor in export.pruned_tensors(model, layout, plan, present):
        tensor.write(tensors.setdefault(name, torch.empty(tensor.shape)))
    return tensors


@pytest.mark.parametrize(("model_type", "how"), [cut for cut in CUTS if "no-neurons" in cut or "bert" in cut])
@torch.no_grad()
def test_what_was_cut_already_is_exported_alike(model_type, how):
    """From the dense model and from one that was cut to the plan."""
    model, layout, structure = adapted(model_type, skips=how == "skipped")
    plan = plan_of(structure, how)
    whole = exported(model, layout, plan)
    resize(model, layout, plan)
    torch.testing.assert_close(exported(model, layout, plan, plan), whole, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_what_is_gone_stays_gone_when_more_is_cut():
    model, layout, structure = adapted("bert", skips=True)
    first = plan_of(structure, "no-heads")
    both = PruningPlan.from_mask(structure, first.mask() & plan_of(structure, "skipped").mask())
    gates.apply_mask(model, both.mask())
    masked = model(**inputs()).logits
    for plan, present in ((first, None), (both, first), (both, both)):
        resize(model, layout, plan, present)
    torch.testing.assert_close(model(**inputs()).logits, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.drops_layers])
def test_a_skipped_layer_has_gradients_of_zero(model_type):
    """It stays in the graph: ZeRO-3 would step with what an earlier step has left."""
    model, layout, structure = adapted(model_type, skips=True)
    gates.apply_mask(model, plan_of(structure, "skipped").mask())
    model(**inputs()).logits.sum().backward()
    layers = model.get_submodule(layout.layers)
    for name, parameter in layers[1].named_parameters():
        assert parameter.grad is None if not parameter.requires_grad else not parameter.grad.any(), name
    assert all(p.grad.any() for n, p in layers[2].named_parameters() if "lora_A" in n)
    gates.apply_mask(model, PruningPlan.dense(structure).mask())
    model(**inputs()).logits.sum().backward()
    assert all(p.grad.any() for n, p in layers[1].named_parameters() if "lora_A" in n), "it can come back"


def test_what_is_left_of_a_removed_attention_does_not_train():
    """Norms of queries and keys keep their values for other formats, and no gradient is waited for."""
    model, layout, structure = adapted("qwen3")
    plan = plan_of(structure, "no-heads")
    resize(model, layout, plan)
    model(**inputs()).logits.sum().backward()
    adapters.train_norms(model)  # as after TMP's cut, which comes first
    left = dict(model.get_submodule(layout.layers)[1].self_attn.named_parameters())
    assert {"q_norm.weight", "k_norm.weight"} == {n for n, p in left.items() if not p.requires_grad}
    unused = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert unused == {f"{layout.layers}.1.input_layernorm.weight"}, "the norm before it has nothing to do either"


@pytest.mark.parametrize("model_type", MODELS)
def test_resized_model_trains(model_type):
    model, layout, structure = adapted(model_type)
    resize(model, layout, plan_of(structure, "unequal"))
    model(**inputs()).logits.sum().backward()
    for gate in gates.gates_of(model):
        assert gate.delta.grad.shape == (gate.num_units,)
    assert [g.start for g in gates.gates_of(model)] == sorted(g.start for g in gates.gates_of(model))
