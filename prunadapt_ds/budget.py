"""The global pruning decision: from importance scores to the units that stay. Pure functions: no model, no collectives.

Legend: U units of the whole model in flat order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.structure import Structure, SubLayer, without_layers


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
        """Cost of the blocks with the units kept: parameters ("params"), multiply-accumulates ("macs") or ns ("latency")."""
        return self.structure.cost(budget, map(len, self.kept))

    def sparsity(self, budget: str) -> float:
        """1 - kept / dense over all parameters (or multiply-accumulates, or nanoseconds) of the blocks."""
        return 1 - self.cost(budget) / self.structure.dense_cost(budget)

    @property
    def skipped(self) -> set[int]:
        """Layers that are skipped as a whole: those without units, if the structure skips them."""
        pairs = list(zip(self.structure.sublayers, self.kept, strict=True))
        left = {s.layer for s, kept in pairs if kept}
        return {s.layer for s, _ in pairs} - left if self.structure.skips else set()

    def passed(self) -> Tensor:
        """bool [U], True for units that a masked model computes, including masked ones: False only in skipped layers."""
        passed, skipped = torch.ones(self.structure.num_units, dtype=torch.bool), self.skipped
        for sublayer in self.structure.sublayers:
            passed[sublayer.span] = sublayer.layer not in skipped
        return passed

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


def cut_items(sublayer: SubLayer, scores: Tensor, multiple: int, floor: int) -> tuple[Tensor, Tensor]:
    """The pieces that can be cut from a sub-layer, least important first: single heads or groups of neurons; `floor` units stay.

    Every cut leaves a multiple of `multiple` neurons; if the sub-layer has some other number, the remainder goes first.
    scores: float [units of this sub-layer]. Returns the flat indices of the units that can be cut, int64 [cuttable units],
    and the sizes of the consecutive pieces they form, int64 [pieces]. Equal scores keep the order of their indices.
    """
    order = torch.argsort(scores, stable=True)
    size = multiple if sublayer.kind == "neurons" else 1
    whole, remainder = divmod(sublayer.num_units, size)
    sizes = torch.tensor([remainder] * (remainder > 0) + [size] * whole)
    sizes = sizes[sublayer.num_units - sizes.cumsum(0) >= floor]
    return sublayer.start + order[: int(sizes.sum())], sizes


def decide(
    scores: Tensor,
    structure: Structure,
    sparsity: float,
    *,
    budget: str = "params",
    neuron_multiple: int = 8,
    gone: Tensor | None = None,
    uniform: bool = False,
) -> PruningPlan:
    """Cut the units with the lowest score per cost, over all layers and kinds at once, until the budget is met.

    scores: float [U]. The cost kept differs from `(1 - sparsity) * dense` by at most one item (one head, or one group of
    `neuron_multiple` neurons), unless more than that is gone already. `gone`: bool [U], units that are physically removed and
    cannot come back. Ties break by flat index. Raises UserError, which names the maximum, if `sparsity` is more than can be cut.

    `uniform`: all layers lose the same number of units. An item is then the least important head (or group of neurons) of
    every layer together, and all layers must have the same floors and `counts`; each of these counts is tried. If the
    structure skips layers without units, whole layers go too if less importance is lost that way. Under either restriction
    even the closest plan may miss the target by more than one item.
    """
    scores = scores.detach().double().cpu()
    assert scores.shape == (structure.num_units,) and bool(torch.isfinite(scores).all())
    how: dict[str, Any] = {"budget": budget, "neuron_multiple": neuron_multiple, "uniform": uniform}
    if uniform and (structure.skips or any(s.counts for s in structure.sublayers)):
        most = max_sparsity(structure, budget)
        if sparsity > most + 0.5 / structure.dense_cost(budget):  # costs are integers; less than one is rounding
            raise _too_sparse(sparsity, most)
        absent = torch.zeros(structure.num_units, dtype=torch.bool) if gone is None else gone
        shapes = (_depths if structure.skips else _widths)(scores, structure, sparsity, absent, how)
        return _nearest_of_least_score(shapes, scores, structure, sparsity, how)
    if gone is not None:
        scores = scores.masked_fill(gone, -torch.inf)  # before all others
    pieces = [cut_items(s, scores[s.span], neuron_multiple, s.floor) for s in structure.sublayers]
    flat, sizes = (torch.cat(column) for column in zip(*pieces, strict=True))
    piece_costs = torch.cat([_piece_costs(s, n, budget) for s, (_, n) in zip(structure.sublayers, pieces, strict=True)])
    items, chains = _item_numbers(structure, [len(s) for _, s in pieces], uniform)
    num_items = sum(chains)
    keep = torch.ones(structure.num_units, dtype=torch.bool) if gone is None else ~gone
    dense = structure.dense_cost(budget)
    excess = sparsity * dense  # cost still to be cut
    if not num_items and sparsity > 0:
        raise _too_sparse(sparsity, 0.0)
    if num_items and sparsity > 0:
        owner = items.repeat_interleave(sizes)
        zeros = torch.zeros(num_items, dtype=torch.double)
        item_costs = zeros.scatter_add(0, items, piece_costs.double())  # [items]
        densities = _densities(zeros.scatter_add(0, owner, scores[flat]), item_costs, chains)  # [items]
        order = torch.argsort(densities, stable=True)
        removed = item_costs[order].cumsum(0)
        if excess > removed[-1] + 0.5:  # costs are integers; less than one is rounding of `sparsity * dense`
            raise _too_sparse(sparsity, float(removed[-1]) / dense)
        # The prefix of `order` whose cost is closest to `excess`; on a tie the shorter one.
        candidates = torch.cat([zeros[:1], removed])
        count = int((candidates - excess).abs().argmin())
        count = max(count, int((densities == -torch.inf).sum()))
        is_cut = torch.zeros(num_items, dtype=torch.bool)
        is_cut[order[:count]] = True
        keep[flat[is_cut[owner]]] = False
    return PruningPlan.from_mask(structure, keep)


def _nearest_of_least_score(
    shapes: Iterable[tuple[Structure, Tensor]],
    scores: Tensor,
    structure: Structure,
    sparsity: float,
    how: dict[str, Any],
) -> PruningPlan:
    """The plan that cuts the lowest total score among those within half an item of the target (the first on a tie); if none
    is that close, the closest.

    `shapes`: for each candidate, the structure that was cut item by item, and the units of the whole model it keeps, bool [U].
    """
    budget, wanted = how["budget"], (1 - sparsity) * structure.dense_cost(how["budget"])
    tried: list[tuple[float, float, PruningPlan]] = []
    for rest, keep in shapes:
        plan = PruningPlan.from_mask(structure, keep)
        # By how much it misses the target beyond half an item and 1 for rounding: what is gone may force a larger cut.
        off = max(0.0, abs(plan.cost(budget) - wanted) - _item_cost(rest, how["neuron_multiple"], budget) / 2 - 1)
        tried.append((off, float(scores[~keep].sum()), plan))
    return min(tried, key=lambda one: one[:2])[2]


def _depths(
    scores: Tensor, structure: Structure, sparsity: float, gone: Tensor, how: dict[str, Any]
) -> Iterator[tuple[Structure, Tensor]]:
    """One candidate per depth: drop that many of the least important layers, then cut the others uniformly. See `decide`."""
    budget = how["budget"]
    owners = torch.cat([torch.full((s.num_units,), s.layer) for s in structure.sublayers])
    layers = sorted({s.layer for s in structure.sublayers})
    absent = {layer for layer in layers if bool(gone[owners == layer].all())}
    order = sorted(layers, key=lambda layer: (layer not in absent, float(scores[owners == layer].sum()), layer))
    wanted = (1 - sparsity) * structure.dense_cost(budget)
    for depth in range(len(absent), len(layers)):
        rest, mine = without_layers(structure, order[:depth])
        dense = rest.dense_cost(budget)
        inside = min(max(0.0, 1 - wanted / dense), max_sparsity(rest, budget))
        keep = torch.zeros_like(gone)
        keep[mine] = decide(scores[mine], rest, inside, gone=gone[mine], **how).mask()
        yield rest, keep
        if dense < wanted:
            break


def _widths(
    scores: Tensor, structure: Structure, sparsity: float, gone: Tensor, how: dict[str, Any]
) -> Iterator[tuple[Structure, Tensor]]:
    """One candidate per allowed count: cut the limited sub-layers to it, and the others to meet the budget. See `decide`."""
    limited = [s for s in structure.sublayers if s.counts]
    present = min(s.num_units - int(gone[s.span].sum()) for s in limited)
    for count in (count for count in reversed(limited[0].counts) if count <= present):
        shut = gone.clone()
        for s in limited:
            ranked = torch.argsort(scores[s.span].masked_fill(gone[s.span], -torch.inf), stable=True)
            shut[s.start + ranked[: s.num_units - count]] = True
        sublayers = (replace(s, floor=count, counts=()) if s.counts else s for s in structure.sublayers)
        rest = replace(structure, sublayers=tuple(sublayers))
        inside = min(sparsity, max_sparsity(rest, how["budget"]))
        yield rest, decide(scores, rest, inside, gone=shut, **how).mask()


def _item_cost(structure: Structure, neuron_multiple: int, budget: str) -> int:
    """What the first item of a uniform cut saves, a head or a group of neurons of every layer: whichever kind saves more."""
    saved: dict[str, int] = {}
    for s in structure.sublayers:
        if s.num_units > s.floor:
            size = min(neuron_multiple, s.num_units - s.floor) if s.kind == "neurons" else 1
            saved[s.kind] = saved.get(s.kind, 0) + s.cost(budget, s.num_units) - s.cost(budget, s.num_units - size)
    return max(saved.values(), default=0)


def _piece_costs(sublayer: SubLayer, sizes: Tensor, budget: str) -> Tensor:
    """What each piece of a sub-layer saves once those before it are gone: int64 [pieces]. `sizes`: units of each piece."""
    left = sublayer.num_units - torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])  # before the first cut, after each
    return -sublayer.costs(budget)[left].diff()


def _densities(scores: Tensor, costs: Tensor, chains: list[int]) -> Tensor:
    """Score per cost by which items are ranked: float [items], never falling within a chain.

    scores, costs: float [items]. `chains`: lengths of the runs of items that can only be cut in order. If an item saves more
    for its score than those before it (measured times fall in steps), they are pooled to one value: at any threshold, the
    items below it are then the choice that loses the least score for what it saves. Nothing is pooled if costs are
    proportional to the number of units.
    """
    # Costs are integers, so an item that saves nothing is ranked far behind the others; with a score of 0 it loses nothing either.
    costs = costs.clamp(min=1e-6)
    densities = scores / costs
    for chain, cost in zip(densities.split(chains), costs.split(chains), strict=True):  # views
        there = chain > -torch.inf
        if bool((chain[there].diff() < 0).any()):
            chain[there] = torch.from_numpy(isotonic_regression(chain[there].numpy(), weights=cost[there].numpy()).x)
    return densities


def _item_numbers(structure: Structure, counts: list[int], uniform: bool) -> tuple[Tensor, list[int]]:
    """The item that each piece belongs to, int64 [pieces], and the lengths of the chains of items that are cut in order.

    `counts`: number of pieces of each sub-layer. Each piece is an item and each sub-layer a chain; with `uniform`, the n-th
    pieces of all sub-layers of a kind form one item, and each kind is a chain.
    """
    if not uniform:
        return torch.arange(sum(counts)), counts
    chains: dict[str, int] = {}
    start: dict[str, int] = {}
    numbers = []
    for sublayer, count in zip(structure.sublayers, counts, strict=True):
        if sublayer.kind not in start:
            start[sublayer.kind], chains[sublayer.kind] = sum(chains.values()), count
        numbers.append(start[sublayer.kind] + torch.arange(count))
    assert all(n == chains[s.kind] for s, n in zip(structure.sublayers, counts, strict=True)), (
        "layers differ in what may be cut"
    )
    return torch.cat(numbers), list(chains.values())


def max_sparsity(structure: Structure, budget: str) -> float:
    """The highest sparsity that can be reached: every sub-layer at its floor or, if layers may be skipped, all but one skipped."""
    first = structure.sublayers[0].layer
    fewest = (s.floor if s.layer == first or not structure.skips else 0 for s in structure.sublayers)
    return 1 - structure.cost(budget, fewest) / structure.dense_cost(budget)


def check_target(structure: Structure, target: float, budget: str, speedup: float | None = None) -> None:
    """Raise UserError if `target` is more than can be cut: before training, not at the last decision.

    `speedup`: the value the user gave, if the sparsity was derived from it.
    """
    most = max_sparsity(structure, budget)
    if target <= most:
        return
    if speedup is None:
        raise _too_sparse(target, most)
    remedy = f"more than can be cut from this model; at most {_rounded_down(1 / (1 - most), 2)} by the block times measured here"
    raise UserError(Problem("target_speedup", speedup, remedy))


def _too_sparse(sparsity: float, maximum: float) -> UserError:
    return UserError(
        Problem(
            "target_sparsity", sparsity, f"more than can be cut from this model; at most {_rounded_down(maximum, 4)}"
        )
    )


def _rounded_down(maximum: float, digits: int) -> str:
    """A maximum as text: rounded up, it would be refused in turn."""
    return f"{math.floor(maximum * 10**digits) / 10**digits:.{digits}f}"
