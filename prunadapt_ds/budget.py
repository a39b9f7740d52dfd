"""From importance scores to the units that stay: the global decision. Pure functions: no model, no collectives.

Legend: U units of the whole model in flat order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.structure import Structure, SubLayer


@dataclass(frozen=True)
class PruningPlan:
    """Which units of each sub-layer stay: sorted indices into the source checkpoint, in flat sub-layer order."""

    structure: Structure
    kept: tuple[tuple[int, ...], ...]

    @classmethod
    def dense(cls, structure: Structure) -> PruningPlan:
        return cls(structure, tuple(tuple(range(s.num_units)) for s in structure.sublayers))

    @classmethod
    def from_mask(cls, structure: Structure, mask: Tensor) -> PruningPlan:
        """`mask`: bool [U], True where a unit stays."""
        spans = (mask[s.span] for s in structure.sublayers)
        return cls(structure, tuple(tuple(span.nonzero().flatten().tolist()) for span in spans))

    def mask(self) -> Tensor:
        """bool [U], True where a unit stays."""
        mask = torch.zeros(self.structure.num_units, dtype=torch.bool)
        for sublayer, kept in zip(self.structure.sublayers, self.kept, strict=True):
            mask[sublayer.start + torch.tensor(kept, dtype=torch.long)] = True
        return mask

    def cost(self, budget: str) -> int:
        """Parameters or multiply-accumulates of the blocks that remain."""
        return self.structure.fixed_cost(budget) + int(self.structure.unit_costs(budget)[self.mask()].sum())

    def sparsity(self, budget: str) -> float:
        """1 - kept / dense over all parameters (or multiply-accumulates) of the blocks."""
        return 1 - self.cost(budget) / self.structure.dense_cost(budget)

    def counts(self) -> list[dict[str, int]]:
        """Units kept per layer: [{"layer", "heads", "neurons"}]."""
        rows: dict[int, dict[str, int]] = {}
        for sublayer, kept in zip(self.structure.sublayers, self.kept, strict=True):
            rows.setdefault(sublayer.layer, {"layer": sublayer.layer})[sublayer.kind] = len(kept)
        return list(rows.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "units": [
                {"layer": s.layer, "kind": s.kind, "dense": s.num_units, "kept": list(kept)}
                for s, kept in zip(self.structure.sublayers, self.kept, strict=True)
            ]
        }

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON (sorted keys, no spaces)."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def neuron_groups(order: Tensor, multiple: int) -> list[Tensor]:
    """Split neurons, worst first, into the groups they are cut in, so that every cut leaves a multiple of `multiple`.

    A layer whose size is no multiple loses the remainder first.
    """
    remainder = len(order) % multiple
    head = [order[:remainder]] if remainder else []
    return head + list(order[remainder:].split(multiple))


def cut_items(sublayer: SubLayer, scores: Tensor, multiple: int, floor: int) -> list[Tensor]:
    """The pieces in which a sub-layer is cut: heads one by one, neurons in groups, worst first; `floor` units stay.

    scores: float [units of this sub-layer]. Returns flat indices. Equal scores keep the order of their indices.
    """
    order = torch.argsort(scores, stable=True)
    items = neuron_groups(order, multiple) if sublayer.kind == "neurons" else list(order.split(1))
    left = sublayer.num_units
    cuttable = []
    for item in items:
        left -= len(item)
        if left < floor:
            break
        cuttable.append(sublayer.start + item)
    return cuttable


def decide(
    scores: Tensor,
    structure: Structure,
    sparsity: float,
    *,
    budget: str = "params",
    neuron_multiple: int = 8,
    floors: Mapping[tuple[int, str], int] | None = None,
    gone: Tensor | None = None,
) -> PruningPlan:
    """Cut the units with the least score per cost, over all layers and kinds at once, until the budget is met.

    scores: float [U]. The cost kept differs from `(1 - sparsity) * dense` by at most one item (one head, or one group of
    `neuron_multiple` neurons). `floors`: least units left of a (layer, kind). `gone`: bool [U], units that are physically
    removed already and cannot come back. Ties break by flat index.
    Raises UserError when `sparsity` is more than can be cut, naming the maximum.
    """
    scores = scores.detach().double().cpu()
    assert scores.shape == (structure.num_units,) and bool(torch.isfinite(scores).all())
    if gone is not None:
        scores = scores.masked_fill(gone, -torch.inf)  # before all others
    unit_costs = structure.unit_costs(budget)
    items: list[Tensor] = []
    for sublayer in structure.sublayers:
        floor = (floors or {}).get((sublayer.layer, sublayer.kind), 0)
        items += cut_items(sublayer, scores[sublayer.span], neuron_multiple, floor)

    keep = torch.ones(structure.num_units, dtype=torch.bool)
    dense = structure.dense_cost(budget)
    excess = sparsity * dense  # cost still to be cut
    if not items and sparsity > 0:
        raise _too_sparse(sparsity, 0.0)
    if items and sparsity > 0:
        flat, sizes = torch.cat(items), torch.tensor([len(item) for item in items])
        owner = torch.arange(len(items)).repeat_interleave(sizes)
        zeros = torch.zeros(len(items), dtype=torch.double)
        item_costs = zeros.scatter_add(0, owner, unit_costs[flat].double())  # [items]
        densities = zeros.scatter_add(0, owner, scores[flat]) / item_costs  # [items]
        order = torch.argsort(densities, stable=True)
        removed = item_costs[order].cumsum(0)
        if excess > removed[-1] + 0.5:  # costs are whole numbers; less than one is the rounding of `sparsity * dense`
            raise _too_sparse(sparsity, float(removed[-1]) / dense)
        # The prefix whose cost is nearest to what must go; of two equally near ones the shorter.
        candidates = torch.cat([zeros[:1], removed])
        count = int((candidates - excess).abs().argmin())
        count = max(count, int((densities == -torch.inf).sum()))
        cut = torch.isin(owner, order[:count])
        keep[flat[cut]] = False
    return PruningPlan.from_mask(structure, keep)


def max_sparsity(structure: Structure, budget: str) -> float:
    """The sparsity at which every unit is gone."""
    return 1 - structure.fixed_cost(budget) / structure.dense_cost(budget)


def _too_sparse(sparsity: float, maximum: float) -> UserError:
    return UserError(
        Problem("target_sparsity", sparsity, f"more than can be cut from this model; at most {maximum:.4f}")
    )
