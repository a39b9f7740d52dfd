"""Loads pruned models: stock `transformers` classes with fewer attention heads, feed-forward neurons or layers.

prunadapt_ds prunes its models with this file and copies it into the folder of every pruned export, where `auto_map` in
config.json refers to it. It therefore depends only on torch and transformers.

`from_pretrained(folder, trust_remote_code=True)` builds the stock model, narrows each layer to the sizes in
`config.pruned_structure`, and then loads the weights. That structure has two entries:

    layout   where the units are: heads, key/value groups and neurons (see `Layout`)
    kept     how many of them are left, as kept[layer][sub-layer]

Legend: U units of one sub-layer, K of them kept; B batch size, T tokens, D hidden size.

A projection stores its units in one or more consecutive blocks of rows, its parts. With part widths (w0, w1, ...), part p has
U * wp rows, and the wp rows of unit u start at U * (w0 + ... + w[p-1]) + u * wp:

    separate query          parts = (head_dim,)
    fused [q | k | v]       parts = (head_dim, head_dim, head_dim)
    grouped [q | k | v]     parts = (group * head_dim, head_dim, head_dim)
    interleaved q, k, v     parts = (3 * head_dim,)

The parts may be followed by `tail` rows that belong to no unit and always stay: in multi-query attention, the shared key and
value.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# In transformers 4 the layers that can be skipped return tuples.
LAYERS_RETURN_TUPLES = int(transformers.__version__.partition(".")[0]) < 5


@dataclass(frozen=True)
class ProjectionLayout:
    """Where the units of one linear map are. `path` is relative to the layer; `parts` are the rows per unit of each part."""

    path: str
    parts: tuple[int, ...]
    transposed: bool = False  # weight is [in, out] (GPT-2's Conv1D) instead of [out, in]
    tail: int = 0  # rows after the last part, which always stay
    per_token: bool = True  # False for projections of relative positions, which run once per batch

    def unit_axis(self, side: str) -> int:
        """The axis of the weight along which units lie: `side` is "out" if they are outputs, "in" if they are inputs."""
        return int((side == "in") != self.transposed)

    def indices(self, kept: Tensor, num_units: int) -> Tensor:
        """Rows (or columns) that stay when `kept` [K] of `num_units` units do: int64 [K * sum(parts) + tail], part by part."""
        blocks, offset = [], 0
        for width in self.parts:
            blocks.append((offset + kept[:, None] * width + torch.arange(width)).flatten())
            offset += num_units * width
        return torch.cat([*blocks, torch.arange(offset, offset + self.tail)])


@dataclass(frozen=True)
class AttributeLayout:
    """A size that a module stores as an attribute, equal to `per_unit` times its number of units.

    `name` may be "config.<field>": the module then gets a `LayerConfig`.
    """

    path: str
    name: str
    per_unit: int


@dataclass(frozen=True)
class SubLayerLayout:
    """One prunable sub-layer: its units are outputs of the projections `inputs` and inputs of the projection `output`."""

    kind: str  # "heads" or "neurons"
    num_units: int
    inputs: tuple[ProjectionLayout, ...]
    output: ProjectionLayout
    core: str | None = None  # module that cannot run without units; it is replaced when none are left
    attributes: tuple[AttributeLayout, ...] = ()
    floors: tuple[int, ...] = ()  # units that must stay, by layer; empty: none
    relative_positions: int = 0  # positions that heads attend to in addition to the tokens

    @property
    def width(self) -> int:
        """Features of one unit at the input of the output projection."""
        return sum(self.output.parts)

    @property
    def has_own_keys(self) -> bool:
        """Whether heads have keys and values of their own beside queries, rather than sharing one as in multi-query attention."""
        return self.kind == "heads" and sum(sum(p.parts) for p in self.inputs) > self.width

    @property
    def sides(self) -> tuple[tuple[ProjectionLayout, str], ...]:
        """Every projection with the side on which it has the units: "out" (its outputs) or "in" (its inputs)."""
        return (*((p, "out") for p in self.inputs), (self.output, "in"))


@dataclass(frozen=True)
class Layout:
    """Where the prunable units of a model are. `layers` is the path of its list of transformer blocks."""

    layers: str
    num_layers: int
    sublayers: tuple[SubLayerLayout, ...]
    passes: int = 1  # times that each block runs: more than once where layers share their weights
    skips: bool = False  # a layer without units is skipped entirely; if False, its norms and output biases still apply

    @property
    def places(self) -> list[tuple[int, SubLayerLayout]]:
        """Every (layer index, sub-layer) of the model: layer by layer, in the order of `sublayers`."""
        return [(layer, sublayer) for layer in range(self.num_layers) for sublayer in self.sublayers]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        def projection(p: dict[str, Any]) -> ProjectionLayout:
            return ProjectionLayout(**{**p, "parts": tuple(p["parts"])})

        sublayers = tuple(
            SubLayerLayout(
                kind=s["kind"],
                num_units=s["num_units"],
                inputs=tuple(projection(p) for p in s["inputs"]),
                output=projection(s["output"]),
                core=s["core"],
                attributes=tuple(AttributeLayout(**a) for a in s["attributes"]),
                floors=tuple(s["floors"]),
                relative_positions=s["relative_positions"],
            )
            for s in values["sublayers"]
        )
        return cls(values["layers"], values["num_layers"], sublayers, values["passes"], values.get("skips", False))


class LayerConfig:
    """A model's configuration with fields that differ in one layer. The others stay shared, as users may set them later."""

    def __init__(self, shared: Any):
        self.shared = shared

    def __getattr__(self, name: str) -> Any:
        if name == "shared":  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.shared, name)


class RemovedProjection(nn.Module):
    """Replaces an input projection that has no units left: [..., D] -> [..., 0]."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :0]


class BiasOnly(nn.Module):
    """Replaces an output projection that has no units left with its bias: [..., 0] -> [..., D].

    Its empty weight, [D, 0] or, if transposed, [0, D], is there to be stored: the stock class refuses a checkpoint with another
    shape, whereas it would make up a weight that is missing. It is a buffer, as there is nothing in it to train or to shard.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None):
        super().__init__()
        self.out_features = max(weight.shape)
        self.register_buffer("weight", weight)
        self.register_parameter("bias", bias)

    @classmethod
    def in_place_of(cls, layer: nn.Module, projection: ProjectionLayout, *, keep_bias: bool = True) -> BiasOnly:
        """What remains of the output projection of a sub-layer of `layer` (with LoRA or without)."""
        module: Any = layer.get_submodule(projection.path)
        module = getattr(module, "base_layer", module)
        sizes = whole_shape(module.weight)
        sizes[projection.unit_axis("in")] = 0
        return cls(module.weight.new_empty(sizes), module.bias if keep_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return self.bias.to(x.dtype).expand(*x.shape[:-1], self.out_features)


class RemovedAttention(nn.Module):
    """Replaces an attention module that has no heads left. Like one, it returns (output [..., D], attention weights: None).

    If the output projection is inside the attention module, pass its replacement as `output`; otherwise the output is empty,
    [..., 0]. `rest`: modules that belong to no head (norms of queries and keys), kept so that the checkpoint's names match.
    """

    def __init__(self, rest: dict[str, nn.Module], output_name: str | None = None, output: nn.Module | None = None):
        super().__init__()
        self.output_name = output_name
        for name, module in rest.items():
            self.add_module(name, module.requires_grad_(False))  # it never runs again
        if output_name is not None:
            self.add_module(output_name, output)

    def forward(self, hidden_states: Tensor | None = None, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if hidden_states is None:
            hidden_states = kwargs["query"]  # DistilBERT's name for them in transformers 4
        nothing = hidden_states[..., :0]
        if self.output_name is None:
            return nothing, None
        output: Any = self.get_submodule(self.output_name)
        return output(nothing), None


class SkippedLayer(nn.Module):
    """Replaces a layer that has no units left: returns hidden_states [B, T, D] unchanged.

    Made with `in_place_of`, it is an instance of that layer's class too, by which transformers recognises the layers whose
    hidden states it returns. `path`, `output`: an output projection, of which only the empty weight is left.
    """

    def __init__(self, path: str, output: nn.Module):
        nn.Module.__init__(self)  # not the layer's, which would build all of it
        first, *others = path.split(".")
        for name in reversed(others):
            output = nn.ModuleDict({name: output})
        self.add_module(first, output)

    @classmethod
    def in_place_of(cls, layer: nn.Module, sublayer: SubLayerLayout) -> SkippedLayer:
        """A module that skips `layer`, or `layer` if it does already. `sublayer`: any of its sub-layers."""
        if isinstance(layer, cls):
            return layer
        output = BiasOnly.in_place_of(layer, sublayer.output, keep_bias=False)
        return type(cls.__name__, (cls, type(layer)), {})(sublayer.output.path, output)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if LAYERS_RETURN_TUPLES else hidden_states


def whole_shape(parameter: nn.Parameter) -> list[int]:
    """The sizes of a parameter, also if DeepSpeed's ZeRO-3 has sharded it and left an empty tensor in its place."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def select(parameter: nn.Parameter, index: Tensor, axis: int) -> nn.Parameter:
    """A new parameter with a copy of the slices `index` (int64 [n]) of `parameter` along `axis`.

    While transformers builds a model for DeepSpeed's ZeRO-3, no rank holds a parameter whole. The new one is then sharded
    too, and its values mean nothing until the checkpoint is loaded. Collective in that case.
    """
    sizes = whole_shape(parameter)
    if list(parameter.shape) == sizes:
        data = parameter.detach().index_select(axis, index.to(parameter.device))
        return nn.Parameter(data, requires_grad=parameter.requires_grad)
    sizes[axis] = len(index)
    new = nn.Parameter(parameter.new_empty(sizes), requires_grad=parameter.requires_grad)
    parameter.convert_to_zero_parameters(param_list=[new])  # type: ignore[attr-defined]
    return new


def slice_linear(module: Any, index: Tensor, side: str, axis: int) -> None:
    """Keep only the features `index` (int64 [n]) of an `nn.Linear` or `Conv1D`, in place.

    `axis` is the weight's axis on that `side`. The bias is sliced only if `side` is "out".
    """
    module.weight = select(module.weight, index, axis)
    if side == "out" and module.bias is not None:
        module.bias = select(module.bias, index, 0)
    names = ("out_features", "nf") if side == "out" else ("in_features", "nx")
    for name in names:
        if hasattr(module, name):
            setattr(module, name, len(index))


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def remove_sublayer(layer: nn.Module, sublayer: SubLayerLayout) -> None:
    """Replace a sub-layer that has no units left, in place. What remains is the bias of its output projection."""
    remains = BiasOnly.in_place_of(layer, sublayer.output)
    core = sublayer.core
    if core is None:
        for projection in sublayer.inputs:
            set_submodule(layer, projection.path, RemovedProjection())
        set_submodule(layer, sublayer.output.path, remains)
        return
    gone = {p.path for p in (*sublayer.inputs, sublayer.output)}
    children = layer.get_submodule(core).named_children()
    rest = {name: m for name, m in children if f"{core}.{name}" not in gone and any(True for _ in m.parameters())}
    if sublayer.output.path.startswith(core + "."):
        set_submodule(layer, core, RemovedAttention(rest, sublayer.output.path[len(core) + 1 :], remains))
    else:
        set_submodule(layer, core, RemovedAttention(rest))
        set_submodule(layer, sublayer.output.path, remains)


def update_attributes(layer: nn.Module, sublayer: SubLayerLayout, num_kept: int) -> None:
    """Set the sizes that modules store as attributes to those of `num_kept` units, in place."""
    for attribute in sublayer.attributes:
        module: Any = layer.get_submodule(attribute.path)
        value = attribute.per_unit * num_kept
        if attribute.name.startswith("config."):
            if not isinstance(module.config, LayerConfig):
                module.config = LayerConfig(module.config)
            setattr(module.config, attribute.name[len("config.") :], value)
        else:
            setattr(module, attribute.name, value)


def narrow(model: nn.Module, layout: Layout, kept: list[list[int]]) -> None:
    """Narrow a newly built stock model to `kept[layer][sublayer]` units, in place. Its weights are loaded afterwards."""
    layers: Any = model.get_submodule(layout.layers)
    for number, (layer, counts) in enumerate(zip(layers, kept, strict=True)):
        if layout.skips and not any(counts):
            layers[number] = SkippedLayer.in_place_of(layer, layout.sublayers[-1])
            continue
        for sublayer, count in zip(layout.sublayers, counts, strict=True):
            if count == sublayer.num_units:
                continue
            if count == 0:
                remove_sublayer(layer, sublayer)
                continue
            units = torch.arange(count)
            for p, side in sublayer.sides:
                index = p.indices(units, sublayer.num_units)
                slice_linear(layer.get_submodule(p.path), index, side, p.unit_axis(side))
            update_attributes(layer, sublayer, count)


class _Pruned:
    """Mixin for a stock model class: builds the stock model, then narrows it to `config.pruned_structure`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        structure = config.pruned_structure
        layout = Layout.from_dict(structure["layout"])
        # The path begins with the base model's name, which it has under this head, under another one, or not at all (alone).
        name, _, in_base = layout.layers.partition(".")
        base = getattr(self, name, None) or self.base_model  # type: ignore[attr-defined]
        narrow(base, replace(layout, layers=in_base), structure["kept"])

    def _fix_state_dict_key_on_load(self, key: str) -> tuple[str, bool]:
        """In transformers 4: its own name of a tensor of the file, and whether that differs."""
        if key.startswith("lm_head.") and hasattr(self, "embed_out"):  # GPT-NeoX's head
            return key.replace("lm_head", "embed_out", 1), True
        return super()._fix_state_dict_key_on_load(key)  # type: ignore[misc, no-any-return]

    def _get_static_cache_init_shape(self) -> None:
        """Layers differ in heads: a static cache learns their numbers from the first tokens, not from the configuration."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError if a layer has fewer keys than the cache of `generate_batch` has room for in every layer.

        It would fail at the first token, log that, and return answers without one.
        """
        structure: Any = self.config.pruned_structure  # type: ignore[attr-defined]
        sublayers = Layout.from_dict(structure["layout"]).sublayers
        for counts in structure["kept"]:
            for sublayer, count in zip(sublayers, counts, strict=True):
                if sublayer.has_own_keys and 0 < count < sublayer.num_units:
                    raise NotImplementedError(
                        "continuous batching (generate_batch) needs as many key/value heads in each layer as config.json "
                        "states, and layers of this model have fewer; call generate(), or serve a `uniform` export"
                    )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """What holds for the stock class: transformers reads the file of the class to tell, and this one has no attention."""
        return bool(cls.__mro__[cls.__mro__.index(_Pruned) + 1]._can_set_attn_implementation())  # type: ignore[attr-defined]


def __getattr__(name: str) -> type:
    """Create the class `PrunedX` on first use, for any model class `X` of transformers (PEP 562)."""
    stock = getattr(transformers, name.removeprefix("Pruned"), None) if name.startswith("Pruned") else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    pruned = type(name, (_Pruned, stock), {"__module__": __name__})
    globals()[name] = pruned
    return pruned
