"""Architecture families: where heads and neurons live and how their weights are laid out. One record per family.

This is the only place that knows a module path. To add a family, add a record to `FAMILIES`: the tests that run over
the table (slicing, cost model, parity, training) pick it up.

Widths are written by name and resolved from the model's configuration:

    q       the query rows of a unit: head_dim for plain attention, group * head_dim where `group` query heads share a key
    k, v    the key or value rows of a unit: head_dim
    qkv     one head's query, key and value rows interleaved: 3 * head_dim
    neuron  1
    heads   query heads per unit (only for attributes);  kv_heads  1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.modeling_prunadapt import AttributeLayout, Layout, ProjectionLayout, SubLayerLayout


@dataclass(frozen=True)
class Projection:
    """A linear map below a layer; `parts` names the blocks in which its units lie one after another."""

    path: str
    parts: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class SubLayer:
    """`inputs` produce the units, `output` consumes them; `attributes` are (module, attribute, width name)."""

    inputs: tuple[Projection, ...]
    output: Projection
    core: str | None = None
    attributes: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture.

    `layers`: path of the blocks below the base model.  `head`: modules below the classification model that are always
    trained, beside whatever loading reports as newly initialised.  `norms`: LayerNorms below a layer.
    `intermediate_size`: the configuration's name for the number of neurons.  `trainable`: False where only the layout
    is known so far.
    """

    model_type: str
    layers: str
    heads: SubLayer
    neurons: SubLayer
    head: tuple[str, ...]
    intermediate_size: str = "intermediate_size"
    trainable: bool = True


def _bert_like(model_type: str, head: tuple[str, ...]) -> Family:
    return Family(
        model_type=model_type,
        layers="encoder.layer",
        heads=SubLayer(
            inputs=tuple(
                Projection(f"attention.self.{name}", (part,))
                for name, part in (("query", "q"), ("key", "k"), ("value", "v"))
            ),
            output=Projection("attention.output.dense", ("q",)),
            core="attention.self",
            attributes=(
                ("attention.self", "num_attention_heads", "heads"),
                ("attention.self", "all_head_size", "q"),
            ),
        ),
        neurons=SubLayer(
            inputs=(Projection("intermediate.dense", ("neuron",)),),
            output=Projection("output.dense", ("neuron",)),
        ),
        head=head,
    )


def _llama_like(model_type: str, fused: bool, trainable: bool = False) -> Family:
    qkv = (
        (Projection("self_attn.qkv_proj", ("q", "k", "v")),)
        if fused
        else tuple(Projection(f"self_attn.{name}_proj", (name,)) for name in "qkv")
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
            attributes=fused_attributes if fused else (),
        ),
        neurons=SubLayer(inputs=up, output=Projection("mlp.down_proj", ("neuron",))),
        head=("score",),
        trainable=trainable,
    )


_RECORDS = (
    _bert_like("bert", head=("bert.pooler", "classifier")),
    _bert_like("roberta", head=("classifier",)),
    _bert_like("xlm-roberta", head=("classifier",)),
    _bert_like("electra", head=("classifier",)),
    Family(
        model_type="distilbert",
        layers="transformer.layer",
        heads=SubLayer(
            inputs=tuple(Projection(f"attention.{part}_lin", (part,)) for part in "qkv"),
            output=Projection("attention.out_lin", ("q",)),
            core="attention",
            attributes=(("attention", "n_heads", "heads"), ("attention", "dim", "q")),
        ),
        neurons=SubLayer(
            inputs=(Projection("ffn.lin1", ("neuron",)),),
            output=Projection("ffn.lin2", ("neuron",)),
        ),
        head=("pre_classifier", "classifier"),
        intermediate_size="hidden_dim",
    ),
    # Layouts that are known and sliced correctly, not yet trained: decoders need pooling and padding rules of their own.
    _llama_like("llama", fused=False),
    _llama_like("phi3", fused=True),
    Family(
        model_type="gpt_neox",
        layers="layers",
        heads=SubLayer(
            inputs=(Projection("attention.query_key_value", ("qkv",)),),
            output=Projection("attention.dense", ("q",)),
            core="attention",
        ),
        neurons=SubLayer(
            inputs=(Projection("mlp.dense_h_to_4h", ("neuron",)),),
            output=Projection("mlp.dense_4h_to_h", ("neuron",)),
        ),
        head=("score",),
        trainable=False,
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
        neurons=SubLayer(
            inputs=(Projection("mlp.c_fc", ("neuron",), transposed=True),),
            output=Projection("mlp.c_proj", ("neuron",), transposed=True),
        ),
        head=("score",),
        intermediate_size="n_inner",
        trainable=False,
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _RECORDS}
assert len(FAMILIES) == len(_RECORDS), "two records name the same model_type"


def family_of(config: Any) -> Family:
    """The record of a configuration's family. Raises UserError where there is none or it cannot be trained yet."""
    family = FAMILIES.get(config.model_type)
    if family is None or not family.trainable:
        known = ", ".join(sorted(f.model_type for f in FAMILIES.values() if f.trainable))
        raise UserError(
            Problem(
                "model_name_or_path",
                config.model_type,
                f"this architecture is not supported; supported are {known}. "
                "To add one, write its record in prunadapt_ds/models/families.py",
            )
        )
    return family


def layout_of(family: Family, config: Any, base_model_prefix: str) -> Layout:
    """Resolve a family's record with the sizes of one configuration."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    group = heads // kv_heads
    widths = {
        "q": group * head_dim,
        "k": head_dim,
        "v": head_dim,
        "qkv": 3 * head_dim,
        "neuron": 1,
        "heads": group,
        "kv_heads": 1,
    }
    neurons = getattr(config, family.intermediate_size) or 4 * config.hidden_size

    def projection(p: Projection) -> ProjectionLayout:
        return ProjectionLayout(p.path, tuple(widths[part] for part in p.parts), p.transposed)

    def sublayer(kind: str, num_units: int, record: SubLayer) -> SubLayerLayout:
        return SubLayerLayout(
            kind=kind,
            num_units=num_units,
            inputs=tuple(projection(p) for p in record.inputs),
            output=projection(record.output),
            core=record.core,
            attributes=tuple(AttributeLayout(path, name, widths[w]) for path, name, w in record.attributes),
        )

    return Layout(
        layers=f"{base_model_prefix}.{family.layers}",
        num_layers=config.num_hidden_layers,
        sublayers=(sublayer("heads", kv_heads, family.heads), sublayer("neurons", neurons, family.neurons)),
    )
