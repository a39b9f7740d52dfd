"""The teacher of a language model: for each target token the k most likely tokens and their log-probabilities, on disk.

All logits of a training set would be N * T * V numbers, too many to keep. Beyond a teacher's k most likely tokens only one
number matters: the probability that is left for all others. Each rank writes its results to files of its own, one part at a
time, and reads the few rows that a batch needs from the files of all ranks, so all ranks must see the folder, as they see
`output_dir`. Files appear whole or not at all; the index has the size and hash of each, and a checkpoint those of the index.

Legend: N rows, T tokens, V vocabulary, M target tokens of a batch, k most likely tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunadapt_ds import distributed, files, watchdog
from prunadapt_ds.batches import Rows
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.logits import forward_passes
from prunadapt_ds.objective import TopTokens

FOLDER = "teacher"  # in `output_dir`, until the run is complete
INDEX = "index.safetensors"  # written last: if it exists, all parts do
FILES = "files"  # in the index's metadata: bytes and sha256 of every part
BYTES_PER_WORD = 6  # a token id takes 4 bytes, a log-probability 2
PART_BYTES = 2**28  # a part is written once it is this large; a rank holds one in memory


def num_bytes(rows: Rows, k: int) -> int:
    """Bytes that the teacher of these rows takes on disk."""
    return BYTES_PER_WORD * k * sum(_learnt(rows, i) for i in range(len(rows)))


def _learnt(rows: Rows, position: int) -> int:
    """The number of target tokens of a row; its first token is never one."""
    assert rows.token_labels is not None
    return sum(label >= 0 for label in rows.token_labels[position][1:])


@dataclass(frozen=True)
class TokenTeacher:
    """Reads the teacher's answers. Row i has `count[i]` of them in part `of[i]`, from `start[i]` on; int64 [N] each.

    `identity`: bytes and sha256 of the index.
    """

    folder: Path
    identity: Mapping[str, Any]
    of: Tensor
    start: Tensor
    count: Tensor
    # Opened and mapped so far.
    _files: dict[int, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def answers(self, positions: Sequence[int]) -> TopTokens:
        """The teacher's answers for the target tokens of these rows, row by row: [M, k] each."""
        parts = []
        for i in positions:
            file, first = self._opened(int(self.of[i])), int(self.start[i])
            rows = slice(first, first + int(self.count[i]))
            parts.append([file.get_slice(name)[rows] for name in ("words", "log_probs")])
        words, log_probs = (torch.cat(column) for column in zip(*parts, strict=True))
        return TopTokens(words.long(), log_probs.float())

    def _opened(self, number: int) -> Any:
        from safetensors import safe_open

        if number not in self._files:
            self._files[number] = safe_open(self.folder / part(number), framework="pt")
        return self._files[number]

    def open_all(self) -> None:
        """Open all parts now, so that opening cannot fail in the middle of a step that other ranks take too.

        Raises OSError or SafetensorError.
        """
        for number in self.of.unique().tolist():
            self._opened(number)


def part(number: int) -> str:
    return f"part-{number}.safetensors"


class _Parts:
    """Writes this rank's answers to its parts, whose numbers are interleaved with those of other ranks.

    A failed write is raised only at the end: until then the other ranks need this one for their forward passes.
    """

    def __init__(self, folder: Path):
        self.folder, self.number = folder, distributed.rank()
        self.failure: UserError | None = None
        self.words: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.end = 0  # target tokens in the current part
        self.written: dict[str, dict[str, Any]] = {}  # bytes and sha256, by file

    def add(self, words: Tensor, log_probs: Tensor) -> None:
        """Add answers to the current part: token ids and log-probabilities, [M, k] each."""
        self.words.append(words.int().cpu())
        self.log_probs.append(log_probs.half().cpu())
        self.end += len(words)

    @property
    def is_full(self) -> bool:
        return bool(self.words) and self.end * self.words[-1].shape[1] * BYTES_PER_WORD >= PART_BYTES

    def write(self) -> None:
        """Write the current part, unless nothing was added to it, and begin the next one."""
        with watchdog.resting():
            try:
                if self.failure is None and self.words:  # not `end`: rows without targets refer to a part too
                    tensors = {"words": torch.cat(self.words), "log_probs": torch.cat(self.log_probs)}
                    self.written[part(self.number)] = _save(tensors, self.folder / part(self.number))
            except UserError as error:
                self.failure = error
        self.words, self.log_probs, self.end = [], [], 0
        self.number += distributed.world_size()

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write the last part; returns bytes and sha256 by file. Raises UserError if any part could not be written."""
        self.write()
        if self.failure is not None:
            raise self.failure
        return self.written


def bring(source: Path, folder: Path) -> None:
    """Copy the teacher of a run that continues in another folder than the one it began in. Raises OSError."""
    if (source / INDEX).is_file() and not (folder / INDEX).exists():
        with files.whole_folder(folder) as new:
            shutil.copytree(source, new, dirs_exist_ok=True)


def write(engine: Any, rows: Rows, k: int, batch_size: int, device: torch.device, folder: Path) -> TokenTeacher:
    """Run `engine` on every row, and write its k most likely tokens for each target token to `folder`. Collective.

    Raises UserError on all ranks if one cannot write its parts, or cannot read those of another.
    """
    remove(folder)
    distributed.on_rank_0("making the teacher's folder", folder.mkdir)
    parts, place = _Parts(folder), torch.zeros(3, len(rows), dtype=torch.long)
    for batch, _, logits in forward_passes(engine, rows, batch_size, device):
        labels = rows.padded_labels(batch or [0], logits.shape[1])
        assert labels is not None
        for i, position in enumerate(batch):  # fp32 copies of all rows would be several times the logits
            real = labels[i, 1:] >= 0
            top = logits[i, :-1][real.to(device)].float().log_softmax(-1).topk(min(k, logits.shape[-1]))
            place[:, position] = torch.tensor([parts.number, parts.end, len(top.indices)])
            parts.add(top.indices, top.values)
        if parts.is_full:
            parts.write()
    mine = distributed.together(parts.finish)
    with watchdog.resting():
        written = {name: found for of_rank in distributed.all_gather_objects(mine) for name, found in of_rank.items()}
        of, start, count = distributed.dist_sum(place.to(device)).cpu()  # one rank answered each row
        index = {"of": of.clone(), "start": start.clone(), "count": count.clone()}
        identity = distributed.on_rank_0(
            "writing the teacher's index", lambda: _write(index, folder / INDEX, {FILES: json.dumps(written)})
        )
    teacher = TokenTeacher(folder, identity, **index)
    distributed.together(lambda: _open_all(teacher))
    return teacher


def _open_all(teacher: TokenTeacher) -> None:
    """Raise UserError if this rank cannot read what another has written, for example on a host without the run's disk."""
    from safetensors import SafetensorError

    try:
        teacher.open_all()
    except (OSError, SafetensorError) as error:
        remedy = f"every rank must be able to read the teacher's answers ({error}); name a folder that all hosts share"
        raise UserError(Problem("output_dir", str(teacher.folder), remedy)) from error


def _write(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """Write a file atomically, and flush it to disk; returns its bytes and sha256."""
    from safetensors.torch import save_file

    with files.whole_path(file) as unfinished:
        save_file(tensors, unfinished, metadata)
    return files.identity(file)


def _save(tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """`_write`, with a UserError if it fails, which `distributed.together` raises on all ranks."""
    from safetensors import SafetensorError

    try:
        return _write(tensors, file)
    except (OSError, SafetensorError) as error:
        remedy = f"the teacher's answers cannot be written ({error}); make room, or lower --distill_top_k"
        raise UserError(Problem("output_dir", str(file.parent), remedy)) from error


def remove(folder: Path) -> None:
    """Delete the teacher's folder, if there is one. Collective."""
    distributed.on_rank_0("removing the teacher's folder", lambda: files.discard(folder))


def open_again(folder: Path, identity: Mapping[str, Any]) -> TokenTeacher:
    """Open the teacher that an earlier process of the run wrote. `identity`: bytes and sha256 of its index.

    Every byte is checked, with the parts divided among the ranks. Raises UserError if a file is missing or has changed.
    """
    from safetensors import SafetensorError, safe_open

    def refuse(why: str) -> UserError:
        remedy = f"{why}, but this run needs its teacher to go on; bring it back, or start over with --resume never"
        return UserError(Problem("output_dir", str(folder), remedy))

    def check(name: str, written: Mapping[str, Any]) -> None:
        if files.identity(folder / name) != written:
            raise refuse(f"{name} was cut short or changed")

    try:
        check(INDEX, identity)
        with safe_open(folder / INDEX, framework="pt") as file:
            index = {name: file.get_tensor(name) for name in ("of", "start", "count")}
            written = json.loads(file.metadata()[FILES])
        for name in list(written)[distributed.rank() :: distributed.world_size()]:
            check(name, written[name])
        teacher = TokenTeacher(folder, identity, **index)
        teacher.open_all()
    except FileNotFoundError as error:
        raise refuse(f"{Path(error.filename or INDEX).name} is missing") from error
    except (OSError, SafetensorError) as error:
        raise refuse(f"cannot be read ({error})") from error
    return teacher
