"""Per-layer widths for stock `transformers` models.

This file lives twice: in the trainer, which cuts trained models with it, and beside the weights of every exported
folder, where `auto_map` points at it. It therefore needs torch and transformers only.

Legend: U units of a sub-layer (attention heads, key/value groups or feed-forward neurons), W width of a unit.

A projection stores unit u in one or several consecutive blocks ("parts"). With part widths (w0, w1, ...) and U units,
part p occupies U * wp rows and unit u the rows  U * (w0 + ... + w[p-1]) + u * wp + [0, wp):

    separate query          parts = (head_dim,)                 fused [q | k | v]     parts = (head_dim,) * 3
    interleaved q,k,v       parts = (3 * head_dim,)             grouped [q | k | v]   parts = (group * head_dim, head_dim, head_dim)

Behind them may lie `tail` rows that belong to no unit and always stay (the shared key and value of multi-query attention).
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# In transformers 4 the layers that can be skipped return tuples.
LAYERS_RETURN_TUPLES = int(transformers.__version__.partition(".")[0]) < 5


@dataclass(frozen=True)
class ProjectionLayout:
    """Where the units of one linear map lie. `path` is the module below the layer, `parts` the widths per unit."""

    path: str
    parts: tuple[int, ...]
    transposed: bool = False  # weight is [in, out] (GPT-2's Conv1D) instead of [out, in]
    tail: int = 0  # rows behind the units' that always stay
    per_token: bool = True  # runs on tokens; not, where it runs on positions that a batch shares

    def unit_axis(self, side: str) -> int:
        """The axis of the weight along which units lie: `side` is "out" (they are outputs) or "in"."""
        return int((side == "in") != self.transposed)

    def indices(self, kept: Tensor, num_units: int) -> Tensor:
        """Rows (or columns) of the units `kept` [K] out of `num_units`: int64 [K * sum(parts) + tail], part after part."""
        blocks, offset = [], 0
        for width in self.parts:
            blocks.append((offset + kept[:, None] * width + torch.arange(width)).flatten())
            offset += num_units * width
        return torch.cat([*blocks, torch.arange(offset, offset + self.tail)])


@dataclass(frozen=True)
class AttributeLayout:
    """A number that a module keeps about its units and that must follow them: `per_unit` times the units kept.

    `name` may be "config.<field>": the module then gets a configuration of its own.
    """

    path: str
    name: str
    per_unit: int


@dataclass(frozen=True)
class SubLayerLayout:
    """One prunable sub-layer: its units are outputs of `inputs` and inputs of `output`."""

    kind: str  # "heads" or "neurons"
    num_units: int
    inputs: tuple[ProjectionLayout, ...]
    output: ProjectionLayout
    core: str | None = None  # module that cannot run without units and is replaced when none is left
    attributes: tuple[AttributeLayout, ...] = ()
    floors: tuple[int, ...] = ()  # units that must stay, by layer; none where empty
    relative_positions: int = 0  # positions with which heads are compared beside the tokens

    @property
    def width(self) -> int:
        """Features of one unit at the input of the output projection."""
        return sum(self.output.parts)

    @property
    def sides(self) -> tuple[tuple[ProjectionLayout, str], ...]:
        """Every projection, and whether the units are what goes "out" of it or comes "in"."""
        return (*((p, "out") for p in self.inputs), (self.output, "in"))


@dataclass(frozen=True)
class Layout:
    """Where the prunable units of a model are: `layers` is the path of its list of blocks."""

    layers: str
    num_layers: int
    sublayers: tuple[SubLayerLayout, ...]
    passes: int = 1  # how often each block runs, where layers share their weights
    skips: bool = False  # a layer without any unit is skipped, its norms and biases too; else those stay

    @property
    def places(self) -> list[tuple[int, SubLayerLayout]]:
        """Every sub-layer of the model with its layer's number, in the flat order of units."""
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


class RemovedProjection(nn.Module):
    """Stands where an input projection was whose units are all gone: [..., D] -> [..., 0]."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :0]


class BiasOnly(nn.Module):
    """Stands where an output projection was whose units are all gone: its bias remains. [..., 0] -> [..., D]."""

    bias: nn.Parameter | None

    def __init__(self, out_features: int, bias: nn.Parameter | None):
        super().__init__()
        self.out_features = out_features
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        return self.bias.to(x.dtype).expand(*x.shape[:-1], self.out_features)


class RemovedAttention(nn.Module):
    """Stands where attention was whose heads are all gone. Returns (output, no weights), as attention modules do.

    `rest`: modules that no unit owns (norms of queries and keys). They are few and keep their names and values.
    """

    def __init__(self, rest: dict[str, nn.Module], output_name: str | None = None, output: nn.Module | None = None):
        super().__init__()
        self.output_name = output_name
        for name, module in rest.items():
            self.add_module(name, module.requires_grad_(False))  # nothing reads it any more
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
    """Stands where a layer was that is skipped: its output is its input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if LAYERS_RETURN_TUPLES else hidden_states


def select(parameter: nn.Parameter, index: Tensor, axis: int) -> nn.Parameter:
    """A parameter that holds the slices `index` of `parameter` along `axis`, in memory of its own."""
    data = parameter.detach().index_select(axis, index.to(parameter.device))
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def slice_linear(module: Any, index: Tensor, side: str, axis: int) -> None:
    """Keep the features `index` of an `nn.Linear` or `Conv1D`, in place. A bias follows its outputs only."""
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
    """Replace a sub-layer that has no units left by what remains of it: the bias of its output projection."""
    output: Any = layer.get_submodule(sublayer.output.path)
    output = getattr(output, "base_layer", output)
    axis = 1 - sublayer.output.unit_axis("in")
    remains = BiasOnly(output.weight.shape[axis], output.bias)
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
    """Let the numbers that modules keep about their units follow the units."""
    for attribute in sublayer.attributes:
        module, value = layer.get_submodule(attribute.path), attribute.per_unit * num_kept
        if attribute.name.startswith("config."):
            module.config = copy.deepcopy(module.config)
            setattr(module.config, attribute.name[len("config.") :], value)
        else:
            setattr(module, attribute.name, value)


def narrow(model: nn.Module, layout: Layout, kept: list[list[int]]) -> None:
    """Give a freshly built stock model the widths `kept[layer][sublayer]`, in place. Values are loaded afterwards."""
    layers: Any = model.get_submodule(layout.layers)
    for number, (layer, counts) in enumerate(zip(layers, kept, strict=True)):
        if layout.skips and not any(counts):
            layers[number] = SkippedLayer()
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
    """Mixed into a stock model class: builds the stock model, then narrows it to `config.pruned_structure`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        structure = config.pruned_structure
        narrow(self, Layout.from_dict(structure["layout"]), structure["kept"])  # type: ignore[arg-type]


def __getattr__(name: str) -> type:
    """`PrunedX` is the stock class `X` with per-layer widths, for any `X` of transformers (PEP 562)."""
    stock = getattr(transformers, name.removeprefix("Pruned"), None) if name.startswith("Pruned") else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    pruned = type(name, (_Pruned, stock), {"__module__": __name__})
    globals()[name] = pruned
    return pruned
