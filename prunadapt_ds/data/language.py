"""Text for language modelling: plain text, or prompts with responses or conversations, where only the answers are learnt."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
from collections.abc import Iterable, Iterator
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
DATE = (2024, 7, 26)  # of chat templates that write one: Llama's own where it knows no other
SAME_AS_RESPONSE = ("completion", "output")
FORMS = (("prompt", "response"), ("messages",), ("text",))  # columns of a file; the first form whose last one is there


def load_language(config: Any) -> TaskData:
    """Load datasets with the columns of one of `FORMS`, and index. `config`: the data options.

    A .txt file is a single text; csv, tsv, jsonl, json and parquet files have the columns prompt and response (or completion,
    or output), messages (lists of {"role", "content"} that end with the assistant's), or text. Raises UserError with the
    problems of both files.
    """
    task, (train, validation) = _read(config, "train_file", "validation_file")
    return TaskData(task, train, {"validation": validation})


def load_language_validation(config: Any) -> tuple[Task, dict[str, Dataset]]:
    """The task and the validation set alone, by key. As `load_language`."""
    task, (validation,) = _read(config, "validation_file")
    return task, {"validation": validation}


def _read(config: Any, *fields: str) -> tuple[Task, list[Dataset]]:
    """The task and the dataset of each of the options `fields`, the last of which is validation_file."""
    from datasets import Dataset

    problems: list[Problem] = []
    splits: dict[str, Columns] = {}
    limits = {"train_file": "max_train_samples", "validation_file": "max_eval_samples"}
    for field in fields:
        try:
            splits[field] = _columns(field, getattr(config, field))
        except UserError as error:
            problems += error.problems
    if not problems and splits[fields[0]].keys() != splits["validation_file"].keys():
        remedy = (
            f"has columns {', '.join(splits['validation_file'])}, but train_file has {', '.join(splits['train_file'])}"
        )
        problems.append(Problem("validation_file", config.validation_file, remedy))
    for of in fields:
        name = limits[of]
        if getattr(config, name) is not None and Path(getattr(config, of)).suffix.lower() == ".txt":
            problems.append(
                Problem(name, getattr(config, name), f"{of} is a single text; drop this option, or shorten the file")
            )
    if problems:
        raise UserError(problems)

    def dataset(columns: Columns, most: int | None) -> Dataset:
        rows = {name: values[:most] for name, values in columns.items()}
        return Dataset.from_dict({**rows, "index": list(range(len(next(iter(rows.values())))))})

    task = Task(NAME, None, next(iter(splits["validation_file"])), None, (), ("perplexity",), is_language=True)
    return task, [dataset(splits[field], getattr(config, limits[field])) for field in fields]


def _columns(field: str, path: str) -> Columns:
    if Path(path).suffix.lower() == ".txt":
        check_exists(field, Path(path))
        text = read_text(field, Path(path))
        if not text.strip():
            raise UserError(Problem(field, path, "contains no text; give a file with text"))
        return {"text": [text]}
    columns = read_columns(field, path)
    if "prompt" in columns and "response" not in columns:
        renamed = next((name for name in SAME_AS_RESPONSE if name in columns), None)
        if renamed:
            columns["response"] = columns.pop(renamed)
    names = next((form for form in FORMS if form[-1] in columns), FORMS[-1])
    if any(name not in columns for name in names):
        found = ", ".join(map(repr, columns))
        remedy = f"needs the columns prompt and response, messages, or text (found {found}); or give a .txt file"
        raise UserError(Problem(field, path, remedy))
    if names == ("messages",):
        return {"messages": [_conversation(field, path, row, m) for row, m in enumerate(columns["messages"], start=1)]}
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

    Texts are joined and cut into blocks of `max_seq_length` tokens. A conversation is written out by the tokenizer's chat
    template, and its last answer is the response. A response ends with the end-of-sequence token; a row that is too long first
    loses the beginning of its prompt, then the end of its response. Raises UserError if nothing is left to learn, if
    `max_seq_length` is more than the model accepts, or if there are conversations and the tokenizer has no chat template.
    """
    from datasets import Dataset

    if max_seq_length > tokenizer.model_max_length:
        remedy = f"must be at most {tokenizer.model_max_length}, the longest input the model accepts"
        raise UserError(Problem("max_seq_length", max_seq_length, remedy))
    pairs: Iterable[tuple[str, str]] | None = None
    if "messages" in dataset.column_names:
        pairs = map(functools.partial(_as_pair, tokenizer), map(json.loads, dataset["messages"]))
    elif "response" in dataset.column_names:
        pairs = zip(dataset["prompt"], dataset["response"], strict=True)
    if pairs is not None:
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


def _conversation(field: str, path: str, row: int, messages: Any) -> str:
    """Check a conversation and return it as JSON, since columns of a table would give every message the keys of all others.

    Raises UserError.
    """
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and "role" in m and "content" in m for m in messages
    ):
        remedy = (
            f'row {row}: messages is not a list of objects like {{"role": "user", "content": "a text"}}; write that'
        )
        raise UserError(Problem(field, path, remedy))
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        remedy = (
            f"row {row}: messages must end with an assistant's, which is what is learnt, and begin with another; add it"
        )
        raise UserError(Problem(field, path, remedy))
    for message in messages:
        content = message["content"]
        if not isinstance(content, str | list) or (message is messages[-1] and not str(content or "").strip()):
            remedy = f"row {row}: the content of a message ({message['role']}) is {content!r}; write some text"
            raise UserError(Problem(field, path, remedy))
    text = json.dumps(messages)
    if has_surrogate("".join(str(m["content"]) for m in messages)):
        raise UserError(Problem(field, path, f"row {row}: messages holds half a surrogate pair; remove the character"))
    return text


def _as_pair(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """Split a conversation into the prompt up to its last answer, and that answer with what the template puts behind it.

    Raises UserError if the tokenizer has no chat template or the template rejects the conversation.
    """
    name = getattr(tokenizer, "name_or_path", "")
    if not tokenizer.chat_template:
        remedy = "its tokenizer has no chat template, which messages need; give the columns prompt and response"
        raise UserError(Problem("model_name_or_path", name, remedy))
    try:
        with _same_date_always():
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template's own words: roles that must alternate, no system message
        remedy = f"its chat template refuses a conversation ({error}); change that one, or give prompt and response"
        raise UserError(Problem("model_name_or_path", name, remedy)) from error
    if not whole.startswith(prompt):
        # Some templates rewrite what comes before an answer (hidden thoughts, for one).
        return prompt, str(messages[-1]["content"])
    return prompt, whole[len(prompt) :].rstrip()


@contextlib.contextmanager
def _same_date_always() -> Iterator[None]:
    """Give templates that write today's date another one: ranks around midnight, and a run that is resumed another day, must read
    the same tokens."""
    from transformers.utils import chat_template_utils

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Then:
            return cls(*DATE, tzinfo=tz)

    plain = chat_template_utils.datetime
    chat_template_utils.datetime = Then  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        chat_template_utils.datetime = plain  # type: ignore[misc]


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
