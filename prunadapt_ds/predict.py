"""Answers of a trained folder for a file or for standard input, in its order; or for GLUE's test sets, for the leaderboard."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from prunadapt_ds import answers, distributed, files, submission
from prunadapt_ds.answers import Answerer
from prunadapt_ds.data import Columns, read_columns
from prunadapt_ds.entry import guarded
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.options import Usage, option, read

STANDARD = "-"  # standard input, standard output
USAGE = Usage(
    "Answer every row of a file or of standard input with a trained folder: one that a run has exported, or any stock "
    "classifier. Or, with --glue_submission, GLUE's test sets with the folders of several runs.",
    "prunadapt predict --model_name_or_path outputs/exports/compact --input_file new.csv --output_file answers.csv",
)
FIELDS = ("sentence1", "sentence2")
NEEDED = {
    "model_name_or_path": "name the folder to answer with, e.g. outputs/exports/compact",
    "input_file": "name the file to answer, or - for standard input",
}


@dataclass
class PredictOptions:
    """Model and rows."""

    model_name_or_path: str | None = option(None, "folder or hub id of a trained classifier or regressor")
    trust_remote_code: bool = option(False, "run modelling code that comes with a model; a folder of ours needs none")
    input_file: str | None = option(
        None,
        "csv, tsv, jsonl or parquet with sentence1[, sentence2]; `-`: standard input, a text or a JSON object a line",
    )
    output_file: str | None = option(
        None, "csv or jsonl, `-`: jsonl on standard output [-]; with --glue_submission the zip [submission.zip]"
    )
    label_names: list[str] | None = option(None, "what the labels are called, in the model's order (as it says itself)")
    max_seq_length: int | None = option(
        None, "tokens; longer inputs are truncated (as in the run that wrote the folder; of other models 128)", least=4
    )
    per_device_eval_batch_size: int = option(64, "rows per rank that are answered together", least=1)


@dataclass
class SubmissionOptions:
    """GLUE's leaderboard."""

    glue_submission: bool = option(
        False, "answer the test sets in --data_dir and write the zip that the leaderboard takes"
    )
    run_root: str | None = option(
        None, "folder of finished runs; of several runs of a task the one with the best development score answers"
    )
    task_models: list[str] | None = option(None, "TASK=DIR: folders instead of runs, or for tasks that have none")
    data_dir: str | None = option(None, "official GLUE TSVs, one folder per task, with their test files")


SECTIONS = {"predict": PredictOptions, "submission": SubmissionOptions}


def main(argv: Sequence[str] | None = None) -> int:
    """Answer what `argv` names; returns the exit code."""
    return guarded(lambda: run(argv))


def run(argv: Sequence[str] | None = None) -> None:
    """Collective. Raises UserError, on all ranks alike and before anything is written, for what does not fit together."""
    found, given, problems = read(argv, SECTIONS, USAGE)
    options, glue = found["predict"], found["submission"]
    problems += _contradictions(options, glue, given)
    if problems:
        raise UserError(problems)
    distributed.init()
    if glue.glue_submission:
        submission.run(
            Path(options.output_file or "submission.zip"),
            data_dir=glue.data_dir,
            run_root=glue.run_root,
            task_models=glue.task_models or [],
            trust_remote_code=options.trust_remote_code,
            max_seq_length=options.max_seq_length,
            batch_size=options.per_device_eval_batch_size,
        )
    else:
        predict_rows(options)


def _contradictions(options: PredictOptions, glue: SubmissionOptions, given: frozenset[str]) -> list[Problem]:
    found = []
    if glue.glue_submission:
        for name in sorted(given & {"model_name_or_path", "input_file", "label_names"}):
            remedy = "not together with --glue_submission; name folders with --run_root or --task_models"
            found.append(Problem(name, getattr(options, name), remedy))
        if not glue.data_dir:
            found.append(Problem("data_dir", None, "--glue_submission needs the folder with the official test files"))
        if not glue.run_root and not glue.task_models:
            found.append(
                Problem("run_root", None, "--glue_submission needs --run_root, --task_models TASK=DIR, or both")
            )
        if options.output_file and Path(options.output_file).suffix != ".zip":
            found.append(Problem("output_file", options.output_file, "a submission is a .zip"))
        return found
    for name in sorted(given & {"run_root", "task_models", "data_dir"}):
        found.append(Problem(name, getattr(glue, name), "needs --glue_submission"))
    for name in ("model_name_or_path", "input_file"):
        if getattr(options, name) is None:
            found.append(Problem(name, None, NEEDED[name]))
    output = options.output_file or STANDARD
    if output != STANDARD and Path(output).suffix.lower() not in WRITERS:
        found.append(Problem("output_file", output, f"must end in {' or '.join(WRITERS)}, or be `-`"))
    if output != STANDARD and options.input_file and _same_file(output, options.input_file):
        found.append(Problem("output_file", output, "is the input file; name another"))
    if len(set(options.label_names or ())) < len(options.label_names or ()):
        found.append(Problem("label_names", " ".join(options.label_names or ()), "names a label twice"))
    return found


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


# ----------------------------------------------------------------------------------------------------------- rows in


def predict_rows(options: PredictOptions) -> None:
    """Rank 0 reads and writes chunk by chunk; all ranks answer."""
    output = options.output_file or STANDARD
    write = WRITERS[Path(output).suffix.lower() or ".jsonl"]
    with contextlib.ExitStack() as stack:
        sink: list[IO[str]] = []  # of rank 0

        def open_output() -> None:
            sink.append(stack.enter_context(_output(output)))

        rows = shared_input(str(options.input_file))
        first = next(rows)  # a mistake in the file is said before a model is loaded
        distributed.on_rank_0(f"opening {output}", open_output)
        answerer = answers.load(
            str(options.model_name_or_path),
            options.trust_remote_code,
            options.max_seq_length,
            options.per_device_eval_batch_size,
            label_names=tuple(options.label_names or ()),
        )
        count = 0
        chunk: Columns | None = first
        while chunk is not None:
            logits = answerer.logits(chunk)
            start = count

            def write_chunk(start: int = start, logits: Tensor = logits) -> None:
                write(sink[0], answered(logits, answerer, start), start == 0)

            distributed.on_rank_0(f"writing {output}", write_chunk)
            count += len(logits)
            chunk = next(rows, None)
        distributed.on_rank_0(f"writing {output}", stack.close)
    if distributed.rank() == 0:
        print(f"answered {count} rows", file=sys.stderr)


def shared_input(path: str) -> Iterator[Columns]:
    """The input's texts on every rank, chunk by chunk. Raises UserError for a row that is none, and where there is no row."""
    source: Iterator[Columns] = iter(())
    if distributed.rank() == 0:
        rows = standard_rows(sys.stdin) if path == STANDARD else file_rows(path)
        source = answers.chunks(checked(rows, path))
    return answers.shared("reading the input", source)


def file_rows(path: str) -> Iterator[dict[str, Any]]:
    """Rows of a csv, tsv, jsonl or parquet file; other columns than the texts are left out."""
    columns = read_columns("input_file", path)
    if "sentence1" not in columns:
        found = ", ".join(map(repr, columns))
        raise UserError(Problem("input_file", path, f"column sentence1 is missing; found {found}; rename yours"))
    names = [name for name in FIELDS if name in columns]
    for values in zip(*(columns[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def standard_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows of standard input: JSON objects where the first line is one, otherwise every line is a text, an empty one too."""
    is_json: bool | None = None
    try:
        for number, line in enumerate(lines, start=1):
            text = line.rstrip("\r\n")
            record = _object(text) if is_json is not False else None
            is_json = record is not None if is_json is None else is_json
            if not is_json:
                yield {"sentence1": text}
            elif record is not None:
                yield {name: record[name] for name in FIELDS if name in record}
            elif text.strip():
                raise UserError(
                    Problem("input_file", STANDARD, f"line {number} is no JSON object, the first line was one")
                )
    except UnicodeDecodeError as error:
        raise UserError(Problem("input_file", STANDARD, f"is not UTF-8 text: {error.reason}")) from None


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def checked(rows: Iterable[dict[str, Any]], path: str) -> Iterator[dict[str, str]]:
    """The rows, all with the same texts. Raises UserError at the first that is not."""
    names: list[str] | None = None
    for number, row in enumerate(rows, start=1):

        def problem(remedy: str, number: int = number) -> UserError:
            return UserError(Problem("input_file", path, f"row {number}: {remedy}"))

        names = list(row) if names is None else names
        if "sentence1" not in row:
            raise problem("has no sentence1")
        if list(row) != names:
            raise problem(f"has {' and '.join(row)}, the first row {' and '.join(names)}")
        for name, text in row.items():
            if not isinstance(text, str):
                raise problem(f"{name} is {text!r}, not a text; write it as a string")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise problem(f"{name} holds half a character of UTF-16; remove it") from None
        yield row
    if names is None:
        raise UserError(Problem("input_file", path, "has no rows"))


# ---------------------------------------------------------------------------------------------------------- rows out


def answered(logits: Tensor, answerer: Answerer, start: int) -> Iterator[dict[str, Any]]:
    """Index from `start`, prediction (a label's name, or of regression the number) and each label's probability."""
    if not answerer.label_names:
        for i, value in enumerate(logits[:, 0].tolist(), start=start):
            yield {"index": i, "prediction": round(value, 6)}
        return
    best, shares = logits.argmax(dim=1).tolist(), logits.softmax(dim=1).tolist()
    for i, (place, row) in enumerate(zip(best, shares, strict=True)):
        named = {name: round(share, 6) for name, share in zip(answerer.label_names, row, strict=True)}
        yield {"index": start + i, "prediction": answerer.label_names[place], "probabilities": named}


def write_jsonl(file: IO[str], rows: Iterable[dict[str, Any]], first: bool) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def write_csv(file: IO[str], rows: Iterable[dict[str, Any]], first: bool) -> None:
    writer = csv.writer(file, lineterminator="\n")
    for row in rows:
        shares = row.get("probabilities", {})
        if first:
            writer.writerow(["index", "prediction", *(f"probability_{name}" for name in shares)])
            first = False
        writer.writerow([row["index"], row["prediction"], *shares.values()])


WRITERS = {".csv": write_csv, ".jsonl": write_jsonl}


@contextlib.contextmanager
def _output(path: str) -> Iterator[IO[str]]:
    """A file that is complete or not there; or standard output, for the rows alone: what libraries print goes to standard error."""
    if path != STANDARD:
        try:
            with files.whole_file(Path(path)) as file:
                yield file
        except OSError as error:
            raise UserError(Problem("output_file", path, f"cannot be written ({error.strerror})")) from error
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as file, contextlib.redirect_stdout(sys.stderr):
            yield file
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
