"""The teacher of a language model: of each learnt token the k likeliest words and their log-probabilities, on disk.

All logits of a training set are N x T x V numbers, which fit nowhere. What a teacher thinks beyond its first few words is one
number: how much is left for all the others. Each rank writes what it computed into a file of its own, and reads back from
all of them the few rows that a batch needs, so that the folder must be one that all ranks see, as `output_dir` is.

Legend: B samples, T tokens, V vocabulary, M learnt tokens of a batch, k words.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunadapt_ds import distributed
from prunadapt_ds.batches import Rows
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.evaluate import forward_passes
from prunadapt_ds.objective import TopWords

FOLDER = "teacher"  # in `output_dir`, as long as the run is not complete
INDEX = "index.safetensors"  # written last: where it is, everything is
BYTES_PER_WORD = 6  # a number of the vocabulary in 4 bytes, a log-probability in 2


def num_bytes(rows: Rows, k: int) -> int:
    """What the teacher of these rows takes on disk."""
    return BYTES_PER_WORD * k * sum(_learnt(rows, i) for i in range(len(rows)))


def _learnt(rows: Rows, position: int) -> int:
    """Learnt tokens of a row: the first token is nobody's target."""
    assert rows.token_labels is not None
    return sum(label >= 0 for label in rows.token_labels[position][1:])


@dataclass(frozen=True)
class TokenTeacher:
    """Where each row's tokens are: file `of[i]`, `count[i]` of them from `start[i]` on; int64 [N] each."""

    folder: Path
    of: Tensor
    start: Tensor
    count: Tensor

    def answers(self, positions: Sequence[int]) -> TopWords:
        """The learnt tokens of these rows, row by row: [M, k] each."""
        from safetensors import safe_open

        parts = []
        for i in positions:
            first = int(self.start[i])
            rows = slice(first, first + int(self.count[i]))
            with safe_open(self.folder / shard(int(self.of[i])), framework="pt") as file:  # mapped, not read
                parts.append([file.get_slice(name)[rows] for name in ("words", "log_probs")])
        words, log_probs = (torch.cat(column) for column in zip(*parts, strict=True))
        return TopWords(words.long(), log_probs.float())


def shard(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def write(engine: Any, rows: Rows, k: int, batch_size: int, device: torch.device, folder: Path) -> TokenTeacher:
    """Let `engine` answer every row, and keep its k likeliest words of each learnt token. Collective."""
    from safetensors.torch import save_file

    remove(folder)
    distributed.on_rank_0("making the teacher's folder", folder.mkdir)
    words, log_probs, place = [], [], torch.zeros(3, len(rows), dtype=torch.long, device=device)
    end = 0
    for batch, _, logits in forward_passes(engine, rows, batch_size, device):
        labels = rows.padded_labels(batch or [0], logits.shape[1])
        assert labels is not None
        for row, position in enumerate(batch):
            real = labels[row, 1:].to(device) >= 0
            top = logits[row, :-1][real].float().log_softmax(-1).topk(min(k, logits.shape[-1]))
            words.append(top.indices.int().cpu())
            log_probs.append(top.values.half().cpu())
            place[:, position] = torch.tensor([distributed.rank(), end, len(words[-1])])
            end += len(words[-1])
    tensors = {"words": torch.cat(words or [torch.zeros(0, k).int()])}
    tensors["log_probs"] = torch.cat(log_probs or [torch.zeros(0, k).half()])
    distributed.together(lambda: save_file(tensors, folder / shard(distributed.rank())))
    place = distributed.dist_sum(place).cpu()  # every row was answered by one rank
    of, start, count = place
    index = {"of": of.clone(), "start": start.clone(), "count": count.clone()}
    distributed.on_rank_0("writing the teacher's index", lambda: save_file(index, folder / INDEX))
    return TokenTeacher(folder, **index)


def remove(folder: Path) -> None:
    """Once no step needs it any more. Collective."""
    distributed.on_rank_0("removing the teacher's folder", lambda: shutil.rmtree(folder, ignore_errors=True))


def open_again(folder: Path) -> TokenTeacher:
    """What an earlier process of the run has written. Raises UserError where it is gone."""
    from safetensors.torch import load_file

    try:
        return TokenTeacher(folder, **load_file(folder / INDEX))
    except (OSError, TypeError) as error:
        remedy = "has no answers of the teacher any more, by which this run goes on; begin anew with --resume never"
        raise UserError(Problem("output_dir", str(folder), remedy)) from error
