"""What transformers 4 reads of an export: the same numbers under its own names, and nothing else for transformers 5."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from prunadapt_ds import older_readers
from prunadapt_ds.models.families import FAMILIES
from tests.tiny import tiny_config, tiny_tokenizer

pytestmark = pytest.mark.fast
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
}
BASES = {"full_attention": {"rope_theta": 7e5}, "sliding_attention": {"rope_theta": 3e4}}
# family, its rope_parameters, and what version 4 must find (its configuration classes are the source)
CASES = {
    "qwen2": ({"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": None}),
    "llama": (LLAMA3, {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    "phi3": ({"rope_theta": 2e4, "partial_rotary_factor": 0.5}, {"rope_theta": 2e4, "partial_rotary_factor": 0.5}),
    "gpt_neox": ({"rope_theta": 2e4, "partial_rotary_factor": 0.5}, {"rotary_emb_base": 2e4, "rotary_pct": 0.5}),
    "modernbert": (BASES, {"global_rope_theta": 7e5, "local_rope_theta": 3e4, "global_attn_every_n_layers": 3}),
    "gemma3_text": (
        {**BASES, "full_attention": {**LINEAR, "rope_theta": 7e5}},
        {"rope_theta": 7e5, "rope_local_base_freq": 3e4, "rope_scaling": LINEAR},
    ),
}


def saved(config, folder):
    config.save_pretrained(folder)
    older_readers.add_old_names(folder)
    return json.loads((folder / "config.json").read_text())


def test_long_inputs_of_phi3(tmp_path):
    """Version 4 refuses any field but these."""
    config = tiny_config("phi3", rope_parameters=LONG, original_max_position_embeddings=64)
    scaling = saved(config, tmp_path)["rope_scaling"]
    assert scaling == {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    found = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {name: found[name] for name in LONG} == LONG


@pytest.mark.parametrize(
    ("model_type", "more"),
    [("llama", {"factor": 4.0}), ("llama", {"attention_factor": 1.5}), ("phi3", {"attention_factor": 1.5})],
)
def test_long_inputs_keep_their_factors(tmp_path, model_type, more):
    own = {"original_max_position_embeddings": 64} if model_type == "phi3" else {}
    saved(tiny_config(model_type, rope_parameters=LONG | more, **own), tmp_path)
    found = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {name: found.get(name) for name in LONG | more} == LONG | more


@pytest.mark.parametrize("model_type", CASES)
def test_positions_turn_as_fast_for_an_older_version(tmp_path, model_type):
    rope, expected = CASES[model_type]
    layers = {"num_hidden_layers": 6} if model_type == "modernbert" else {}
    config = tiny_config(model_type, rope_parameters=rope, dtype="bfloat16", **layers)
    values = saved(config, tmp_path)
    assert {name: values[name] for name in expected} == expected and values["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_old_names_say_nothing_new(tmp_path, model_type):
    """Version 5 reads the same configuration with them and without."""
    config = tiny_config(model_type, dtype="bfloat16")
    (tmp_path / "with").mkdir()
    values = saved(config, tmp_path / "with")
    config.save_pretrained(tmp_path / "without")
    read = [AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("with", "without")]
    added = {*older_readers.old_names(values), "_name_or_path"}
    assert {k: v for k, v in read[0].items() if k not in added} == {k: v for k, v in read[1].items() if k not in added}
    older_readers.add_old_names(tmp_path / "with")
    assert json.loads((tmp_path / "with" / "config.json").read_text()) == values, "again changes nothing"


def test_a_tokenizer_of_a_class_that_both_have(tmp_path):
    tiny_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    for name, known in (("TokenizersBackend", "PreTrainedTokenizerFast"), ("BertTokenizer", "BertTokenizer")):
        older_readers.write_tokenizer_config(tmp_path, json.loads(file.read_text()) | {"tokenizer_class": name})
        assert json.loads(file.read_text())["tokenizer_class"] == known
    more = {"extra_special_tokens": ["sun", "rain"]}  # version 4 takes a mapping for it
    older_readers.write_tokenizer_config(tmp_path, json.loads(file.read_text()) | more)
    values = json.loads(file.read_text())
    assert values["additional_special_tokens"] == ["sun", "rain"] and "extra_special_tokens" not in values
    assert set(AutoTokenizer.from_pretrained(tmp_path).all_special_tokens) >= {"sun", "rain"}
