"""Loads the user's own files: columns sentence1[, sentence2], label. The kind of task is inferred from the labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunadapt_ds.data.readers import Columns, has_surrogate, read_columns, rename_text
from prunadapt_ds.data.tasks import OWN_METRICS, Task, TaskData
from prunadapt_ds.errors import Problem, UserError

INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
WHOLE = re.compile(r"([+-]?[0-9]{1,1000})(\.0*)?")
FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|nan)", re.IGNORECASE)
MOST_CLASSES = 10  # with more, whole numbers as labels may be numbers on a scale


@dataclass(frozen=True)
class _File:
    field: str
    path: str
    columns: Columns

    def problem(self, remedy: str) -> Problem:
        return Problem(self.field, self.path, remedy)


def load_files(
    paths: Mapping[str, str], problem_type: str | None = None, outputs: Sequence[tuple[str, ...]] | None = None
) -> tuple[Task, dict[str, Columns]]:
    """Read the files and infer the task, unless `problem_type` ("regression" or "single_label_classification") states it:
    regression if the training labels are floats, otherwise classification.

    `paths`: by option, "train_file" first. Class names are sorted, integers by value. `outputs`: for a validation file
    alone, what the model's outputs may be called, in their order, () for regression: the first that names all labels counts,
    or else the last. Returns the task and the columns of "train" and "validation", with labels encoded as int or float. Raises
    UserError with the problems of all files."""
    files: list[_File] = []
    problems: list[Problem] = []
    for field, path in paths.items():
        try:
            file = _File(field, str(path), read_columns(field, path))
        except UserError as error:
            problems.extend(error.problems)
            continue
        rename_text(file.columns)
        problems.extend(_column_problems(file))
        files.append(file)
    if problems:
        raise UserError(problems)

    paired = ["sentence2" in file.columns for file in files]
    for file, has_pair in zip(files[1:], paired[1:], strict=True):
        if has_pair != paired[0]:
            have, lack = (file, files[0]) if has_pair else (files[0], file)
            problems.append(
                lack.problem(f"has no column 'sentence2', but {have.field} does; use it in both files or in neither")
            )
    found = set(map(_text, files[0].columns["label"]))
    classes = None if outputs is None else next((names for names in outputs if found <= set(names)), outputs[-1])
    if problem_type == "single_label_classification" or (classes and all(map(INTEGER.fullmatch, classes))):
        for file in files:
            file.columns["label"] = _whole_numbers(file.columns["label"])
    kinds = [_kind(file.columns["label"]) for file in files]
    if classes is not None:
        regression = not classes
    else:
        regression = problem_type == "regression" or (problem_type is None and kinds[0] == "float")
    label_names, encoded = _scores(files, kinds, problems) if regression else _classes(files, kinds, problems, classes)
    if problems:
        raise UserError(problems)

    name = "own_regression" if regression else "own_classification"
    sentence2 = "sentence2" if paired[0] else None
    task = Task(name, None, "sentence1", sentence2, label_names, OWN_METRICS[name])
    texts = ("sentence1", "sentence2") if paired[0] else ("sentence1",)
    splits: dict[str, Columns] = {}
    for file, labels in zip(files, encoded, strict=True):
        columns = {text: file.columns[text] for text in texts}
        splits[file.field.removesuffix("_file")] = {**columns, "label": labels}
    return task, splits


def _whole_numbers(labels: list[Any]) -> list[Any]:
    """Rewrite class numbers with a decimal point ("1.0", as pandas writes them if one is missing) as whole numbers ("1")."""
    found = [WHOLE.fullmatch(_text(label)) for label in labels]
    return [match[1] for match in found if match] if all(found) else labels


def _column_problems(file: _File) -> list[Problem]:
    """Report missing columns and cells, texts that are not strings or cannot be encoded, and labels of other types."""
    missing = [name for name in ("sentence1", "label") if name not in file.columns]
    if missing:
        found = ", ".join(map(repr, file.columns))
        return [file.problem(f"columns missing: {', '.join(missing)}; found {found}; rename yours")]
    problems = []
    for name in ("sentence1", "sentence2"):
        for row, text in enumerate(file.columns.get(name, ()), start=1):
            if not isinstance(text, str) and not _is_missing(text):
                problems.append(file.problem(f"row {row}: {name} is {text!r}, not a text; write it as a string"))
                break
            if isinstance(text, str) and has_surrogate(text):
                problems.append(file.problem(f"row {row}: {name} holds half a surrogate pair; remove the character"))
                break
    for name in ("sentence1", "sentence2", "label"):
        cells = file.columns.get(name, [])
        without = [row for row, cell in enumerate(cells, start=1) if _is_missing(cell)]
        if without:
            remedy = f"the first is row {without[0]}; fill in or drop them"
            problems.append(file.problem(f"{len(without)} of {len(cells)} rows have no {name}, {remedy}"))
    labels = file.columns["label"]
    strange = next((row for row, x in enumerate(labels, start=1) if not isinstance(x, str | int | float | None)), 0)
    if strange:
        remedy = f"row {strange}: label {labels[strange - 1]!r} is neither a name nor a number; write one of these"
        problems.append(file.problem(remedy))
    halved = next((row for row, x in enumerate(labels, start=1) if isinstance(x, str) and has_surrogate(x)), 0)
    if halved:
        problems.append(file.problem(f"row {halved}: the label holds half a surrogate pair; remove the character"))
    return problems


def _is_missing(cell: Any) -> bool:
    """Whether a row has no text or label there: an empty cell, null, or the NaN that pandas writes for it."""
    return cell is None or str(cell).strip() == "" or (isinstance(cell, float) and math.isnan(cell))


def _text(label: Any) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label).strip()


def _kind(labels: list[Any]) -> str:
    """The kind of the labels: "integer", "float" (all are numbers, at least one not an integer) or "name"."""
    texts = dict.fromkeys(map(_text, labels))
    if all(INTEGER.fullmatch(text) for text in texts):
        return "integer"
    return "float" if all(FLOAT.fullmatch(text) for text in texts) else "name"


def _scores(files: list[_File], kinds: list[str], problems: list[Problem]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Encode labels as floats. Appends to `problems`."""
    encoded = []
    for file, kind in zip(files, kinds, strict=True):
        if kind == "name":
            odd = next(text for text in map(_text, file.columns["label"]) if not FLOAT.fullmatch(text))
            theirs = "this is a regression" if file is files[0] else "labels in train_file are numbers"
            problems.append(file.problem(f"label {odd!r} is a name, but {theirs}; write numbers"))
            encoded.append([0.0])
            continue
        scores = [float(_text(label)) for label in file.columns["label"]]
        bad = next((row for row, score in enumerate(scores, start=1) if not math.isfinite(score)), 0)
        if bad:
            problems.append(file.problem(f"row {bad}: label {scores[bad - 1]} is not finite; give a number or drop it"))
        elif file.field == "train_file" and len(set(scores)) == 1:
            problems.append(file.problem(f"every label is {scores[0]}: there is nothing to learn; give varied labels"))
        encoded.append(scores)
    return (), encoded


def _classes(
    files: list[_File], kinds: list[str], problems: list[Problem], known: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Encode labels as 0..C-1, in the order of the `known` names, or else in the sorted order of train_file's.

    Appends to `problems`.
    """
    source = "train_file" if known is None else "the model"
    defining = list(map(_text, files[0].columns["label"])) if known is None else list(known)
    numeric = all(INTEGER.fullmatch(text) for text in defining)
    # Codes such as 0111 keep their spelling; otherwise +1 and 1 are the same class.
    has_codes = any(re.match(r"[+-]?0[0-9]", text) for text in defining)

    def name_of(label: Any) -> str:
        text = _text(label)
        return str(int(text)) if numeric and not has_codes and INTEGER.fullmatch(text) else text

    seen = set(map(name_of, defining))
    names = known or tuple(sorted(seen, key=lambda name: (int(name), name)) if numeric else sorted(seen))
    if len(names) == 1:
        problems.append(files[0].problem(f"every label is {names[0]!r}: one class only; give at least two"))
    for file, kind in zip(files, kinds, strict=True):
        unseen = sorted(set(map(name_of, file.columns["label"])) - seen)
        if not unseen:
            continue
        shown = ", ".join(map(repr, unseen[:5])) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
        if kind == "float" or (numeric and kind == "name"):
            theirs = "integers" if numeric else "names"
            what = "floats" if kind == "float" else "names"
            remedy = f"labels are {what} ({shown}), but {theirs} in {source}; use one kind"
            if numeric and kind == "float" and known is None:
                remedy += " (if labels are numbers on a scale, pass --problem_type regression)"
        else:
            theirs = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
            remedy = f"labels never seen in {source}: {shown}; known are {theirs}"
            if numeric and known is None:
                remedy += " (if labels are numbers on a scale, pass --problem_type regression)"
        problems.append(file.problem(remedy))
    place = {name_of(name): i for i, name in enumerate(names)}
    return names, [[place.get(name_of(label), -1) for label in file.columns["label"]] for file in files]


def doubts(data: TaskData, problem_type: str | None = None) -> list[str]:
    """What may be a mistake in the user's own files although it can be trained on. `problem_type`: as the user stated it, if so."""
    names, validation = data.task.label_names, data.validation["validation"]
    found = []
    if len(names) > MOST_CLASSES and problem_type is None and all(map(INTEGER.fullmatch, names)):
        found.append(
            f"{len(names)} whole numbers are taken for classes; for numbers on a scale, pass --problem_type regression"
        )
    wanted = set(_texts(validation))
    trained_on = {texts for texts in _texts(data.train) if texts in wanted}
    again = sum(texts in trained_on for texts in _texts(validation))
    if again * 2 >= len(validation):
        found.append(
            f"{again} of {len(validation)} validation texts are trained on too: the score says little about new ones"
        )
    labels = set(validation["label"])
    if len(labels) == 1:
        label = names[labels.pop()] if names else labels.pop()
        found.append(
            f"every validation label is {label!r}: the score cannot tell a good model from one that always says so"
        )
    return found


def _texts(split: Any) -> Iterator[tuple[str, ...]]:
    """The text, or the pair of texts, of each row of a data set."""
    return zip(*(split[name] for name in ("sentence1", "sentence2") if name in split.column_names), strict=True)
