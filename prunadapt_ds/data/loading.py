"""From options to datasets: `load_task` loads a task from its source, `tokenize` turns it into model inputs.

Nothing here depends on the rank: every process that passes the same arguments gets the same data."""

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
    """Load the task that `config` names, by default the built-in sample.

    `config`: the data options task_name, data_dir, train_file, validation_file, max_train_samples and max_eval_samples;
    config.py has checked that they do not contradict each other. `seed` picks the `max_train_samples` rows for training;
    development sets keep their first `max_eval_samples`. Raises UserError with every problem found."""
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
    """The hub's columns under our names. Its own `idx` is dropped: it is not always 0..N-1."""
    sources = {"sentence1": task.sentence1, "sentence2": task.sentence2, "label": "label"}
    data = data.select_columns([source for source in sources.values() if source])
    data = data.rename_columns({source: name for name, source in sources.items() if source and source != name})
    data = data.add_column("index", list(range(len(data))))
    features = _features(task)
    return data.select_columns(list(features)).cast(features, keep_in_memory=True)


def _first(data: Dataset, count: int) -> Dataset:
    return data.select(range(min(count, len(data))))


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, max_seq_length: int) -> Dataset:
    """Tokenize into the columns input_ids, attention_mask[, token_type_ids], labels, index.

    Texts are truncated to `max_seq_length` tokens (the longer of a pair first) and not padded. The result stays in memory, so
    processes share no cache file. Raises UserError if `max_seq_length` leaves no room for text or is more than the model
    accepts."""
    fields = ("sentence1", "sentence2") if task.sentence2 else ("sentence1",)
    special = tokenizer.num_special_tokens_to_add(pair=len(fields) == 2)
    shortest, longest = special + len(fields), tokenizer.model_max_length
    if not shortest <= max_seq_length <= longest:
        most = f"; at most {longest}, the longest input the model accepts" if max_seq_length > shortest else ""
        remedy = f"must be at least {shortest} (special tokens and one token per text){most}"
        raise UserError(Problem("max_seq_length", max_seq_length, remedy))

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[field] for field in fields), truncation=True, max_length=max_seq_length)
        # If the tokenizer adds no special tokens, an empty text has no token for the head to read: give it a padding token.
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
        new_fingerprint="tokens",  # caches nothing; computing one can take longer than tokenizing
        desc="tokenizing",
    )
