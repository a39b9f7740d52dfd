"""A family's record resolved with one configuration: sizes, counts, floors, and the layout that the rest goes by.

Widths of a unit by name, as families.py writes them, in rows of a projection (or whatever an attribute counts). Under
multi-query attention (one key/value head for all) a unit is one query head: k, v and kv_heads do not follow the units,
they stay as they are, and `sharing` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.families import FAMILIES, Family, Projection, SubLayer
from prunadapt_ds.models.modeling_prunadapt import AttributeLayout, Layout, ProjectionLayout, SubLayerLayout
from prunadapt_ds.models.structure import Structure, full_shape, with_outer_floor

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")


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


def stock_fields(record: SubLayer, config: Any, count: int) -> dict[str, int]:
    """The fields of a stock configuration that say `count` units of a kind in every layer."""
    widths = widths_of(config)
    return {field: count * w for field, name in record.config_fields if (w := widths[name]) is not None}


def sayable_heads(family: Family, config: Any) -> tuple[int, ...]:
    """The numbers of heads (or key/value groups) per layer that a stock configuration takes, ascending.

    All or none, but that Llama's wants one that divides the model's width, whatever the width of a head.
    """
    dense, _ = num_units(family, config)

    def takes(count: int) -> bool:
        fields = {"head_dim": head_dim_of(config), **stock_fields(family.heads, config, count)}
        try:
            type(config).from_dict({**config.to_dict(), **fields})
        except Exception:  # of a type of its own, whatever was raised
            return False
        return True

    fewer = range(1, dense) if family.heads.config_fields else ()
    return (*filter(takes, fewer), dense)


def uniform_floors(
    family: Family, structure: Structure, config: Any, neuron_multiple: int, head_multiple: int = 1
) -> Structure:
    """The same structure where each layer keeps what a stock configuration needs: at least one unit of each kind, and numbers
    of heads that it can state and `head_multiple` divides; where it can state fewer layers, whole ones may go.

    Raises UserError if `head_multiple` does not divide the number that the model has."""
    dense, _ = num_units(family, config)
    if dense % head_multiple:
        remedy = f"must divide the {dense} heads (or groups that share a key) of this model's layers"
        raise UserError(Problem("head_multiple", head_multiple, remedy))
    fewest, *others = heads = tuple(n for n in sayable_heads(family, config) if n % head_multiple == 0)
    floors = {"heads": fewest, "neurons": neuron_multiple if family.neurons.config_fields else structure.num_units}
    counts = {"heads": heads if len(others) < heads[-1] - fewest else (), "neurons": ()}
    sublayers = (replace(s, floor=min(floors[s.kind], s.num_units), counts=counts[s.kind]) for s in structure.sublayers)
    return replace(structure, sublayers=tuple(sublayers), skips=family.drops_layers)


def with_floors(family: Family, structure: Structure, config: Any, prune: Any) -> Structure:
    """The same structure with what the options of pruning (uniform, keep_in_outer_layers, *_multiple) have stay in it.

    config: the dense model's.
    """
    if prune.uniform:
        structure = uniform_floors(family, structure, config, prune.neuron_multiple, prune.head_multiple)
    return with_outer_floor(structure, prune.keep_in_outer_layers, prune.neuron_multiple)


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
