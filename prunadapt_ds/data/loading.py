"""From options to datasets: `load_task` loads a task from its source, `tokenize` turns it into model inputs.

Nothing here depends on the rank: every process that passes the same arguments gets the same data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prunadapt_ds.data.glue import load_hub, load_tsv
from prunadapt_ds.data.language import load_language_validation
from prunadapt_ds.data.own import load_files
from prunadapt_ds.data.readers import Columns
from prunadapt_ds.data.sample import generate
from prunadapt_ds.data.tasks import TRAIN, Task, TaskData, get_task
from prunadapt_ds.errors import Problem, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_task(config: Any, seed: int) -> TaskData:
    """Load the task that `config` names, by default the built-in sample.

    `config`: the data options task_name, data_dir, train_file, validation_file, max_train_samples and max_eval_samples;
    config.py has checked that they do not contradict each other. `seed` picks the `max_train_samples` rows for training;
    development sets keep their first `max_eval_samples`. Raises UserError with every problem found."""
    task, sets = _read(config, trains=True)
    train = sets.pop(TRAIN)
    if config.max_train_samples is not None and config.max_train_samples < len(train):
        kept = random.Random(seed).sample(range(len(train)), config.max_train_samples)
        train = train.select(sorted(kept), keep_in_memory=True)
    return TaskData(task, train, _limited(sets, config))


def load_validation(config: Any, outputs: Sequence[tuple[str, ...]] | None) -> tuple[Task, dict[str, Dataset]]:
    """Load only the development sets, by key, to score a model. `config`: as for `load_task` or `load_language`.

    `outputs`: for a --validation_file without a --train_file, whose labels would name the classes: see `load_files`. Raises
    UserError with every problem found."""
    if config.task_type == "causal_lm":
        return load_language_validation(config)
    task, sets = _read(config, trains=False, outputs=outputs)
    sets.pop(TRAIN, None)
    return task, _limited(sets, config)


def _limited(validation: dict[str, Dataset], config: Any) -> dict[str, Dataset]:
    most = config.max_eval_samples
    return validation if most is None else {key: _first(data, most) for key, data in validation.items()}


def _read(
    config: Any, *, trains: bool, outputs: Sequence[tuple[str, ...]] | None = None
) -> tuple[Task, dict[str, Dataset]]:
    """The task and its sets by key, the training set among them if the run `trains` or its labels name the classes."""
    if config.validation_file:
        names = ("train_file", "validation_file")
        paths = {name: getattr(config, name) for name in names if getattr(config, name)}
        task, found = load_files(paths, config.problem_type, outputs)
    else:
        task = get_task(config.task_name or "sample")
        if task.name != "sample" and not config.data_dir:
            return task, {key: _from_hub(data, task) for key, data in load_hub(task, trains=trains).items()}
        found = load_tsv(task, config.data_dir, trains=trains) if config.data_dir else _sample(trains)
    return task, {key: _from_columns(columns, task) for key, columns in found.items()}


def _sample(trains: bool) -> dict[str, Columns]:
    return {key: generate(key) for key in ([TRAIN] if trains else []) + ["validation"]}


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


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """Tokenize the columns sentence1[, sentence2] and label into input_ids, attention_mask[, token_type_ids] and labels.

    Texts are truncated to `max_seq_length` tokens (the longer of a pair first) and not padded. The result stays in memory, so
    processes share no cache file. Raises UserError if `max_seq_length` leaves no room for text or is more than the model
    accepts."""
    fields = [name for name in ("sentence1", "sentence2") if name in dataset.column_names]
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
