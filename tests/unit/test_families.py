"""What families say beyond where their weights lie: padding, what must stay, what cannot be cut."""

import pytest
import torch
from datasets import Dataset

from prunadapt_ds import backbone
from prunadapt_ds.batches import Rows
from prunadapt_ds.budget import decide, max_sparsity
from prunadapt_ds.config import parse
from prunadapt_ds.data.loading import tokenize
from prunadapt_ds.errors import UserError
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.models.layouts import family_of, representable_heads, uniform_floors, with_floors
from prunadapt_ds.models.table import updated
from tests.conftest import ROOT
from tests.tiny import layout_and_structure, tiny_config, tiny_folder, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.fast
DECODERS = [name for name, family in FAMILIES.items() if family.is_decoder]
TEXTS = ["the sun is warm", "rain", "we hate the cold dark storm and the loss of joy near the road", ""]


@pytest.fixture
def no_pad_token(tmp_path):
    """A decoder's folder whose configuration and tokenizer name no padding token."""

    def make(model_type):
        return tiny_folder(tmp_path / model_type, model_type, pad_token_id=None)

    return make


@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_logits_of_a_decoder_do_not_depend_on_the_padding(no_pad_token, model_type):
    torch.manual_seed(0)
    loaded = backbone.load(str(no_pad_token(model_type)), num_labels=3)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    assert model.config.pad_token_id == tokenizer.pad_token_id
    if model_type != "qwen2":  # its tokenizer class brings one of its own
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = Dataset.from_dict({"sentence1": TEXTS, "label": [0] * 4})
    rows = Rows(tokenize(data, tokenizer, 32), tokenizer)
    together = model(**rows.inputs(range(4))).logits
    for i in range(4):
        alone = {k: torch.tensor([numbers]) for k, numbers in rows.row(i).items()}
        torch.testing.assert_close(model(**alone).logits[0], together[i], rtol=1e-4, atol=1e-5)
    assert len({tuple(row.tolist()) for row in together}) > 2


def test_an_encoder_whose_tokenizer_has_no_padding_token(no_pad_token, tmp_path):
    folder = no_pad_token("bert")
    (tmp_path / "of_decoder").mkdir()
    tokenizer = tiny_tokenizer(tmp_path / "of_decoder", of_decoder=True)
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(folder)
    loaded = backbone.load(str(folder), num_labels=2)
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id is not None


def test_a_decoder_learns_the_padding_token_of_its_tokenizer(tmp_path):
    """Another one in the configuration would have it read padded positions."""
    folder = tiny_folder(tmp_path, "llama", pad_token_id=7)
    tokenizer = backbone.load(str(folder), num_labels=2).tokenizer
    assert tokenizer.pad_token_id == 7, "the configuration's, where the tokenizer has none"
    tokenizer.pad_token = "[UNK]"
    tokenizer.save_pretrained(folder)
    loaded = backbone.load(str(folder), num_labels=2)
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id == 1


def test_no_padding_token_to_be_had(no_pad_token):
    loaded = backbone.load(str(no_pad_token("gpt2")), num_labels=2)
    config = tiny_config("gpt2", pad_token_id=None)
    for name in ("pad_token", "eos_token", "unk_token", "bos_token"):
        setattr(loaded.tokenizer, name, None)
    with pytest.raises(UserError, match="padding token"):
        backbone.agree_on_padding("x", config, loaded.tokenizer)


def test_the_readme_s_table_is_that_of_the_records():
    text = (ROOT / "README.md").read_text()
    assert updated(text) == text, "run python -m prunadapt_ds.models.table README.md"
    assert all(f"`{name}`" in text for name in FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_must_stay_stays_at_the_highest_sparsity(model_type):
    """A decoder's cache reads its length from the first layer of each kind of attention."""
    model = tiny_model(model_type)
    _, structure = layout_and_structure(model, 16)
    most = max_sparsity(structure, "params")
    plan = decide(torch.ones(structure.num_units), structure, most)
    assert plan.sparsity("params") == pytest.approx(most)
    floors = {"mistral": [1, 0, 0], "qwen2": [1, 1, 0], "gemma3_text": [1, 1, 1], "albert": [1, 1]}
    wanted = floors.get(model_type, [int(FAMILIES[model_type].is_decoder), 0, 0])
    assert [c["heads"] for c in plan.counts()] == wanted
    with pytest.raises(UserError, match="more than can be cut from this model"):
        decide(torch.ones(structure.num_units), structure, (1 + most) / 2)


@pytest.mark.parametrize(
    "model_type, counts",
    [
        pytest.param("llama-mha", (1, 2, 4), id="llama-mha"),
        pytest.param("llama", (1, 2), id="llama"),
        pytest.param("llama-mqa", (1, 2, 4), id="llama-mqa"),
        pytest.param("qwen2", (1, 2), id="qwen2"),
        pytest.param("bert", (4,), id="bert"),
        pytest.param("opt", (4,), id="opt"),
    ],
)
def test_numbers_of_heads_that_a_stock_configuration_takes(model_type, counts):
    """Llama's must divide the model's width, which 3 heads of 32 do not."""
    model = tiny_model(model_type)
    family, every = family_of(model.config), tuple(range(counts[0], counts[-1] + 1))
    assert representable_heads(family, model.config) == counts
    _, structure = layout_and_structure(model, 16)
    heads, neurons = uniform_floors(family, structure, model.config, 8).sublayers[:2]
    assert heads.floor == counts[0] and heads.counts == (counts if counts != every else ()) and neurons.counts == ()


def test_multiples_of_heads_that_servers_split():
    model = tiny_model("llama-mha")
    _, structure = layout_and_structure(model, 16)
    family = family_of(model.config)
    heads = uniform_floors(family, structure, model.config, 8, head_multiple=2).sublayers[0]
    assert heads.floor == 2 and heads.counts == (2, 4)
    with pytest.raises(UserError, match="head_multiple=3: must divide the 4 heads"):
        uniform_floors(family, structure, model.config, 8, head_multiple=3)


def test_a_norm_behind_a_sub_layer_never_divides_by_nothing():
    model = tiny_model("gemma3_text")
    family, (_, structure) = family_of(model.config), layout_and_structure(model, 16)
    floored = with_floors(family, structure, model.config, parse([]).prune)
    assert [s.floor for s in floored.sublayers] == [1, 8] * 3
    plan = decide(torch.ones(structure.num_units), floored, max_sparsity(floored, "params"))
    assert [(c["heads"], c["neurons"]) for c in plan.counts()] == [(1, 8)] * 3


def test_multi_query_attention_keeps_its_key_and_value():
    model = tiny_model("llama-mqa")
    layout, structure = layout_and_structure(model, 16)
    heads = layout.sublayers[0]
    assert heads.num_units == 4 and heads.width == 8 and heads.floors == (1, 1, 1)
    assert [p.tail for p in heads.inputs] == [0, 8, 8]
    grouped = layout_and_structure(tiny_model("llama"), 16)[0].sublayers[0]
    assert grouped.num_units == 2 and grouped.width == 16 and [p.tail for p in grouped.inputs] == [0, 0, 0]
    assert structure.fixed_macs == 3 * 16 * 2 * 8 * 32


def test_albert_s_blocks_run_several_times():
    layout, structure = layout_and_structure(tiny_model("albert"), 16)
    assert (layout.num_layers, layout.passes) == (2, 4)
    assert structure.sublayers[1].macs_per_unit == 4 * 16 * 2 * 32
    with pytest.raises(UserError, match="share weights in several groups"):
        family_of(tiny_config("albert", num_hidden_groups=2))


def test_deberta_pays_for_its_positions():
    shared, own = (layout_and_structure(tiny_model(n), 16) for n in ("deberta-v2", "deberta-v2-own-positions"))
    assert shared[0].sublayers[0].relative_positions == own[0].sublayers[0].relative_positions == 2 * 2 * 4
    assert own[1].sublayers[0].params_per_unit == shared[1].sublayers[0].params_per_unit + 2 * 8 * 33
    assert own[1].sublayers[0].macs_per_unit == shared[1].sublayers[0].macs_per_unit
