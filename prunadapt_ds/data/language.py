"""Text for language modelling: plain text, or prompts with responses, where only the responses are learnt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunadapt_ds.data.readers import Columns, check_exists, has_surrogate, read_columns, read_text
from prunadapt_ds.data.tasks import Task, TaskData
from prunadapt_ds.errors import Problem, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that the loss ignores
NAME = "causal_lm"


def load_language(config: Any) -> TaskData:
    """Load datasets with the columns prompt and response, or text, and index. `config`: the data options.

    A .txt file is a single text; csv, tsv, jsonl and parquet files have the columns prompt and response, or text. Raises
    UserError with the problems of both files.
    """
    from datasets import Dataset

    problems: list[Problem] = []
    splits: dict[str, Columns] = {}
    for field in ("train_file", "validation_file"):
        try:
            splits[field] = _columns(field, getattr(config, field))
        except UserError as error:
            problems += error.problems
    if not problems and splits["train_file"].keys() != splits["validation_file"].keys():
        remedy = (
            f"has columns {', '.join(splits['validation_file'])}, but train_file has {', '.join(splits['train_file'])}"
        )
        problems.append(Problem("validation_file", config.validation_file, remedy))
    for name in ("max_train_samples", "max_eval_samples"):
        of = "train_file" if name == "max_train_samples" else "validation_file"
        if getattr(config, name) is not None and Path(getattr(config, of)).suffix.lower() == ".txt":
            problems.append(
                Problem(name, getattr(config, name), f"{of} is a single text; drop this option, or shorten the file")
            )
    if problems:
        raise UserError(problems)

    def dataset(columns: Columns, most: int | None) -> Dataset:
        rows = {name: values[:most] for name, values in columns.items()}
        return Dataset.from_dict({**rows, "index": list(range(len(next(iter(rows.values())))))})

    train = dataset(splits["train_file"], config.max_train_samples)
    validation = {"validation": dataset(splits["validation_file"], config.max_eval_samples)}
    task = Task(NAME, None, next(iter(splits["train_file"])), None, (), ("perplexity",))
    return TaskData(task, train, validation, (), 0, is_regression=False, is_language=True)


def _columns(field: str, path: str) -> Columns:
    if Path(path).suffix.lower() == ".txt":
        check_exists(field, Path(path))
        text = read_text(field, Path(path))
        if not text.strip():
            raise UserError(Problem(field, path, "contains no text; give a file with text"))
        return {"text": [text]}
    columns = read_columns(field, path)
    names = ("prompt", "response") if "response" in columns else ("text",)
    missing = [name for name in names if name not in columns]
    if missing:
        found = ", ".join(map(repr, columns))
        remedy = f"needs the columns prompt and response, or text (found {found}); or give a .txt file"
        raise UserError(Problem(field, path, remedy))
    for name in names:
        for row, text in enumerate(columns[name], start=1):
            if not isinstance(text, str) or (name != "prompt" and not text.strip()):
                raise UserError(Problem(field, path, f"row {row}: {name} is {text!r}; write some text"))
            if has_surrogate(text):
                remedy = f"row {row}: {name} holds half a surrogate pair; remove the character"
                raise UserError(Problem(field, path, remedy))
    return {name: columns[name] for name in names}


def tokenize_language(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """Tokenize into the columns input_ids, attention_mask, labels (one per token; `IGNORED` on prompts). Rows are not padded.

    Texts are joined and cut into blocks of `max_seq_length` tokens. A response ends with the end-of-sequence token; a row that
    is too long first loses the beginning of its prompt, then the end of its response. Raises UserError if nothing is left to
    learn, or if `max_seq_length` is more than the model accepts.
    """
    from datasets import Dataset

    if max_seq_length > tokenizer.model_max_length:
        remedy = f"must be at most {tokenizer.model_max_length}, the longest input the model accepts"
        raise UserError(Problem("max_seq_length", max_seq_length, remedy))
    if "response" in dataset.column_names:
        pairs = zip(dataset["prompt"], dataset["response"], strict=True)
        rows = [_instruction(prompt, response, tokenizer, max_seq_length) for prompt, response in pairs]
    else:
        rows = [(block, block) for block in _blocks(dataset["text"], tokenizer, max_seq_length)]
    if not rows:
        remedy = "the texts of train_file or of validation_file have fewer than two tokens; give more text"
        raise UserError(Problem("text", len(dataset), remedy))
    return Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in rows],
            "attention_mask": [[1] * len(ids) for ids, _ in rows],
            "labels": [labels for _, labels in rows],
        }
    )


def _instruction(prompt: str, response: str, tokenizer: Any, longest: int) -> tuple[list[int], list[int]]:
    first = tokenizer(prompt, verbose=False)["input_ids"]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start is not None and first[:2] == [start, start]:
        first = first[1:]  # the prompt already had one, from a chat template
    if first and first[-1] == end != start:
        first = first[:-1]  # the response follows
    second = _continuation(response, tokenizer)
    if end is not None and second[-1:] != [end]:
        second = [*second, end]
    second = second[: longest - 1]
    first = first[max(0, len(first) + len(second) - longest) :]
    return first + second, [IGNORED] * len(first) + second


def _continuation(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that follows another: SentencePiece would prepend a space to a text that comes first."""

    def ids(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])

    before, both = ids("\n"), ids("\n" + text)
    return both[len(before) :] if both[: len(before)] == before else ids(text)


def _blocks(texts: list[str], tokenizer: Any, longest: int) -> list[list[int]]:
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    blocks = [ids[start : start + longest] for start in range(0, len(ids), longest)]
    return [block for block in blocks if len(block) > 1]  # a single token has nothing to predict
