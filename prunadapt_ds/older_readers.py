"""What transformers 4, and servers built on it, read of an export: the names in its JSON files, and those of tensors.

transformers 5 renamed or regrouped a few fields. Version 4 does not know the new names and silently falls back to its
defaults: it would run a Llama 3 with `rope_theta` 10000 instead of 500000. Version 5 accepts the old names beside the new.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunadapt_ds.files import replace

# Names of the bases of full and of sliding attention, where they differ.
_BASES = {
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
}
_HEADS = {"gpt_neox": "embed_out"}  # of language models, where transformers 5 renamed it to lm_head
CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """`config.json` with the names of both versions."""
    _write(folder / CONFIG, config | old_names(config))


def write_tokenizer_config(folder: Path, values: dict[str, Any]) -> None:
    """`tokenizer_config.json` with a class, and a name of further special tokens, that both versions know."""
    values = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    _write(folder / TOKENIZER_CONFIG, values)


def tensor_name(model_type: str, name: str) -> str:
    """The name of a stock model's tensor in a file that both versions read: the hub's."""
    module, _, parameter = name.rpartition(".")
    return f"{_HEADS[model_type]}.{parameter}" if module == "lm_head" and model_type in _HEADS else name


def add_old_names(folder: Path) -> None:
    """Rewrite the two files of a folder that `save_pretrained` has just filled."""
    write_config(folder, json.loads((folder / CONFIG).read_text()))
    if (folder / TOKENIZER_CONFIG).is_file():
        write_tokenizer_config(folder, json.loads((folder / TOKENIZER_CONFIG).read_text()))


def old_names(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a version 5 configuration under the names that version 4 reads."""
    names: dict[str, Any] = {}
    if "dtype" in config:
        names["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        names |= _rope(rope, config.get("model_type"))
        if config.get("model_type") == "gpt_neox":
            names |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 0.25)}
    elif config.get("model_type") in _BASES:  # a base for each kind of attention
        bases = [rope[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")]
        names |= dict(zip(_BASES[config["model_type"]], bases, strict=True))
        if config["model_type"] == "gemma3_text":  # full attention alone is scaled; ModernBERT has no scaling to state
            names["rope_scaling"] = _rope(rope["full_attention"], "gemma3_text")["rope_scaling"]
        full = [i for i, kind in enumerate(config.get("layer_types") or ()) if kind == "full_attention"]
        if len(full) > 1:
            names["global_attn_every_n_layers"] = full[1] - full[0]
    return names


def _rope(rope: dict[str, Any], model_type: str | None) -> dict[str, Any]:
    """`rope_scaling` holds everything but the base and the rotated share; version 5 takes it for the whole, so it is whole."""
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    own = {"factor", "attention_factor"} & rope.keys()  # version 5 would not find them anywhere else
    if rope.get("rope_type") == "longrope" and model_type == "phi3" and not own:
        # Version 4 takes these three alone, version 5 completes them.
        scaling = {"type": "longrope", **{name: rope[name] for name in ("short_factor", "long_factor")}}
    names: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    names["rope_scaling"] = scaling if rope.get("rope_type", "default") != "default" else None
    if "partial_rotary_factor" in rope:
        names["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return names


def _write(file: Path, values: dict[str, Any]) -> None:
    replace(file, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
