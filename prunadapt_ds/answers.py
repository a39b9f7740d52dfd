"""A trained folder that answers texts: one of ours (compact, padded, uniform, adapter) or any stock sequence classifier.

Legend: N rows, C numbers that the model answers with. Every method is called by all ranks, which share the rows; the answers
are those of one rank to the last bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunadapt_ds import distributed, formats, labels
from prunadapt_ds.backbone import class_names
from prunadapt_ds.batches import Rows, refuse_unknown_tokens
from prunadapt_ds.data import Columns, Task, tokenize
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.logits import predict
from prunadapt_ds.trained_folder import load_folder, scored_length

CHUNK = 8192  # rows that are tokenised, sorted by length and answered together: what is held in memory, whatever a file's size


@dataclass(frozen=True)
class Answerer:
    """`label_names`: in the order of the answers' columns; () means regression, where C is 1. `task`: what it was trained for,
    whose labels the model may have in another order; None where nobody said."""

    model: Any
    tokenizer: Any
    label_names: tuple[str, ...]
    max_seq_length: int
    batch_size: int  # rows per rank
    task: Task | None = None

    def logits(self, columns: Columns) -> Tensor:
        """float32 [N, C] on the CPU for sentence1[, sentence2], in their order, on every rank. Raises UserError where they are
        not finite, and for a `max_seq_length` that the tokenizer does not take."""
        from datasets import Dataset

        task = Task("answers", None, "sentence1", "sentence2" if "sentence2" in columns else None, self.label_names, ())
        data = Dataset.from_dict({**columns, "label": [0] * len(columns["sentence1"])})
        rows = Rows(tokenize(data, self.tokenizer, task, self.max_seq_length), self.tokenizer)
        refuse_unknown_tokens(self.model.name_or_path, self.model, rows)
        found = predict(self.model, rows, self.batch_size, distributed.device())
        if broken := int((~torch.isfinite(found)).any(dim=1).sum()):
            raise UserError(Problem("logits", f"not finite for {broken} rows", "the model is damaged; export it again"))
        return labels.in_order(found, class_names(self.model.config), self.task.label_names if self.task else ())


def load(
    name: str,
    trust_remote_code: bool,
    max_seq_length: int | None,
    batch_size: int,
    *,
    task: Task | None = None,
    label_names: tuple[str, ...] = (),
) -> Answerer:
    """The folder or hub id `name`, ready on this rank's device. Collective.

    max_seq_length: None: as in the run that wrote the folder.
    task: what it must have been trained for; without one its labels are called `label_names`, or as its configuration does.
    Raises UserError for what does not load or is no classifier (or regressor) of one text or a pair.
    """
    import datasets

    datasets.disable_progress_bars()  # one for each chunk would be no progress
    with formats.unsharded():  # a run of this process may still want everything sharded
        model, tokenizer = distributed.together(lambda: load_folder(name, trust_remote_code, task=task))
    model.to(distributed.device()).eval()
    config = model.config
    if not type(model).__name__.endswith("ForSequenceClassification") and "PeftModel" not in type(model).__name__:
        raise UserError(Problem("model_name_or_path", name, f"is a {type(model).__name__}; name a classifier's folder"))
    if config.problem_type == "multi_label_classification":
        remedy = "gives several labels to one text; only one label or one number a text can be written"
        raise UserError(Problem("model_name_or_path", name, remedy))
    if task is not None:
        label_names = task.label_names
    elif config.num_labels == 1:
        if label_names:
            raise UserError(
                Problem("label_names", " ".join(label_names), "the model answers with one number, no label")
            )
    elif label_names and len(label_names) != config.num_labels:
        remedy = f"the model answers with {config.num_labels} numbers; name as many, each once, in their order"
        raise UserError(Problem("label_names", " ".join(label_names), remedy))
    else:
        label_names = label_names or class_names(config)
    longest = max_seq_length or scored_length(name)
    return Answerer(model, tokenizer, label_names, longest, batch_size, task)


def chunks(rows: Iterable[dict[str, str]]) -> Iterator[Columns]:
    """Rows as columns, at most `CHUNK` of them together."""
    left = iter(rows)
    while some := list(itertools.islice(left, CHUNK)):
        yield {name: [row[name] for row in some] for name in some[0]}


def shared(what: str, source: Iterator[Columns]) -> Iterator[Columns]:
    """Rank 0's chunks on every rank; the others' `source` is not touched. `what` begins the message of a failure. Collective."""
    while (chunk := distributed.on_rank_0(what, lambda: next(source, None))) is not None:
        yield chunk
