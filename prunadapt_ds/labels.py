"""Class names: a model may have a task's classes in another order, or under other names.

Legend: N rows, C classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunadapt_ds.backbone import Backbone, class_names
from prunadapt_ds.engine import gathered
from prunadapt_ds.models.structure import full_shape

FILE = "labels.json"  # in an adapter's folder, whose other files lack class names


def of_outputs(config: Any) -> list[tuple[str, ...]]:
    """What a classifier's labels may be called in data for it, the likelier last: its class names, or their numbers if these
    are names that nobody gave. [()] for regression.
    """
    if config.num_labels == 1:
        return [()]
    names = class_names(config)
    return [names, tuple(map(str, range(len(names))))] if _are_generic(names) else [names]


def _are_generic(names: Sequence[str]) -> bool:
    """Whether they are the names that transformers gives to classes without any."""
    return all(re.fullmatch(r"label_\d+", name, re.IGNORECASE) for name in names)


def columns(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """The position of each of our classes among theirs, ignoring case; None if the two do not have the same names."""
    places = {name.casefold(): i for i, name in enumerate(theirs)}
    if not len(places) == len(theirs) == len(ours) or places.keys() != {name.casefold() for name in ours}:
        return None
    return [places[name.casefold()] for name in ours]


def in_order(logits: Tensor, theirs: Sequence[str], ours: Sequence[str]) -> Tensor:
    """Reorder columns from `theirs` to `ours` if both name the same classes, else leave them: [N, C] -> [N, C]."""
    found = columns(theirs, ours)
    return logits if found is None else logits[:, found]


def doubt(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """A warning if a model's classes have names that are not ours, so that nobody can tell which is which; else empty."""
    if not ours or columns(theirs, ours) is not None or _are_generic(theirs):
        return ""
    return f"calls its classes {', '.join(theirs)}; they are mapped in this order to {', '.join(ours)}"


def write(config: Any, folder: Path) -> None:
    """Write the names of a configuration's classes to an adapter's folder."""
    (folder / FILE).write_text(json.dumps(class_names(config), indent=1) + "\n", encoding="utf-8")


def stored(folder: Path) -> tuple[str, ...]:
    """The class names that the adapter in `folder` was trained with; () if it has none. Raises ValueError for something else."""
    file = folder / FILE
    names = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{FILE} is not a list of class names")
    return tuple(names)


def read(config: Any, folder: Path) -> None:
    """Give a base model's configuration the class names that the adapter in `folder` was trained with, if it has them.

    Raises ValueError if they do not fit the configuration's number of classes.
    """
    names = stored(folder)
    if not names:
        return
    if len(names) != config.num_labels:
        raise ValueError(f"{FILE} does not name the {config.num_labels} classes")
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def are_ours_elsewhere(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether both name the same classes, in different orders."""
    order = columns(theirs, ours)
    return order is not None and order != sorted(order)


def reorder_head(backbone: Backbone, theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Move the rows of a head that knows our classes in the order `theirs`; returns whether that was another. Collective.

    Such a head would otherwise start out worse than a new one.
    """
    order = columns(theirs, ours)
    if order is None or order == sorted(order):
        return False
    module = [m for m in task_head_linears(backbone) if full_shape(m.weight)[0] == len(order)][-1]
    parameters: list[Any] = [p for p in (module.weight, module.bias) if p is not None]
    with torch.no_grad(), gathered(parameters, write_from=0):
        for parameter in parameters:
            if parameter.numel():
                parameter.copy_(parameter[order].clone())
    return True


def task_head_linears(backbone: Backbone) -> list[Any]:
    """The linear modules of the task head, in the model's order."""
    inside = tuple(f"{name}." for name in backbone.family.task_head)
    modules = backbone.model.named_modules()
    return [m for name, m in modules if isinstance(m, nn.Linear) and f"{name}.".startswith(inside)]
