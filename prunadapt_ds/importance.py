"""Importance of units for the task: what the gates record, how it is summed over ranks, and the criteria that score it.

Legend: B samples of a micro-batch, T tokens, U units of the whole model in flat order, K units of one gate, W width of a unit,
S statistics. d[b,u] is the gradient of sample b's own loss with respect to the mask of unit u (see gates.py).

Every sample counts once and with its own loss at weight 1, whatever the micro-batch size, gradient accumulation or number
of ranks: the recorder divides out the coefficient with which autograd saw each sample's loss. Every d[b,u] is completed and
then squared on the rank that holds the sample; ranks add only sums over samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunadapt_ds.distributed import dist_sum, on_rank_0
from prunadapt_ds.files import whole_path

BACKWARD = ("grad_sq", "grad_abs")
FORWARD = {"activation_abs": 1, "activation_sq": 2, "activation_4th": 4}  # the power of |x| that each averages
STATISTICS = (*BACKWARD, *FORWARD)


@dataclass(frozen=True)
class WindowSums:
    """Sums over the samples of a decision window, over all ranks: each statistic float32 [U], and the sample count.

    grad_sq: sum_b d[b,u]^2.  grad_abs: sum_b |d[b,u]|.  activation_abs, activation_sq, activation_4th: sum_b of the mean
    |x|, |x|^2, |x|^4 over the real tokens and the width of the unit, at the gate's input. seed: of the run, for `random`.
    """

    sums: dict[str, Tensor]
    count: float
    seed: int = 0

    def mean(self, statistic: str) -> Tensor:
        """The mean of a statistic over the samples: float32 [U]."""
        return self.sums[statistic] / self.count


def save_sums(window: WindowSums, folder: Path, step: int, samples: list[int]) -> None:
    """Write <step>.safetensors in `folder`: the raw sums [U] of every statistic, the count, and the ids of the samples.

    Rank 0 writes. Collective; raises PrunadaptError on all ranks if it cannot, for example because the disk is full.
    """
    tensors = {name: window.sums[name].clone() for name in STATISTICS}
    tensors |= {"count": torch.tensor([window.count]), "sample_ids": torch.tensor(samples)}

    def write() -> None:
        with whole_path(folder / f"{step}.safetensors") as unfinished:
            save_file(tensors, unfinished)

    on_rank_0(f"writing the statistics to {folder}", write)


@dataclass(frozen=True)
class Criterion:
    """`score(window)` gives one float per unit [U], larger = more important; `reads` names the statistics it needs."""

    name: str
    reads: tuple[str, ...]
    score: Callable[[WindowSums], Tensor]


CRITERIA: dict[str, Criterion] = {}


def criterion(*reads: str) -> Callable[[Callable[[WindowSums], Tensor]], Callable[[WindowSums], Tensor]]:
    """Register a criterion under its function's name; `reads` names the statistics it needs.

    The name must also go into `config.CRITERION_NAMES`, the choices of --criterion: config.py must not import torch, so it
    cannot read `CRITERIA`. Raises ValueError if the name is taken or a statistic is not recorded.
    """

    def register(function: Callable[[WindowSums], Tensor]) -> Callable[[WindowSums], Tensor]:
        name = function.__name__
        if name in CRITERIA:
            raise ValueError(f"criterion {name!r} is registered already")
        if unknown := set(reads) - set(STATISTICS):
            raise ValueError(f"criterion {name!r} reads {sorted(unknown)}, which are not among {STATISTICS}")
        CRITERIA[name] = Criterion(name, reads, function)
        return function

    return register


@criterion("grad_sq")
def fisher(window: WindowSums) -> Tensor:
    """Diagonal empirical Fisher information of the mask: mean over samples of d^2 (Kwon et al., arXiv 2204.09656)."""
    return window.mean("grad_sq")


@criterion("grad_abs")
def taylor(window: WindowSums) -> Tensor:
    """First-order effect of removing a unit: mean over samples of |d| (Molchanov et al., arXiv 1906.10771)."""
    return window.mean("grad_abs")


@criterion("activation_abs")
def magnitude(window: WindowSums) -> Tensor:
    """Mean |x| of the unit over real tokens; no gradient. A baseline that others have to beat."""
    return window.mean("activation_abs")


@criterion("activation_sq")
def activation_norm(window: WindowSums) -> Tensor:
    """Root of the mean x^2 over real tokens; no gradient. The input norm in Wanda (Sun et al., arXiv 2306.11695)."""
    return window.mean("activation_sq").sqrt()


@criterion("grad_abs", "activation_sq", "activation_4th")
def outlier(window: WindowSums) -> Tensor:
    """`taylor` times the root of the activations' kurtosis E[x^4] / E[x^2]^2, which favours units with outliers.

    APT (Zhao et al., arXiv 2401.12200) adds that root to a salience of another scale; here it multiplies, because heads and
    neurons are compared by score per cost, and in a sum the term with the larger scale alone would decide.
    """
    fourth, square = window.mean("activation_4th"), window.mean("activation_sq")
    kurtosis = fourth / square.square().clamp(min=torch.finfo(torch.float32).tiny)
    return window.mean("grad_abs") * torch.where(square > 0, kurtosis, 1.0).sqrt()


@criterion()
def random(window: WindowSums) -> Tensor:
    """Uniform noise, the same on every rank and at every decision of a run."""
    num_units = next(iter(window.sums.values())).numel()
    return torch.rand(num_units, generator=torch.Generator().manual_seed(window.seed))


class Recorder:
    """Collects the gates' per-sample statistics on one rank.

    For each micro-batch: `begin`, forward, backward, `end`. A gate may contribute to a sample more than once (chunked
    feed-forwards, layers that share weights); the contributions are added before they are squared.
    """

    def __init__(self, num_units: int, *, activations: bool, device: torch.device | str = "cpu", seed: int = 0):
        self.num_units, self.device, self.seed = num_units, torch.device(device), seed
        self.activations = activations
        self.active = False
        self._present: Tensor | None = None  # bool [U of the dense model]; None: all exist
        self._sums = torch.zeros(len(STATISTICS), num_units, device=self.device)
        self._count = torch.zeros(1, device=self.device)
        self._d: Tensor | None = None  # [B, U], still times the coefficients
        self._a: Tensor | None = None  # [forward statistics, B, U]
        self._coefficients: Tensor | None = None  # [B]
        self._token_mask: Tensor | None = None  # [B, T]
        self._tokens_seen: dict[int, int] = {}  # by a gate's start, in this forward pass

    def narrow(self, present: Tensor) -> None:
        """From now on record only the units in `present`, bool [U of the dense model]. The window must be empty."""
        self._present = present
        self.num_units = int(present.sum())
        self._sums = torch.zeros(len(STATISTICS), self.num_units, device=self.device)

    def capture(self) -> Tensor:
        """This rank's sums since the last decision: float32 [S * U + 1], the sample count last."""
        return torch.cat([self._sums.flatten(), self._count])

    def restore(self, flat: Tensor) -> None:
        """Continue from sums that `capture` returned: this rank's own or, on one rank only, the total of all ranks."""
        self._sums = flat[:-1].view(len(STATISTICS), self.num_units).to(self.device)
        self._count = flat[-1:].to(self.device)

    def begin(self, coefficients: Tensor, attention_mask: Tensor) -> None:
        """Start a micro-batch.

        coefficients: float [B], the factors c_b in the sum_b c_b * L_b that autograd differentiates; 0 marks a placeholder
        row. attention_mask: [B, T], 1 for real tokens.
        """
        size = len(coefficients)
        self.active = True
        self._coefficients, self._token_mask = coefficients.float(), attention_mask
        self._tokens_seen = {}
        self._d = torch.zeros(size, self.num_units, device=self.device)
        self._a = torch.zeros(len(FORWARD), size, self.num_units, device=self.device) if self.activations else None

    @property
    def batch_size(self) -> int:
        """Rows of the current micro-batch, B."""
        assert self._coefficients is not None
        return len(self._coefficients)

    def add(self, start: int, d: Tensor) -> None:
        """Add a gate's contribution d, float [B, K], not yet divided by the coefficients. start: the gate's first unit."""
        assert self._d is not None
        self._d[:, start : start + d.shape[1]] += d

    @property
    def wants_activations(self) -> bool:
        """Whether this forward pass counts: a recomputation under gradient checkpointing does not."""
        recomputing = torch._C._current_graph_task_id() != -1
        return self.active and self.activations and not recomputing

    def add_activations(self, start: int, x: Tensor) -> None:
        """Add the means of powers of |x| over real tokens and width. x: [B, T, K, W]; T may be just the next chunk of tokens."""
        assert self._a is not None and self._token_mask is not None
        mask = self._token_mask.to(torch.float32)  # [B, all tokens]
        first = self._tokens_seen.get(start, 0) % mask.shape[1]  # a block that runs again (shared weights) starts over
        self._tokens_seen[start] = first + x.shape[1]
        chunk = mask[:, first : first + x.shape[1]]  # [B, T]
        tokens = mask.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
        magnitude = x.abs().float()
        for sums, power in zip(self._a, FORWARD.values(), strict=True):
            per_token = (magnitude if power == 1 else magnitude**power).mean(dim=3)  # [B, T, K]
            sums[:, start : start + x.shape[2]] += torch.einsum("btu,bt->bu", per_token, chunk) / tokens

    def end(self) -> None:
        """Finish a micro-batch: undo the coefficients and add its samples to the window."""
        assert self._d is not None and self._coefficients is not None
        real = self._coefficients > 0  # [B]
        inverse = torch.where(real, 1 / self._coefficients.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
        d = self._d * inverse[:, None]
        self._sums[0] += d.square().sum(0)
        self._sums[1] += d.abs().sum(0)
        if self._a is not None:
            self._sums[len(BACKWARD) :] += (self._a * real[:, None]).sum(1)
        self._count += real.sum()
        self._d = self._a = self._coefficients = self._token_mask = None
        self.active = False

    def all_reduce(self) -> WindowSums:
        """Add up the sums of all ranks since the last call, in ONE collective, and start an empty window.

        They are always those of the dense model's units [U]; units that are physically gone have zeros.
        """
        flat = dist_sum(self.capture()).cpu()
        self._sums.zero_()
        self._count.zero_()
        sums = flat[:-1].view(len(STATISTICS), self.num_units)
        if self._present is not None:
            sums = torch.zeros(len(STATISTICS), len(self._present)).masked_scatter_(
                self._present.expand(len(STATISTICS), -1), sums
            )
        return WindowSums(dict(zip(STATISTICS, sums, strict=True)), float(flat[-1]), self.seed)


@dataclass
class ScoreAverage:
    """Exponential moving average of scores over decision windows; with decay 0, only the newest window counts."""

    decay: float
    value: Tensor | None = None

    def update(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Add a window's scores, float [U], and return the average. seen: bool [U]; unseen units keep their average."""
        if self.value is not None:
            scores = torch.where(seen, self.decay * self.value + (1 - self.decay) * scores, self.value)
        self.value = scores
        return scores
