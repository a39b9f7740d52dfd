"""Predicts texts with a trained folder: an export (compact, padded, uniform, adapter) or any stock sequence classifier.

Legend: N rows, C outputs of the model. All methods are collective: the ranks share the rows. The results are bitwise equal
to those of a single rank.
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
from prunadapt_ds.trained_folder import load_folder, refuse_other_inputs, scored_length

CHUNK = 8192  # rows that are tokenised, sorted by length and predicted together; bounds the memory for any file size


@dataclass(frozen=True)
class Answerer:
    """A loaded model with its tokenizer.

    `label_names`: in the order of the output's columns; () for regression, where C is 1. `task`: the task that the model was
    trained for, if known; its labels give the order of the columns, which the model's own order may differ from.
    """

    model: Any
    tokenizer: Any
    label_names: tuple[str, ...]
    max_seq_length: int
    batch_size: int  # rows per rank
    task: Task | None = None

    def logits(self, columns: Columns) -> Tensor:
        """Compute float32 [N, C] on the CPU of every rank, for the N rows of sentence1[, sentence2] in their order.

        Raises UserError if a logit is not finite, or if `max_seq_length` is too small or more than the model accepts.
        """
        from datasets import Dataset

        data = Dataset.from_dict({**columns, "label": [0] * len(columns["sentence1"])})
        rows = Rows(tokenize(data, self.tokenizer, self.max_seq_length), self.tokenizer)
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
    """Load the folder or hub ID `name` onto this rank's device. Collective.

    max_seq_length: None for that of the run that wrote the folder.
    task: the task that it must have been trained for. Without one, its labels are named by `label_names`, or else by its
    configuration.
    Raises UserError if it cannot be loaded or is not a single-label classifier or a regressor.
    """
    import datasets

    datasets.disable_progress_bars()  # otherwise there would be one for each chunk
    with formats.unsharded():  # a run in this process may still have a ZeRO-3 configuration alive
        model, tokenizer = distributed.together(lambda: load_folder(name, trust_remote_code, task=task))
    model.to(distributed.device()).eval()
    config = model.config
    if not type(model).__name__.endswith("ForSequenceClassification") and "PeftModel" not in type(model).__name__:
        raise UserError(Problem("model_name_or_path", name, f"is a {type(model).__name__}; name a classifier's folder"))
    if config.problem_type == "multi_label_classification":
        remedy = "gives a text several labels; only models with one label or one number per text are supported"
        raise UserError(Problem("model_name_or_path", name, remedy))
    if task is not None:
        refuse_other_inputs(name, has_pairs=task.sentence2 is not None)
        label_names = task.label_names
    elif config.num_labels == 1:
        if label_names:
            raise UserError(Problem("label_names", " ".join(label_names), "the model predicts one number, not a label"))
    elif label_names and len(label_names) != config.num_labels:
        remedy = f"the model has {config.num_labels} outputs; name as many labels, each once, in their order"
        raise UserError(Problem("label_names", " ".join(label_names), remedy))
    else:
        label_names = label_names or class_names(config)
    longest = max_seq_length or scored_length(name)
    return Answerer(model, tokenizer, label_names, longest, batch_size, task)


def chunks(rows: Iterable[dict[str, str]]) -> Iterator[Columns]:
    """Yield the rows as columns, at most `CHUNK` rows at a time."""
    left = iter(rows)
    while some := list(itertools.islice(left, CHUNK)):
        yield {name: [row[name] for row in some] for name in some[0]}


def shared(what: str, source: Iterator[Columns]) -> Iterator[Columns]:
    """Yield rank 0's chunks on every rank; other ranks' `source` is not used. `what`: starts error messages. Collective."""
    while (chunk := distributed.on_rank_0(what, lambda: next(source, None))) is not None:
        yield chunk
