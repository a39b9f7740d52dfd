"""Batches: every optimizer step has the same samples, however it is split over ranks and micro-batches.

Legend: N samples, B rows of a micro-batch, T tokens, G = world_size * accumulation * B samples of a whole optimizer step.

The order of an epoch depends on the seed, the epoch and, if samples are grouped by length, on G, but never on how a step
is split. A step takes the next G samples of that order; micro-batch m of rank r takes chunk m * world_size + r of them.
The last step of an epoch may be short: its rows then have larger weights, so that the loss is still the mean over the
step's samples, and a rank left without samples runs one row with weight zero, so that no collective waits for it.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.structure import full_shape

PAD_TO_MULTIPLE_OF = 8
GROUPED_STEPS = 8  # steps sorted by length together: enough to save padding, few enough to keep the order random


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    inputs: model inputs [B, T].  labels: [B], or [B, T] for language models.  index: int64 [B], positions in the `Rows`.
    weights: float [B]; the loss of the micro-batch is sum_b weights[b] * L_b, whose mean over ranks and accumulation steps
    is the mean loss of the step's samples. A row of weight 0 is a placeholder, not a sample.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    index: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Batch:
        moved = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        labels, weights = (part.to(device, non_blocking=True) for part in (self.labels, self.weights))
        return Batch(moved, labels, self.index, weights)


@dataclass(frozen=True)
class Ragged:
    """Rows of integers, of varying length, in one array: 4 bytes per integer, where lists would hold an object for most of them.

    values: int32 [sum of all lengths].  starts, lengths: int64 [N].
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @staticmethod
    def of(column: Any) -> Ragged:
        """Flatten an Arrow array of lists of integers."""
        lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        values = column.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
        return Ragged(values, np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> list[int]:
        start = self.starts[row]
        return self.values[start : start + self.lengths[row]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[row] for row in range(len(self)))

    def pick(self, rows: Sequence[int]) -> Ragged:
        """These rows, in this order; the values are shared, not copied."""
        return Ragged(self.values, self.starts[rows], self.lengths[rows])


class Rows:
    """Tokenised examples by position, collated with dynamic padding.

    labels: [N], int64 or floating point, zeros if every token has a label of its own; those are in `token_labels`.
    places: int64 [N].
    """

    def __init__(self, dataset: Any, tokenizer: Any):
        self.tokenizer = tokenizer
        table = dataset.with_format("arrow")[:]
        names = [c for c in ("input_ids", "attention_mask", "token_type_ids") if c in dataset.column_names]
        self.tokens = {name: Ragged.of(table[name].combine_chunks()) for name in names}
        self.lengths: list[int] = self.tokens["input_ids"].lengths.tolist()
        labels = table["labels"]
        is_of_tokens = hasattr(labels.type, "value_type")
        self.token_labels = Ragged.of(labels.combine_chunks()) if is_of_tokens else None
        self.labels = torch.zeros(len(labels)) if is_of_tokens else torch.tensor(labels.to_numpy())
        known = "index" in dataset.column_names
        self.places = table["index"].to_numpy() if known else np.arange(len(labels))  # positions in the whole split

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def highest_token(self) -> int:
        return int(self.tokens["input_ids"].values.max())

    def digest(self) -> str:
        """sha256 of all tokens and labels of tokens."""
        found = hashlib.sha256()
        for column in (*self.tokens.values(), *([self.token_labels] if self.token_labels else ())):
            for array in (column.lengths, column.values):
                found.update(array.tobytes())
        return found.hexdigest()

    def row(self, position: int) -> dict[str, list[int]]:
        """One row's unpadded values, by name of the model input."""
        return {name: column[position] for name, column in self.tokens.items()}

    def head(self, count: int) -> Rows:
        """The first `count` rows."""
        return self.pick(range(min(count, len(self))))

    def sample(self, count: int) -> Rows:
        """At most `count` rows drawn at random, because files may be sorted or alternate labels; the same on every rank."""
        return self.pick(sorted(random.Random(0).sample(range(len(self)), min(count, len(self)))))

    def pick(self, positions: Sequence[int]) -> Rows:
        """These rows, in this order."""
        some = copy.copy(self)
        positions = list(positions)
        some.tokens = {name: column.pick(positions) for name, column in self.tokens.items()}
        some.lengths = [self.lengths[i] for i in positions]
        some.labels = self.labels[positions]
        some.places = self.places[positions]
        some.token_labels = None if self.token_labels is None else self.token_labels.pick(positions)
        return some

    def with_labels(self, labels: Tensor) -> Rows:
        """The same rows with other labels, [N]."""
        some = copy.copy(self)
        some.labels = labels
        return some

    def without_labels(self) -> Rows:
        """The same rows without token labels: a language model's predictions are then the last token's logits, not likelihoods."""
        some = copy.copy(self)
        some.token_labels = None
        return some

    def padded_labels(self, positions: Sequence[int], width: int) -> Tensor | None:
        """Token labels, int64 [B, T], padded with -100 to `width` tokens; None if each row has a single label."""
        if self.token_labels is None:
            return None
        rows = [self.token_labels[i] for i in positions]
        return torch.tensor([row + [-100] * (width - len(row)) for row in rows])

    def inputs(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Model inputs [B, T] of these rows. T is the longest length, rounded up to a multiple of 8 as far as the model allows."""
        rows = [self.row(i) for i in positions]
        longest = max(self.lengths[i] for i in positions)
        width = max(
            longest, min(-(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF, self.tokenizer.model_max_length)
        )
        return dict(
            self.tokenizer.pad(rows, padding="max_length", max_length=width, return_tensors="pt", verbose=False)
        )

    def batch(self, positions: Sequence[int], weight: float) -> Batch:
        index, inputs = torch.tensor(list(positions)), self.inputs(positions)
        labels = self.padded_labels(positions, inputs["input_ids"].shape[1])
        labels = self.labels[index] if labels is None else labels
        return Batch(inputs, labels, index, torch.full((len(index),), weight))


def refuse_unknown_tokens(name: str, model: nn.Module, rows: Rows) -> None:
    """Raise UserError if `rows` hold a token for which the model has no embedding."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    known = full_shape(embedding.weight)[0]
    if len(rows) and (highest := rows.highest_token) >= known:
        remedy = f"the tokenizer produces token {highest}, but the model has {known} embeddings; is it the model's own?"
        raise UserError(Problem("model_name_or_path", name, remedy))


@dataclass(frozen=True)
class Sampler:
    """Which samples each rank sees at each step; see the module's docstring."""

    num_samples: int
    micro_batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int
    seed: int
    lengths: tuple[int, ...] = ()  # tokens of each sample, to group samples of similar length; empty: no grouping
    _orders: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)  # only the current epoch's

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.samples_per_step)

    def samples_before(self, step: int) -> int:
        """How many samples the optimizer steps before `step` have seen."""
        epochs, position = divmod(step, self.steps_per_epoch)
        return epochs * self.num_samples + position * self.samples_per_step

    def step_samples(self, step: int) -> list[int]:
        """All samples of optimizer step `step`, on all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self._order(epoch)
        start = position * self.samples_per_step
        return self._orders[epoch][start : start + self.samples_per_step].tolist()

    def _order(self, epoch: int) -> Tensor:
        """All samples in the order of an epoch: int64 [N].

        With `lengths`, a random order is divided into runs of `GROUPED_STEPS` steps, each run is sorted by length, and the
        resulting steps are shuffled; samples that do not fill a step stay last.
        """
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(self.num_samples, generator=generator)
        whole = self.num_samples // self.samples_per_step
        if not self.lengths or whole < 2:
            return order
        lengths = torch.tensor(self.lengths)
        runs = order[: whole * self.samples_per_step].split(GROUPED_STEPS * self.samples_per_step)
        by_length = torch.cat([run[lengths[run].argsort(descending=True, stable=True)] for run in runs])
        steps = by_length.view(whole, self.samples_per_step)[torch.randperm(whole, generator=generator)]
        return torch.cat([steps.flatten(), order[whole * self.samples_per_step :]])

    def micro_batches(self, step: int) -> list[tuple[list[int], float]]:
        """This rank's micro-batches of step `step`: (samples, weight of each in the micro-batch's loss)."""
        samples = self.step_samples(step)
        weight = self.world_size * self.accumulation_steps / len(samples)
        micro_batches = []
        for m in range(self.accumulation_steps):
            start = (m * self.world_size + self.rank) * self.micro_batch_size
            chunk = samples[start : start + self.micro_batch_size]
            micro_batches.append((chunk, weight) if chunk else (samples[:1], 0.0))
        return micro_batches


def evaluation_batches(lengths: Sequence[int], batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """This rank's batches in an evaluation that counts every row once, with rows of similar length together.

    Every rank gets the same number of batches; some may be empty. Together the ranks compute exactly the batches that one
    rank would, so padding, and with it every bit of the result, does not depend on the number of ranks.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(by_length), batch_size * world_size):
        mine = start + rank * batch_size
        yield by_length[mine : mine + batch_size]
