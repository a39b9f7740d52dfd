"""Architecture families: where heads and neurons live and how their weights are laid out. One record per family.

This is the only place that knows a module path. To add a family, add a record to `FAMILIES`: the tests that run over
the table (slicing, cost model, parity, training) pick it up.

Widths are written by name and resolved from the model's configuration:

    q        the query rows of a unit: head_dim for plain attention, group * head_dim where `group` query heads share a key
    k, v     the key or value rows of a unit: head_dim
    qkv      one head's query, key and value rows interleaved: 3 * head_dim
    neuron   1
    heads    query heads per unit;  kv_heads  key/value heads per unit;  sharing  query heads per key that a unit adds

Under multi-query attention (one key/value head for all) a unit is one query head: k, v and kv_heads do not follow the
units, they stay as they are, and `sharing` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.modeling_prunadapt import AttributeLayout, Layout, ProjectionLayout, SubLayerLayout
from prunadapt_ds.models.structure import Structure, full_shape

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")


@dataclass(frozen=True)
class Projection:
    """A linear map below a layer; `parts` names the blocks in which its units lie one after another.

    `exists`: whether a configuration has it.  `per_token`: whether it runs on tokens, not on something a batch shares.
    """

    path: str
    parts: tuple[str, ...]
    transposed: bool = False
    exists: Callable[[Any], bool] = lambda config: True
    per_token: bool = True


@dataclass(frozen=True)
class SubLayer:
    """`inputs` produce the units, `output` consumes them; `attributes` are (module, attribute, width name).

    `config_fields`: (field, width name) of the stock configuration by which every layer can have fewer units. Empty where
    it cannot say so.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    core: str | None = None
    attributes: tuple[tuple[str, str, str], ...] = ()
    config_fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture.

    `layers`: path of the blocks below the base model.  `head`: modules below the classification model that are always
    trained, beside whatever loading reports as newly initialised.  `is_decoder`: causal; pooled at the last token, padded
    on the right, generates from a cache.  `shares_layers`: one block runs `num_hidden_layers` times; it keeps a head.
    `drops_layers`: all layers are alike and independent of their number, so that the stock configuration can say fewer.
    `relative_positions`: how many positions each query and key is compared with beside the tokens.
    """

    model_type: str
    layers: str
    heads: SubLayer
    neurons: SubLayer
    head: tuple[str, ...]
    is_decoder: bool = False
    shares_layers: bool = False
    drops_layers: bool = False
    relative_positions: Callable[[Any], int] = lambda config: 0


def _feed_forward(inputs: Projection | tuple[Projection, ...], output: Projection, field: str) -> SubLayer:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return SubLayer(inputs, output, config_fields=((field, "neuron"),))


def _separate(path: str, names: dict[str, str]) -> tuple[Projection, ...]:
    """Query, key and value each a map of its own: `path` with the name of the part."""
    return tuple(Projection(path.format(name), (part,)) for part, name in names.items())


_BERT_NAMES = {"q": "query", "k": "key", "v": "value"}


def _bert_like(model_type: str, head: tuple[str, ...]) -> Family:
    return Family(
        model_type=model_type,
        layers="encoder.layer",
        heads=SubLayer(
            inputs=_separate("attention.self.{}", _BERT_NAMES),
            output=Projection("attention.output.dense", ("q",)),
            core="attention.self",
            attributes=(
                ("attention.self", "num_attention_heads", "heads"),
                ("attention.self", "all_head_size", "q"),
            ),
        ),
        neurons=_feed_forward(
            Projection("intermediate.dense", ("neuron",)), Projection("output.dense", ("neuron",)), "intermediate_size"
        ),
        head=head,
        drops_layers=True,
    )


def _llama_like(model_type: str, fused: bool = False) -> Family:
    qkv = (
        (Projection("self_attn.qkv_proj", ("q", "k", "v")),)
        if fused
        else _separate("self_attn.{}_proj", {"q": "q", "k": "k", "v": "v"})
    )
    up = (
        (Projection("mlp.gate_up_proj", ("neuron", "neuron")),)
        if fused
        else (Projection("mlp.gate_proj", ("neuron",)), Projection("mlp.up_proj", ("neuron",)))
    )
    fused_attributes = (
        ("self_attn", "config.num_attention_heads", "heads"),
        ("self_attn", "num_key_value_heads", "kv_heads"),
    )
    return Family(
        model_type=model_type,
        layers="layers",
        heads=SubLayer(
            inputs=qkv,
            output=Projection("self_attn.o_proj", ("q",)),
            core="self_attn",
            attributes=(("self_attn", "num_key_value_groups", "sharing"), *(fused_attributes if fused else ())),
            config_fields=(("num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads")),
        ),
        neurons=_feed_forward(up, Projection("mlp.down_proj", ("neuron",)), "intermediate_size"),
        head=("score",),
        is_decoder=True,
    )


def _deberta_positions(kind: str) -> Callable[[Any], bool]:
    """Whether positions have a projection of their own in DeBERTa-v2: "c2p" for keys, "p2c" for queries."""
    return lambda config: (
        bool(getattr(config, "relative_attention", False))
        and not getattr(config, "share_att_key", False)
        and kind in (config.pos_att_type or ())
    )


def _deberta_relative_positions(config: Any) -> int:
    """2 * span positions for each of "content to position" and "position to content"."""
    if not getattr(config, "relative_attention", False):
        return 0
    longest = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    span = config.position_buckets if getattr(config, "position_buckets", -1) > 0 else longest
    return 2 * span * len({"c2p", "p2c"} & set(config.pos_att_type or ()))


_RECORDS = (
    _bert_like("bert", head=("bert.pooler", "classifier")),
    _bert_like("roberta", head=("classifier",)),
    _bert_like("xlm-roberta", head=("classifier",)),
    _bert_like("electra", head=("classifier",)),
    Family(
        model_type="distilbert",
        layers="transformer.layer",
        heads=SubLayer(
            inputs=_separate("attention.{}_lin", {"q": "q", "k": "k", "v": "v"}),
            output=Projection("attention.out_lin", ("q",)),
            core="attention",
            attributes=(("attention", "n_heads", "heads"), ("attention", "dim", "q")),
        ),
        neurons=_feed_forward(Projection("ffn.lin1", ("neuron",)), Projection("ffn.lin2", ("neuron",)), "hidden_dim"),
        head=("pre_classifier", "classifier"),
        drops_layers=True,
    ),
    Family(
        model_type="deberta-v2",
        layers="encoder.layer",
        heads=SubLayer(
            inputs=(
                *_separate("attention.self.{}_proj", _BERT_NAMES),
                Projection("attention.self.pos_key_proj", ("k",), exists=_deberta_positions("c2p"), per_token=False),
                Projection("attention.self.pos_query_proj", ("q",), exists=_deberta_positions("p2c"), per_token=False),
            ),
            output=Projection("attention.output.dense", ("q",)),
            core="attention.self",
            attributes=(
                ("attention.self", "num_attention_heads", "heads"),  # it views (num_attention_heads, -1)
                ("attention.self", "all_head_size", "q"),
            ),
        ),
        neurons=_feed_forward(
            Projection("intermediate.dense", ("neuron",)), Projection("output.dense", ("neuron",)), "intermediate_size"
        ),
        head=("pooler", "classifier"),
        relative_positions=_deberta_relative_positions,
    ),
    Family(
        model_type="modernbert",
        layers="layers",
        heads=SubLayer(
            inputs=(Projection("attn.Wqkv", ("q", "k", "v")),), output=Projection("attn.Wo", ("q",)), core="attn"
        ),
        neurons=_feed_forward(
            Projection("mlp.Wi", ("neuron", "neuron")), Projection("mlp.Wo", ("neuron",)), "intermediate_size"
        ),
        head=("head", "classifier"),
    ),
    Family(
        model_type="albert",
        layers="encoder.albert_layer_groups.0.albert_layers",
        heads=SubLayer(
            inputs=_separate("attention.{}", _BERT_NAMES),
            output=Projection("attention.dense", ("q",)),
            attributes=(("attention", "num_attention_heads", "heads"), ("attention", "all_head_size", "q")),
        ),
        neurons=_feed_forward(
            Projection("ffn", ("neuron",)), Projection("ffn_output", ("neuron",)), "intermediate_size"
        ),
        head=("albert.pooler", "classifier"),
        shares_layers=True,
    ),
    _llama_like("llama"),
    _llama_like("mistral"),
    _llama_like("qwen2"),
    _llama_like("qwen3"),
    _llama_like("gemma"),
    _llama_like("phi3", fused=True),
    Family(
        model_type="gpt_neox",
        layers="layers",
        heads=SubLayer(
            inputs=(Projection("attention.query_key_value", ("qkv",)),),
            output=Projection("attention.dense", ("q",)),
            core="attention",
        ),
        neurons=_feed_forward(
            Projection("mlp.dense_h_to_4h", ("neuron",)),
            Projection("mlp.dense_4h_to_h", ("neuron",)),
            "intermediate_size",
        ),
        head=("score",),
        is_decoder=True,
    ),
    Family(
        model_type="opt",
        layers="decoder.layers",
        heads=SubLayer(
            inputs=_separate("self_attn.{}_proj", {"q": "q", "k": "k", "v": "v"}),
            output=Projection("self_attn.out_proj", ("q",)),
            core="self_attn",
            attributes=(("self_attn", "num_heads", "heads"),),  # its views let the tokens absorb a wrong number
        ),
        neurons=_feed_forward(Projection("fc1", ("neuron",)), Projection("fc2", ("neuron",)), "ffn_dim"),
        head=("score",),
        is_decoder=True,
    ),
    Family(
        model_type="gpt2",
        layers="h",
        heads=SubLayer(
            inputs=(Projection("attn.c_attn", ("q", "k", "v"), transposed=True),),
            output=Projection("attn.c_proj", ("q",), transposed=True),
            core="attn",
            attributes=(("attn", "split_size", "q"), ("attn", "num_heads", "heads")),
        ),
        neurons=_feed_forward(
            Projection("mlp.c_fc", ("neuron",), transposed=True),
            Projection("mlp.c_proj", ("neuron",), transposed=True),
            "n_inner",
        ),
        head=("score",),
        is_decoder=True,
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _RECORDS}
assert len(FAMILIES) == len(_RECORDS), "two records name the same model_type"


def family_of(config: Any) -> Family:
    """The record of a configuration's family. Raises UserError where there is none."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            Problem(
                "model_name_or_path",
                getattr(config, "name_or_path", "") or config.model_type,
                f"the architecture {config.model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}. "
                "To add one, write its record in prunadapt_ds/models/families.py",
            )
        )
    if family.shares_layers and config.num_hidden_groups != 1:
        remedy = "its layers share weights in several groups, of which no cut is written; take one with one group"
        raise UserError(Problem("model_name_or_path", f"num_hidden_groups={config.num_hidden_groups}", remedy))
    return family


def most_tokens(model: Any) -> int | None:
    """The longest input that a model has positions for; None where positions are no table."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            # RoBERTa counts from behind the padding token, OPT from 2.
            unused = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            return full_shape(nn.Module.get_parameter(module, "weight"))[0] - unused
    return None


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def widths_of(config: Any) -> dict[str, int | None]:
    """Rows (or whatever is counted) per unit by width name; None for what does not follow the units."""
    heads, head_dim = config.num_attention_heads, head_dim_of(config)
    group = heads // _kv_heads(config)
    widths = {"q": group * head_dim, "k": head_dim, "v": head_dim, "qkv": 3 * head_dim, "neuron": 1}
    if is_multi_query(config):
        return {**widths, "q": head_dim, "k": None, "v": None, "heads": 1, "kv_heads": None, "sharing": 1}
    return {**widths, "heads": group, "kv_heads": 1, "sharing": None}


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def is_multi_query(config: Any) -> bool:
    """One key/value head for several query heads: it stays, query heads go one by one."""
    return _kv_heads(config) == 1 < config.num_attention_heads


def num_units(family: Family, config: Any) -> tuple[int, int]:
    """Heads (or key/value groups) and neurons of a layer."""
    heads = config.num_attention_heads if is_multi_query(config) else _kv_heads(config)
    neurons = getattr(config, family.neurons.config_fields[0][0]) or 4 * config.hidden_size
    return heads, neurons


def head_floors(family: Family, config: Any, num_layers: int) -> tuple[int, ...]:
    """Heads that must stay, by layer.

    A decoder's cache tells its length from the first layer of each kind of attention, so that layer keeps some. Shared
    layers and the one key/value head of multi-query attention keep some everywhere.
    """
    if family.shares_layers or is_multi_query(config):
        return (1,) * num_layers
    if not family.is_decoder:
        return (0,) * num_layers
    kinds = getattr(config, "layer_types", None) or [""] * num_layers
    return tuple(int(kinds.index(kind) == i) for i, kind in enumerate(kinds))


def uniform_floors(family: Family, structure: Structure, neuron_multiple: int) -> Structure:
    """The same structure where each layer keeps what a stock configuration needs: at least one unit of each kind, and all of
    a kind whose number it cannot say; where it can say fewer layers, whole ones may go."""
    sayable = {"heads": bool(family.heads.config_fields), "neurons": bool(family.neurons.config_fields)}
    least = {"heads": 1, "neurons": neuron_multiple}
    return replace(
        structure,
        sublayers=tuple(
            replace(s, floor=min(least[s.kind], s.num_units) if sayable[s.kind] else s.num_units)
            for s in structure.sublayers
        ),
        skips=family.drops_layers,
    )


def layout_of(family: Family, config: Any, base_model_prefix: str) -> Layout:
    """Resolve a family's record with the sizes of one configuration."""
    widths, head_dim = widths_of(config), head_dim_of(config)
    num_layers = config.inner_group_num if family.shares_layers else config.num_hidden_layers

    def projection(p: Projection) -> ProjectionLayout:
        follow = tuple(w for part in p.parts if (w := widths[part]) is not None)
        tail = head_dim * (len(p.parts) - len(follow))
        return ProjectionLayout(p.path, follow, p.transposed, tail, p.per_token)

    def sublayer(kind: str, units: int, record: SubLayer, floors: tuple[int, ...], positions: int) -> SubLayerLayout:
        return SubLayerLayout(
            kind=kind,
            num_units=units,
            inputs=tuple(projection(p) for p in record.inputs if p.exists(config)),
            output=projection(record.output),
            core=record.core,
            attributes=tuple(
                AttributeLayout(path, name, w) for path, name, width in record.attributes if (w := widths[width])
            ),
            floors=floors,
            relative_positions=positions,
        )

    heads, neurons = num_units(family, config)
    return Layout(
        layers=f"{base_model_prefix}.{family.layers}",
        num_layers=num_layers,
        sublayers=(
            sublayer(
                "heads", heads, family.heads, head_floors(family, config, num_layers), family.relative_positions(config)
            ),
            sublayer("neurons", neurons, family.neurons, (0,) * num_layers, 0),
        ),
        passes=config.num_hidden_layers if family.shares_layers else 1,
    )
