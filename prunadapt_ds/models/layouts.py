"""Resolves a family's record against one configuration: sizes, counts, floors, and the `Layout` all other modules use.

The width names of families.py become numbers: rows of a projection per unit, or whatever an attribute counts. Under
multi-query attention (one key/value head for all query heads) a unit is one query head: k, v and kv_heads then stay as
they are, and `sharing` scales with the number of units.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.families import FAMILIES, Family, Projection, SubLayerRecord
from prunadapt_ds.models.modeling_prunadapt import AttributeLayout, Layout, ProjectionLayout, SubLayerLayout
from prunadapt_ds.models.structure import Structure, full_shape, with_outer_floor

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")


def family_of(config: Any) -> Family:
    """The family record for a configuration. Raises UserError if the architecture is not supported."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            Problem(
                "model_name_or_path",
                getattr(config, "name_or_path", "") or config.model_type,
                f"the architecture {config.model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}. "
                "To add one, write a record for it in prunadapt_ds/models/families.py",
            )
        )
    if family.shares_layers and config.num_hidden_groups != 1:
        remedy = "its layers share weights in several groups, which cannot be pruned; use a model with one group"
        raise UserError(Problem("model_name_or_path", f"num_hidden_groups={config.num_hidden_groups}", remedy))
    return family


def most_tokens(model: Any) -> int | None:
    """The longest input, in tokens, that a model has positions for; None if it has no table of positions."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            # RoBERTa's positions start after the padding token's, OPT's at 2.
            unused = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            return full_shape(nn.Module.get_parameter(module, "weight"))[0] - unused
    return None


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def widths_of(config: Any) -> dict[str, int | None]:
    """Rows (or whatever is counted) per unit, by width name; None for what does not scale with the number of units."""
    heads, head_dim = config.num_attention_heads, head_dim_of(config)
    group = heads // _kv_heads(config)
    widths = {"q": group * head_dim, "k": head_dim, "v": head_dim, "qkv": 3 * head_dim, "neuron": 1}
    if is_multi_query(config):
        return {**widths, "q": head_dim, "k": None, "v": None, "heads": 1, "kv_heads": None, "sharing": 1}
    return {**widths, "heads": group, "kv_heads": 1, "sharing": None}


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def is_multi_query(config: Any) -> bool:
    """Whether several query heads share a single key/value head: that head stays, and query heads are cut one by one."""
    return _kv_heads(config) == 1 < config.num_attention_heads


def num_units(family: Family, config: Any) -> tuple[int, int]:
    """The numbers of heads (or key/value groups) and of neurons in a dense layer."""
    heads = config.num_attention_heads if is_multi_query(config) else _kv_heads(config)
    neurons = getattr(config, family.neurons.config_fields[0][0]) or 4 * config.hidden_size
    return heads, neurons


def head_floors(family: Family, config: Any, num_layers: int) -> tuple[int, ...]:
    """The number of heads that must stay, by layer.

    A decoder's cache reads its length from the first layer of each attention type, so that layer keeps a head. With shared
    layers, multi-query attention or a norm behind the sub-layer, every layer keeps one.
    """
    if family.shares_layers or family.norms_outputs or is_multi_query(config):
        return (1,) * num_layers
    if not family.is_decoder:
        return (0,) * num_layers
    kinds = getattr(config, "layer_types", None) or [""] * num_layers
    return tuple(int(kinds.index(kind) == i) for i, kind in enumerate(kinds))


def stock_fields(record: SubLayerRecord, config: Any, count: int) -> dict[str, int]:
    """The fields of a stock configuration that give every layer `count` units of a kind, with their values."""
    widths = widths_of(config)
    return {field: count * w for field, name in record.config_fields if (w := widths[name]) is not None}


def representable_heads(family: Family, config: Any) -> tuple[int, ...]:
    """The numbers of heads (or key/value groups) per layer that a stock configuration accepts, ascending.

    Usually every number, or only the dense one; Llama requires the number of query heads to divide hidden_size, whatever
    head_dim is.
    """
    dense, _ = num_units(family, config)

    def takes(count: int) -> bool:
        fields = {"head_dim": head_dim_of(config), **stock_fields(family.heads, config, count)}
        try:
            type(config).from_dict({**config.to_dict(), **fields})
        except Exception:  # validation raises an error type of its own
            return False
        return True

    fewer = range(1, dense) if family.heads.config_fields else ()
    return (*filter(takes, fewer), dense)


def uniform_floors(
    family: Family, structure: Structure, config: Any, neuron_multiple: int, head_multiple: int = 1
) -> Structure:
    """The same structure, limited to what a stock configuration can represent.

    Each layer keeps at least one unit of each kind (neurons: `neuron_multiple`), and a number of heads that the configuration
    accepts and `head_multiple` divides; if the family can have fewer layers, whole ones may go. Raises UserError if
    `head_multiple` does not divide the model's number of heads.
    """
    dense, _ = num_units(family, config)
    if dense % head_multiple:
        remedy = f"must divide the {dense} heads (or groups that share a key) of this model's layers"
        raise UserError(Problem("head_multiple", head_multiple, remedy))
    fewest, *others = heads = tuple(n for n in representable_heads(family, config) if n % head_multiple == 0)
    floors = {"heads": fewest, "neurons": neuron_multiple if family.neurons.config_fields else structure.num_units}
    counts = {"heads": heads if len(others) < heads[-1] - fewest else (), "neurons": ()}
    sublayers = (replace(s, floor=min(floors[s.kind], s.num_units), counts=counts[s.kind]) for s in structure.sublayers)
    return replace(structure, sublayers=tuple(sublayers), skips=family.drops_layers)


def with_floors(family: Family, structure: Structure, config: Any, prune: Any) -> Structure:
    """The same structure with the floors that `uniform`, `keep_in_outer_layers` and the two multiples of `prune` imply, and with a
    group of neurons in every layer if a norm follows.

    config: the dense model's.
    """
    if family.norms_outputs:
        fewest = {"heads": 1, "neurons": prune.neuron_multiple}
        floored = (replace(s, floor=max(s.floor, min(fewest[s.kind], s.num_units))) for s in structure.sublayers)
        structure = replace(structure, sublayers=tuple(floored))
    if prune.uniform:
        structure = uniform_floors(family, structure, config, prune.neuron_multiple, prune.head_multiple)
    return with_outer_floor(structure, prune.keep_in_outer_layers, prune.neuron_multiple)


def layout_of(family: Family, config: Any, base_model_prefix: str) -> Layout:
    """Resolve a family's record against one configuration."""
    widths, head_dim = widths_of(config), head_dim_of(config)
    num_layers = config.inner_group_num if family.shares_layers else config.num_hidden_layers

    def projection(p: Projection) -> ProjectionLayout:
        follow = tuple(w for part in p.parts if (w := widths[part]) is not None)
        tail = head_dim * (len(p.parts) - len(follow))
        return ProjectionLayout(p.path, follow, p.transposed, tail, p.per_token)

    def sublayer(
        kind: str, units: int, record: SubLayerRecord, floors: tuple[int, ...], positions: int
    ) -> SubLayerLayout:
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
