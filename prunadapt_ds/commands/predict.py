"""Predicts with a trained folder, for the rows of a file or of standard input, or for GLUE's test sets as a submission."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from prunadapt_ds import answers, distributed, files
from prunadapt_ds.answers import Answerer
from prunadapt_ds.commands import submission
from prunadapt_ds.data import Columns, blank_line, read_columns, rename_text
from prunadapt_ds.entry import guarded
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.options import Usage, option, read
from prunadapt_ds.trained_folder import refuse_other_inputs

STANDARD = "-"  # standard input, standard output
NOT_UTF_8 = re.compile("[\udc80-\udcff]")  # what the error handler "surrogateescape" makes of other bytes
LIKE_JSON = re.compile(r"""[\s\[]*\{\s*["'](sentence1|sentence2|text)["']\s*:""")  # also Python's own notation
USAGE = Usage(
    "Predict every row of a file or of standard input with a trained folder: the export of a run, or any stock "
    "classifier. With --glue_submission, predict GLUE's test sets with the folders of several runs instead.",
    "prunadapt predict --model_name_or_path outputs/exports/compact --input_file new.csv --output_file answers.csv",
)
FIELDS = ("sentence1", "sentence2")
NEEDED = {
    "model_name_or_path": "name the folder to predict with, e.g. outputs/exports/compact",
    "input_file": "name the file with the inputs, or - for standard input",
}


@dataclass
class PredictOptions:
    """Model and rows."""

    model_name_or_path: str | None = option(None, "folder or hub ID of a trained classifier or regressor")
    trust_remote_code: bool = option(
        False, "run modelling code that comes with a model; not needed for exports of this program"
    )
    input_file: str | None = option(
        None,
        "csv, tsv, jsonl, json or parquet with sentence1[, sentence2]; `-`: standard input, one text or JSON object per line",
    )
    output_file: str | None = option(
        None, "csv or jsonl, `-`: jsonl on standard output [-]; with --glue_submission the zip [submission.zip]"
    )
    label_names: list[str] | None = option(None, "names of the labels, in the model's order [those in its config]")
    max_seq_length: int | None = option(
        None, "tokens; longer inputs are truncated [as in the run that wrote the folder; 128 for other models]", least=4
    )
    per_device_eval_batch_size: int = option(64, "rows per rank that are answered together", least=1)


@dataclass
class SubmissionOptions:
    """GLUE's leaderboard."""

    glue_submission: bool = option(
        False, "predict the test sets in --data_dir and write the zip file for the leaderboard"
    )
    run_root: str | None = option(
        None, "folder of finished runs; for each task, the run with the best development score is used"
    )
    task_models: list[str] | None = option(None, "TASK=DIR: folders to use instead of runs, or for tasks without runs")
    data_dir: str | None = option(None, "official GLUE TSVs, one folder per task, with their test files")


SECTIONS = {"predict": PredictOptions, "submission": SubmissionOptions}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv`. Returns the exit code."""
    return guarded(lambda: run(argv))


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command. Collective. Raises UserError on all ranks; options are checked before anything is written."""
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
            remedy = "cannot be combined with --glue_submission; name folders with --run_root or --task_models"
            found.append(Problem(name, getattr(options, name), remedy))
        if not glue.data_dir:
            found.append(Problem("data_dir", None, "--glue_submission needs the folder with the official test files"))
        if not glue.run_root and not glue.task_models:
            found.append(
                Problem("run_root", None, "--glue_submission needs --run_root, --task_models TASK=DIR, or both")
            )
        if options.output_file and Path(options.output_file).suffix != ".zip":
            found.append(Problem("output_file", options.output_file, "a submission must be a .zip file"))
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
    except OSError:  # one of them does not exist
        return False


# ----------------------------------------------------------------------------------------------------------- rows in


def predict_rows(options: PredictOptions) -> None:
    """Predict the rows of a file on all ranks, while rank 0 reads and writes them chunk by chunk. Collective.

    An empty text is answered like any other, so that there is an answer for every row; rank 0 says how many there were.
    """
    output = options.output_file or STANDARD
    write = WRITERS[Path(output).suffix.lower() or ".jsonl"]
    with contextlib.ExitStack() as stack:
        sink: list[IO[str]] = []  # the output on rank 0; empty elsewhere

        def open_output() -> None:
            sink.append(stack.enter_context(_output(output)))

        rows = shared_input(str(options.input_file))
        first = next(rows)  # reports errors in the file before a model is loaded
        distributed.on_rank_0(f"opening {output}", open_output)
        answerer = answers.load(
            str(options.model_name_or_path),
            options.trust_remote_code,
            options.max_seq_length,
            options.per_device_eval_batch_size,
            label_names=tuple(options.label_names or ()),
        )
        refuse_other_inputs(str(options.model_name_or_path), has_pairs="sentence2" in first)
        count = 0
        blank: list[int] = []
        chunk: Columns | None = first
        while chunk is not None:
            logits = answerer.logits(chunk)
            start = count
            blank += [
                i for i, texts in enumerate(zip(*chunk.values(), strict=True), start) if not all(map(str.strip, texts))
            ]

            def write_chunk(start: int = start, logits: Tensor = logits) -> bool:
                try:
                    write(sink[0], answered(logits, answerer, start), start == 0)
                except BrokenPipeError:  # `head`, for one, has read all that it wanted
                    _discard(sink[0])
                    return False
                return True

            is_read = distributed.on_rank_0(f"writing {output}", write_chunk)
            count += len(logits)
            chunk = next(rows, None) if is_read else None
        distributed.on_rank_0(f"writing {output}", stack.close)
    if distributed.rank() == 0:
        without = f", {len(blank)} of them without a text (the first has index {blank[0]})" if blank else ""
        print(f"answered {count} rows{without}", file=sys.stderr)


def shared_input(path: str) -> Iterator[Columns]:
    """Yield the input's texts on every rank, chunk by chunk. Raises UserError for an invalid row and if there are no rows."""
    source: Iterator[Columns] = iter(())
    if distributed.rank() == 0:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # whatever the locale is
        rows = checked(standard_rows(sys.stdin), path) if path == STANDARD else all_checked(path)
        source = answers.chunks(rows)
    return answers.shared("reading the input", source)


def all_checked(path: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a file once all of them were checked (standard input, which may never end, cannot wait for that)."""
    yield from list(checked(file_rows(path), path))


def file_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield the texts of a csv, tsv, jsonl, json or parquet file, without its other columns. Raises UserError."""
    columns = read_columns("input_file", path, blank_lines=False)
    rename_text(columns)
    if "sentence1" not in columns:
        found = ", ".join(map(repr, columns))
        raise UserError(Problem("input_file", path, f"column sentence1 is missing; found {found}; rename yours"))
    names = [name for name in FIELDS if name in columns]
    for values in zip(*(columns[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def standard_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of standard input: JSON objects if the first line is one, otherwise every line, even if empty, is a text.

    Raises UserError for a JSON row after a text or the reverse, for what was meant as JSON but is not one object per line, for
    a blank line between JSON rows, and for bytes that are not UTF-8.
    """

    def refuse(remedy: str) -> UserError:
        return UserError(Problem("input_file", STANDARD, remedy))

    is_json: bool | None = None
    blank = 0  # the first blank line behind the last JSON row
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n").removeprefix("\ufeff" if number == 1 else "")
        if NOT_UTF_8.search(text):
            raise refuse(f"line {number} is not UTF-8; convert the input, e.g. iconv -f latin1 -t utf-8")
        record = _object(text)
        is_json = record is not None if is_json is None else is_json
        if not is_json:
            if record is not None and record.keys() & {"sentence1", "text"}:
                raise refuse(f"line {number} is a JSON object, but the first line was not; give one kind")
            if LIKE_JSON.match(text) or (number == 1 and text.strip() in ("{", "[", "[{")):
                remedy = 'give one object per line, such as {"sentence1": "a text"}, or put JSON into a file of its own'
                raise refuse(f"line {number} looks like a part of JSON; {remedy}")
            yield {"sentence1": text}
        elif record is not None:
            if blank:
                raise refuse(blank_line(blank))
            rename_text(record)
            yield {name: record[name] for name in FIELDS if name in record}
        elif text.strip():
            raise refuse(f"line {number} is not a JSON object, but the first line was one")
        else:
            blank = blank or number


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def checked(rows: Iterable[dict[str, Any]], path: str) -> Iterator[dict[str, str]]:
    """Yield the rows after checking that all have the same columns and only text. Raises UserError at the first that does not."""
    names: list[str] | None = None
    for number, row in enumerate(rows, start=1):

        def problem(remedy: str, number: int = number) -> UserError:
            return UserError(Problem("input_file", path, f"row {number}: {remedy}"))

        names = list(row) if names is None else names
        if "sentence1" not in row:
            raise problem("has no sentence1")
        if list(row) != names:
            raise problem(f"has {' and '.join(row)}, but the first row has {' and '.join(names)}")
        for name, text in row.items():
            if not isinstance(text, str):
                raise problem(f"{name} is {text!r}, not a text; write it as a string")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise problem(f"{name} holds half a surrogate pair; remove the character") from None
        yield row
    if names is None:
        raise UserError(Problem("input_file", path, "has no rows"))


# ---------------------------------------------------------------------------------------------------------- rows out


def answered(logits: Tensor, answerer: Answerer, start: int) -> Iterator[dict[str, Any]]:
    """Yield each row's index (from `start`), prediction (a label's name or, for regression, a number) and label probabilities.

    logits: [N, C], see `Answerer.logits`.
    """
    if not answerer.label_names:
        for i, value in enumerate(logits[:, 0].tolist(), start=start):
            yield {"index": i, "prediction": float(f"{value:.7g}")}  # labels may have any unit
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


def _discard(file: IO[str]) -> None:
    """Send what `file` still holds to nowhere: it could not be closed otherwise once its reader is gone."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


@contextlib.contextmanager
def _output(path: str) -> Iterator[IO[str]]:
    """Open the output: a file that appears complete or not at all, or standard output.

    Meanwhile, what libraries print to standard output goes to standard error.
    """
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
