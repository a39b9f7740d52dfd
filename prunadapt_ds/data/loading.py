"""From options to datasets: `load_task` finds the source, `tokenize` makes what the model reads.

Nothing here knows about ranks: every process that calls with the same arguments gets the same data."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from prunadapt_ds.data.glue import load_hub, load_tsv
from prunadapt_ds.data.own import load_files
from prunadapt_ds.data.readers import Columns
from prunadapt_ds.data.sample import generate
from prunadapt_ds.data.tasks import Task, TaskData, get_task
from prunadapt_ds.errors import Problem, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_task(config: Any, seed: int) -> TaskData:
    """Load what `config` (the data options: task_name, data_dir, train_file, validation_file, max_train_samples,
    max_eval_samples) asks for; the built-in sample when it asks for nothing. What contradicts what is config.py's matter.

    `seed` picks the subset of `max_train_samples`; development sets keep their first `max_eval_samples`.
    Raises UserError with every problem found."""
    if config.train_file:
        task, columns = load_files(config.train_file, config.validation_file, config.problem_type)
        train = _from_columns(columns["train"], task)
        validation = {"validation": _from_columns(columns["validation"], task)}
    else:
        task = get_task(config.task_name or "sample")
        train, validation = _load_named(task, config.data_dir)

    if config.max_train_samples is not None and config.max_train_samples < len(train):
        kept = random.Random(seed).sample(range(len(train)), config.max_train_samples)
        train = train.select(sorted(kept), keep_in_memory=True)
    if config.max_eval_samples is not None:
        validation = {key: _first(data, config.max_eval_samples) for key, data in validation.items()}
    num_labels = 1 if task.is_regression else len(task.label_names)
    return TaskData(task, train, validation, task.label_names, num_labels, task.is_regression)


def _load_named(task: Task, data_dir: str | None) -> tuple[Dataset, dict[str, Dataset]]:
    if task.name == "sample":
        return _from_columns(generate("train"), task), {"validation": _from_columns(generate("validation"), task)}
    if data_dir:
        columns, others = load_tsv(task, data_dir)
        return _from_columns(columns, task), {key: _from_columns(rows, task) for key, rows in others.items()}
    train, validation = load_hub(task)
    return _from_hub(train, task), {key: _from_hub(data, task) for key, data in validation.items()}


def _features(task: Task) -> Any:
    from datasets import Features, Value

    texts = {"sentence1": Value("string"), **({"sentence2": Value("string")} if task.sentence2 else {})}
    label = Value("float64" if task.is_regression else "int64")
    return Features({**texts, "label": label, "index": Value("int64")})


def _from_columns(columns: Columns, task: Task) -> Dataset:
    from datasets import Dataset

    rows = {**columns, "index": list(range(len(columns["label"])))}
    return Dataset.from_dict(rows, features=_features(task))


def _from_hub(data: Dataset, task: Task) -> Dataset:
    """The hub's columns under our names. Its own `idx` is left out: it is not always 0..N-1."""
    sources = {"sentence1": task.sentence1, "sentence2": task.sentence2, "label": "label"}
    data = data.select_columns([source for source in sources.values() if source])
    data = data.rename_columns({source: name for name, source in sources.items() if source and source != name})
    data = data.add_column("index", list(range(len(data))))
    features = _features(task)
    return data.select_columns(list(features)).cast(features, keep_in_memory=True)


def _first(data: Dataset, count: int) -> Dataset:
    return data.select(range(min(count, len(data))))


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, max_seq_length: int) -> Dataset:
    """Columns input_ids, attention_mask[, token_type_ids], labels, index. Texts are cut to `max_seq_length`
    tokens (the longer of a pair first) and not padded. Kept in memory: processes share no cache file.

    Raises UserError when `max_seq_length` leaves no room for text or is more than the model takes."""
    fields = ("sentence1", "sentence2") if task.sentence2 else ("sentence1",)
    special = tokenizer.num_special_tokens_to_add(pair=len(fields) == 2)
    shortest, longest = special + len(fields), tokenizer.model_max_length
    if not shortest <= max_seq_length <= longest:
        most = f"; at most {longest}, which is what the model takes" if max_seq_length > shortest else ""
        remedy = f"must be at least {shortest} (special tokens and one token a text){most}"
        raise UserError(Problem("max_seq_length", max_seq_length, remedy))

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[field] for field in fields), truncation=True, max_length=max_seq_length)
        # An empty text of a tokenizer that adds no special tokens: one token, to read the answer from.
        one_token = {"input_ids": tokenizer.pad_token_id, "attention_mask": 1, "token_type_ids": 0}
        for i in (i for i, ids in enumerate(encoded["input_ids"]) if not ids):
            for column in encoded:
                encoded[column][i].append(one_token[column])
        return {**encoded, "labels": batch["label"]}

    return dataset.map(
        encode,
        batched=True,
        remove_columns=[*fields, "label"],
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint="tokens",  # nothing is cached by it, and to find one takes longer than many a data set's tokens
        desc="tokenizing",
    )
