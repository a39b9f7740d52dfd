"""Reads files into columns. Error messages name the file, the row and the remedy.

Delimited text is parsed here rather than with pandas, which would turn the words "NA" and "null" into missing values, 007
into 7, and swallow rows after a stray quotation mark. Everything is read into memory, so processes that read the same file
share no cache and need no lock.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prunadapt_ds.errors import Problem, UserError

Columns = dict[str, list[Any]]
LINE_END = re.compile("\r\n|\r|\n")
SURROGATE = re.compile("[\ud800-\udfff]")
DELIMITERS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}


def read_columns(field: str, path: str | Path, *, blank_lines: bool = True) -> Columns:
    """Read a csv, tsv, jsonl, json or parquet file, depending on its extension.

    `field` is the option that the path came from; only messages use it. `blank_lines`: skip them; if False, one before the last
    row is refused. Raises UserError if the file is missing, empty, ragged, not UTF-8, has only a header or an unknown
    extension, and so on."""
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        raise UserError(Problem(field, str(path), f"unknown extension {path.suffix!r}; use one of {known}"))
    check_exists(field, path)
    columns = reader(field, path, blank_lines)
    if not columns or not next(iter(columns.values())):
        found = f" (columns: {', '.join(columns)})" if columns else ""
        raise UserError(Problem(field, str(path), f"has no rows{found}; give a file with data"))
    return columns


def check_exists(field: str, path: Path) -> None:
    """Raise UserError unless `path` is a non-empty file."""
    problem = None
    if os.path.isdir(path):
        problem = "is a folder; give a file"
    elif not os.path.isfile(path):  # Path.is_file raises for some names, such as one that is too long
        siblings: list[str] = []
        with contextlib.suppress(OSError):  # the folder may be missing, or not ours to list
            siblings = os.listdir(path.parent)
        close = difflib.get_close_matches(path.name, siblings, n=1)
        problem = "no such file" + (f"; did you mean {str(path.parent / close[0])!r}?" if close else "; check the path")
    elif path.stat().st_size == 0:
        problem = "the file is empty; give a file with data"
    if problem:
        raise UserError(Problem(field, str(path), problem))


def read_text(field: str, path: Path) -> str:
    """The file's text, without a byte order mark. Raises UserError if it cannot be read or is not UTF-8 text."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(Problem(field, str(path), f"cannot be read ({error.strerror}); check its mode")) from None
    nul = raw.find(b"\0")
    if nul >= 0:
        remedy = f"NUL byte at byte {nul}: not text; save it as UTF-8 (from UTF-16: iconv -f utf-16 -t utf-8)"
        raise UserError(Problem(field, str(path), remedy))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        remedy = f"line {line} is not UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8"
        raise UserError(Problem(field, str(path), remedy)) from None


def blank_line(number: int) -> str:
    """What to do about a blank line where rows are answered."""
    return f'line {number} is blank, and answers are numbered by rows: remove it, or write a row with an empty text, "", there'


def _refuse_blank_lines(field: str, path: Path, rows: Iterable[tuple[int, int]]) -> None:
    """Raise UserError if there are lines that belong to no row before the last one. `rows`: (first line, last line) of each."""
    end = 0
    for first, last in rows:
        if first > end + 1:
            raise UserError(Problem(field, str(path), blank_line(end + 1)))
        end = last


def _delimited(field: str, path: Path, delimiter: str, blank_lines: bool) -> Columns:
    text = read_text(field, path)
    rows = _quoted_rows(text, delimiter)
    if isinstance(rows, str):
        # Tab-separated files are often written without quoting, as GLUE's are: a quotation mark is then just text.
        if delimiter != "\t":
            first = text.split("\n", 1)[0]
            if delimiter not in first:
                _refuse_other_delimiter(field, path, first)
            remedy = f'{rows}; quote texts that hold a {DELIMITERS[delimiter]} or a ", and double the " inside'
            raise UserError(Problem(field, str(path), remedy))
        rows = _plain_rows(text)
    elif delimiter == "\t" and '"' in text:
        # Two stray quotation marks in different rows would merge all rows between them into one.
        plain = _plain_rows(text)
        if len(plain) > len(rows) and len({len(row) for _, row in plain}) == 1:
            rows = plain
    if not rows:
        raise UserError(Problem(field, str(path), "the file is empty; give a file with data"))
    header = [name.strip() for name in rows[0][1]]
    if len(header) == 1:
        _refuse_other_delimiter(field, path, header[0])
    check_duplicates(field, path, header)
    for line, row in rows[1:]:
        if len(row) != len(header):
            remedy = f"line {line} has {len(row)} columns, the header has {len(header)}; fix or quote it"
            raise UserError(Problem(field, str(path), remedy))
    if not blank_lines:
        inside = [sum(len(LINE_END.findall(cell)) for cell in row) for _, row in rows]
        spans = ((line - more, line) for (line, _), more in zip(rows, inside, strict=True))
        _refuse_blank_lines(field, path, spans)
    return {name: [row[i] for _, row in rows[1:]] for i, name in enumerate(header)}


def _refuse_other_delimiter(field: str, path: Path, header: str) -> None:
    """Raise UserError if a header without the delimiter that belongs to the extension has another."""
    for other in (d for d in DELIMITERS if d in header):
        how = {",": "name it .csv", "\t": "name it .tsv"}.get(other, "save it with commas or tabs")
        looks = f"the delimiter looks like a {DELIMITERS[other]}"
        raise UserError(Problem(field, str(path), f"the header {header.strip()!r} is one column, {looks}; {how}"))


def _quoted_rows(text: str, delimiter: str) -> list[tuple[int, list[str]]] | str:
    """(last line number, cells) of each row under the usual quoting rules, or a message about what breaks them."""
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # one cell may hold a whole document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        return f"line {reader.line_num}: {error}"


def _plain_rows(text: str) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row of tab-separated text without quoting."""
    lines = text.replace("\r\n", "\n").split("\n")
    return [(number, line.split("\t")) for number, line in enumerate(lines, start=1) if line]


def read_official_tsv(field: str, path: Path) -> list[tuple[int, list[str]]]:
    """Read (line number, cells) of each row of an official GLUE file, including its header, if any. Raises UserError."""
    check_exists(field, path)
    return _plain_rows(read_text(field, path))


def stream_official_tsv(field: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Like `read_official_tsv`, but one row at a time: test sets are large."""
    check_exists(field, path)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if cells := line.removesuffix("\n").removesuffix("\r"):
                    yield number, cells.split("\t")
    except UnicodeDecodeError:
        raise UserError(
            Problem(field, str(path), "is not UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8")
        ) from None
    except OSError as error:
        raise UserError(Problem(field, str(path), f"cannot be read ({error.strerror}); check its mode")) from None


def _csv(field: str, path: Path, blank_lines: bool) -> Columns:
    return _delimited(field, path, ",", blank_lines)


def _tsv(field: str, path: Path, blank_lines: bool) -> Columns:
    return _delimited(field, path, "\t", blank_lines)


def _json(field: str, path: Path, blank_lines: bool) -> Columns:
    """An array of objects, or an object on each line."""
    text = read_text(field, path)
    if text.lstrip().startswith("["):
        numbered = [(f"entry {i}", entry) for i, entry in enumerate(_parsed(field, path, "it", text), start=1)]
    else:
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        numbered = [(f"line {i}", _parsed(field, path, f"line {i}", line)) for i, line in lines]
        if not blank_lines:
            _refuse_blank_lines(field, path, ((i, i) for i, _ in lines))
    for place, record in numbered:
        if not isinstance(record, dict):
            remedy = f'{place} is not an object; write objects like {{"sentence1": "a text", "label": 0}}'
            raise UserError(Problem(field, str(path), remedy))
    names = dict.fromkeys(name for _, record in numbered for name in record)
    return {name: [record.get(name) for _, record in numbered] for name in names}


def _parsed(field: str, path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(field, str(path), f"{place} is not JSON: {error}")) from None


def _parquet(field: str, path: Path, blank_lines: bool) -> Columns:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(Problem(field, str(path), f"is not a readable parquet file: {first_line}")) from None
    check_duplicates(field, path, table.column_names)
    columns: Columns = {name: table[name].to_pylist() for name in table.column_names}
    # Files written by `datasets` store class numbers, and the names in the schema; -1 means "no label".
    features: Mapping[str, Any] = {}
    with contextlib.suppress(ValueError):  # a type that `datasets` does not have, so it did not write the file
        features = datasets.Features.from_arrow_schema(table.schema)
    for name, feature in features.items():
        if isinstance(feature, datasets.ClassLabel):
            names = feature.names
            columns[name] = [None if v is None or v < 0 else names[v] for v in columns[name]]
    return columns


def rename_text(record: dict[str, Any]) -> None:
    """Accept the name that most data sets give to a single text: "text" becomes "sentence1", unless that is there too."""
    if "sentence1" not in record and "text" in record:
        record["sentence1"] = record.pop("text")


def has_surrogate(text: str) -> bool:
    """Whether a text contains an unpaired UTF-16 surrogate, which JSON can express but UTF-8 cannot encode."""
    return SURROGATE.search(text) is not None


def check_duplicates(field: str, path: Path, names: list[str]) -> None:
    """Raise UserError if a column name occurs more than once."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(Problem(field, str(path), f"duplicate columns {twice}; give each column a name of its own"))


READERS: dict[str, Callable[[str, Path, bool], Columns]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json,
    ".json": _json,
    ".parquet": _parquet,
}
