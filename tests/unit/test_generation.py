"""Generation: a cut decoder with its cache says what the masked one says without, token by token."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunadapt_ds import export, gates, trained_folder
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.resize import resize
from tests.tiny import layout_and_structure, tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.fast
DECODERS = [name for name, family in FAMILIES.items() if family.is_decoder]
PROMPTS, NEW_TOKENS = torch.tensor([[6, 9, 12, 7], [20, 7, 31, 8]]), 9


@pytest.mark.parametrize("model_type", [*DECODERS, "llama-mqa", "gpt_neox-sequential", "opt-post-norm"])
@torch.no_grad()
def test_the_cache_of_a_cut_decoder(model_type):
    """Whole attentions are gone wherever they may go: the cache must still know its length."""
    torch.manual_seed(1)
    changes = {"init_std": 0.3} if model_type.startswith("opt") else {}
    config = tiny_config(model_type, initializer_range=0.3, tie_word_embeddings=False, **changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    layout, structure = layout_and_structure(model, 16)
    gates.attach(model, layout, structure)
    keep = torch.rand(structure.num_units, generator=torch.Generator().manual_seed(4)) > 0.3
    for sub in structure.sublayers:
        if sub.kind == "heads":
            keep[sub.span] = False
            keep[sub.start : sub.start + sub.floor] = True
    plan = PruningPlan.from_mask(structure, keep)
    gates.apply_mask(model, keep)
    said = PROMPTS
    for _ in range(NEW_TOKENS):
        said = torch.cat([said, model(input_ids=said, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    resize(model, layout, plan)
    gates.detach(model)
    found = model.generate(
        PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    assert found.tolist() == said.tolist()
    assert len(set(said[0, 4:].tolist())) > 1, "one token over and over tells little"


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@torch.no_grad()
def test_another_attention_can_be_set_on_an_export(tmp_path, model_type):
    """Phi-3's attention reads its number of heads from the configuration."""
    model = tiny_model(model_type)
    layout, structure = layout_and_structure(model, 16)
    keep = torch.arange(structure.num_units) % 2 == 0
    keep[structure.sublayers[-2].span] = False  # the last layer's attention is gone
    plan = PruningPlan.from_mask(structure, keep)
    export.export(model, layout, plan, tiny_tokenizer(tmp_path / "tokenizer", of_decoder=True), tmp_path / "out")
    loaded, _ = trained_folder.load_folder(str(tmp_path / "out"), trust=False)
    expected = loaded(PROMPTS).logits
    loaded.set_attn_implementation("eager")
    found = loaded(PROMPTS, output_attentions=True)
    torch.testing.assert_close(found.logits, expected)
    first = loaded.get_submodule(layout.layers)[0].self_attn.config
    assert loaded.config._attn_implementation == first._attn_implementation == "eager"
    assert all(weights is not None for weights in found.attentions[:-1])


@pytest.mark.parametrize(
    "model_type, gone", [("llama", "half"), ("gpt2", "half"), ("llama", "all"), ("llama-mqa", "half")]
)
@torch.no_grad()
def test_continuous_batching_is_refused_where_it_would_answer_nothing(tmp_path, model_type, gone):
    """Of layers with fewer key/value heads than others; not of layers without any, nor of query heads."""
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    layout, structure = layout_and_structure(model, 16)
    keep = torch.ones(structure.num_units, dtype=torch.bool)
    last = structure.sublayers[-2]
    keep[last.span] = torch.arange(last.num_units) % 2 == 0 if gone == "half" else False
    plan = PruningPlan.from_mask(structure, keep)
    export.export(model, layout, plan, tiny_tokenizer(tmp_path / "tokenizer", of_decoder=True), tmp_path / "out")
    loaded, _ = trained_folder.load_folder(str(tmp_path / "out"), trust=False, is_language=True)
    if gone == "half" and model_type != "llama-mqa":
        with pytest.raises(NotImplementedError, match="uniform"):
            loaded.generate_batch(PROMPTS.tolist())
    else:
        assert loaded.init_continuous_batching() is not None


@torch.no_grad()
def test_a_static_cache_is_filled_in_pieces(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    layout, structure = layout_and_structure(model, 16)
    plan = PruningPlan.from_mask(structure, torch.arange(structure.num_units) % 2 == 0)
    export.export(model, layout, plan, tiny_tokenizer(tmp_path / "tokenizer", of_decoder=True), tmp_path / "out")
    loaded, _ = trained_folder.load_folder(str(tmp_path / "out"), trust=False, is_language=True)
    options = {
        "attention_mask": torch.ones_like(PROMPTS),
        "max_new_tokens": 3,
        "do_sample": False,
        "eos_token_id": None,
    }
    expected = loaded.generate(PROMPTS, **options)
    assert loaded.generate(PROMPTS, **options, cache_implementation="static", prefill_chunk_size=2).equal(expected)
