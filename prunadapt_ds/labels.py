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


def of_outputs(config: Any) -> tuple[str, ...]:
    """What a classifier's labels are called in data for it: its class names, or their numbers if it has none; () for regression."""
    if config.num_labels == 1:
        return ()
    names = class_names(config)
    return tuple(map(str, range(len(names)))) if _are_generic(names) else names


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


def read(config: Any, folder: Path) -> None:
    """Give a base model's configuration the class names that the adapter in `folder` was trained with, if it has them.

    Raises ValueError if they do not fit the configuration's number of classes.
    """
    file = folder / FILE
    if not file.is_file():
        return
    names = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(names, list) or len(names) != config.num_labels or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{FILE} does not name the {config.num_labels} classes")
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def reorder_head(backbone: Backbone, ours: Sequence[str]) -> None:
    """Move the rows of a head that came with the model to the order of our classes. Collective.

    A head that knows the same classes in another order would otherwise start out worse than a new one.
    """
    order = columns(backbone.known_classes, ours)
    if order is None or order == sorted(order):
        return
    module = [m for m in task_head_linears(backbone) if full_shape(m.weight)[0] == len(order)][-1]
    parameters: list[Any] = [p for p in (module.weight, module.bias) if p is not None]
    with torch.no_grad(), gathered(parameters, write_from=0):
        for parameter in parameters:
            if parameter.numel():
                parameter.copy_(parameter[order].clone())
    backbone.notes.append(
        f"its head knew the classes as {', '.join(backbone.known_classes)}, and was reordered to match the task"
    )


def task_head_linears(backbone: Backbone) -> list[Any]:
    """The linear modules of the task head, in the model's order."""
    inside = tuple(f"{name}." for name in backbone.family.task_head)
    modules = backbone.model.named_modules()
    return [m for name, m in modules if isinstance(m, nn.Linear) and f"{name}.".startswith(inside)]
