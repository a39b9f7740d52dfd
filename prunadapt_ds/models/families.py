"""Architecture families: where heads and neurons live and how their weights are laid out. One record per family.

Module paths appear nowhere else, but for names that transformers 4 had (older_readers.py). To add a family, add a record to
`_RECORDS`; the tests that run over all families (slicing, cost model, parity, training) pick it up.

Widths are given by name; layouts.py resolves them against a model's configuration:

    q         query rows per unit: head_dim, or group * head_dim where `group` query heads share a key/value head
    k, v      key or value rows per unit: head_dim
    qkv       query, key and value rows of one head, interleaved: 3 * head_dim
    neuron    rows per neuron: 1
    heads     query heads per unit
    kv_heads  key/value heads per unit
    sharing   query heads per key/value head that one unit contributes (multi-query attention only)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Projection:
    """A linear map in a layer. `parts` names, in order, the widths of the consecutive blocks that hold its units.

    `exists`: whether a model with this configuration has the projection.  `per_token`: whether it runs once per token,
    rather than once per batch on something all sequences share.
    """

    path: str
    parts: tuple[str, ...]
    transposed: bool = False
    exists: Callable[[Any], bool] = lambda config: True
    per_token: bool = True


@dataclass(frozen=True)
class SubLayerRecord:
    """One kind of prunable sub-layer: `inputs` produce its units, `output` consumes them.

    `core`: the module that cannot run without units.  `attributes`: (module, attribute, width name) of the sizes that modules
    store.  `config_fields`: (field, width name) of the stock configuration's fields that shrink every layer alike; empty if it
    has none.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    core: str | None = None
    attributes: tuple[tuple[str, str, str], ...] = ()
    config_fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture.

    `layers`: path of the blocks, relative to the base model.  `task_head`: modules of the classification model that are
    always trained, in addition to those that loading reports as newly initialised.  `is_decoder`: causal; pooled at the last
    token, padded on the right, generates with a cache.  `shares_layers`: the same weights run `num_hidden_layers` times; at
    least one head stays.  `drops_layers`: all layers are alike and none depends on its index, so the stock configuration can
    describe a model with fewer.  `relative_positions`: how many positions are attended to in addition to the tokens.
    `norms_outputs`: a norm directly follows each sub-layer. It would divide by the norm of nothing, so a unit always stays.
    """

    model_type: str
    layers: str
    heads: SubLayerRecord
    neurons: SubLayerRecord
    task_head: tuple[str, ...]
    is_decoder: bool = False
    shares_layers: bool = False
    drops_layers: bool = False
    relative_positions: Callable[[Any], int] = lambda config: 0
    norms_outputs: bool = False


def _feed_forward(inputs: Projection | tuple[Projection, ...], output: Projection, field: str) -> SubLayerRecord:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return SubLayerRecord(inputs, output, config_fields=((field, "neuron"),))


def _separate(path: str, names: dict[str, str]) -> tuple[Projection, ...]:
    """Separate query, key and value projections, named by `path` with each part's name filled in."""
    return tuple(Projection(path.format(name), (part,)) for part, name in names.items())


_BERT_NAMES = {"q": "query", "k": "key", "v": "value"}


def _bert_like(model_type: str, task_head: tuple[str, ...]) -> Family:
    return Family(
        model_type=model_type,
        layers="encoder.layer",
        heads=SubLayerRecord(
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
        task_head=task_head,
        drops_layers=True,
    )


def _llama_like(model_type: str, fused: bool = False, norms_outputs: bool = False) -> Family:
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
        heads=SubLayerRecord(
            inputs=qkv,
            output=Projection("self_attn.o_proj", ("q",)),
            core="self_attn",
            attributes=(("self_attn", "num_key_value_groups", "sharing"), *(fused_attributes if fused else ())),
            config_fields=(("num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads")),
        ),
        neurons=_feed_forward(up, Projection("mlp.down_proj", ("neuron",)), "intermediate_size"),
        task_head=("score",),
        is_decoder=True,
        norms_outputs=norms_outputs,
    )


def _deberta_positions(kind: str) -> Callable[[Any], bool]:
    """Whether DeBERTa-v2 projects positions with weights of their own: "c2p" for keys, "p2c" for queries."""
    return lambda config: (
        bool(getattr(config, "relative_attention", False))
        and not getattr(config, "share_att_key", False)
        and kind in (config.pos_att_type or ())
    )


def _deberta_relative_positions(config: Any) -> int:
    """2 * span positions for each enabled term: "c2p" (content to position) and "p2c" (position to content)."""
    if not getattr(config, "relative_attention", False):
        return 0
    longest = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    span = config.position_buckets if getattr(config, "position_buckets", -1) > 0 else longest
    return 2 * span * len({"c2p", "p2c"} & set(config.pos_att_type or ()))


_RECORDS = (
    _bert_like("bert", task_head=("bert.pooler", "classifier")),
    _bert_like("roberta", task_head=("classifier",)),
    _bert_like("xlm-roberta", task_head=("classifier",)),
    _bert_like("camembert", task_head=("classifier",)),
    _bert_like("electra", task_head=("classifier",)),
    Family(
        model_type="distilbert",
        layers="transformer.layer",
        heads=SubLayerRecord(
            inputs=_separate("attention.{}_lin", {"q": "q", "k": "k", "v": "v"}),
            output=Projection("attention.out_lin", ("q",)),
            core="attention",
            attributes=(("attention", "n_heads", "heads"), ("attention", "dim", "q")),
        ),
        neurons=_feed_forward(Projection("ffn.lin1", ("neuron",)), Projection("ffn.lin2", ("neuron",)), "hidden_dim"),
        task_head=("pre_classifier", "classifier"),
        drops_layers=True,
    ),
    Family(
        model_type="deberta-v2",
        layers="encoder.layer",
        heads=SubLayerRecord(
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
        task_head=("pooler", "classifier"),
        relative_positions=_deberta_relative_positions,
    ),
    Family(
        model_type="modernbert",
        layers="layers",
        heads=SubLayerRecord(
            inputs=(Projection("attn.Wqkv", ("q", "k", "v")),),
            output=Projection("attn.Wo", ("q",)),
            core="attn",
            attributes=(("attn", "num_heads", "heads"), ("attn", "all_head_size", "q")),  # transformers 4 reads them
        ),
        neurons=_feed_forward(
            Projection("mlp.Wi", ("neuron", "neuron")), Projection("mlp.Wo", ("neuron",)), "intermediate_size"
        ),
        task_head=("head", "classifier"),
    ),
    Family(
        model_type="albert",
        layers="encoder.albert_layer_groups.0.albert_layers",
        heads=SubLayerRecord(
            inputs=_separate("attention.{}", _BERT_NAMES),
            output=Projection("attention.dense", ("q",)),
            attributes=(("attention", "num_attention_heads", "heads"), ("attention", "all_head_size", "q")),
        ),
        neurons=_feed_forward(
            Projection("ffn", ("neuron",)), Projection("ffn_output", ("neuron",)), "intermediate_size"
        ),
        task_head=("albert.pooler", "classifier"),
        shares_layers=True,
    ),
    _llama_like("llama"),
    _llama_like("mistral"),
    _llama_like("qwen2"),
    _llama_like("qwen3"),
    _llama_like("gemma"),
    _llama_like("gemma3_text", norms_outputs=True),
    _llama_like("smollm3"),
    _llama_like("phi3", fused=True),
    Family(
        model_type="gpt_neox",
        layers="layers",
        heads=SubLayerRecord(
            inputs=(Projection("attention.query_key_value", ("qkv",)),),
            output=Projection("attention.dense", ("q",)),
            core="attention",
        ),
        neurons=_feed_forward(
            Projection("mlp.dense_h_to_4h", ("neuron",)),
            Projection("mlp.dense_4h_to_h", ("neuron",)),
            "intermediate_size",
        ),
        task_head=("score",),
        is_decoder=True,
    ),
    Family(
        model_type="opt",
        layers="decoder.layers",
        heads=SubLayerRecord(
            inputs=_separate("self_attn.{}_proj", {"q": "q", "k": "k", "v": "v"}),
            output=Projection("self_attn.out_proj", ("q",)),
            core="self_attn",
            attributes=(("self_attn", "num_heads", "heads"),),  # a wrong number is silent: view(B, -1, heads, dim)
        ),
        neurons=_feed_forward(Projection("fc1", ("neuron",)), Projection("fc2", ("neuron",)), "ffn_dim"),
        task_head=("score",),
        is_decoder=True,
    ),
    Family(
        model_type="gpt2",
        layers="h",
        heads=SubLayerRecord(
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
        task_head=("score",),
        is_decoder=True,
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _RECORDS}
assert len(FAMILIES) == len(_RECORDS), "two records name the same model_type"
