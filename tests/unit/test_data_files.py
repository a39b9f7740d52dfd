"""The user's own files: what is read, what is refused, and what the message says."""

import itertools
import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prunadapt_ds.config import parse
from prunadapt_ds.data import doubts, load_task
from prunadapt_ds.errors import UserError

pytestmark = pytest.mark.fast

ROWS = [
    {"sentence1": "NA", "sentence2": "007", "label": "no"},
    {"sentence1": 'He said "stop", twice', "sentence2": "null", "label": "yes"},
    {"sentence1": "naïve 日本", "sentence2": "  spaced ", "label": "no"},
]


def write(path, rows):
    """Rows (dicts) as a file of the kind its extension says, as the usual tools would write it."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), path)
    else:
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows([row.get(name) for name in columns] for row in rows)
    return str(path)


def labelled(*labels):
    return [{"sentence1": f"text {i}", "label": label} for i, label in enumerate(labels)]


def load(train, validation, **given):
    names = ("task_name", "data_dir", "problem_type", "max_train_samples", "max_eval_samples")
    files = {"train_file": str(train), "validation_file": str(validation)}
    return load_task(SimpleNamespace(**{**dict.fromkeys(names), **files, **given}), seed=0)


def refused(train, validation, **given):
    with pytest.raises(UserError) as caught:
        load(train, validation, **given)
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "good.csv", labelled("a", "b", "a"))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_reads_each_kind_as_it_stands(kind, tmp_path):
    train, dev = (write(tmp_path / f"{name}.{kind}", ROWS) for name in ("train", "dev"))
    data = load(train, dev)
    assert (
        data.task.name == "own_classification" and data.task.label_names == ("no", "yes") and data.task.num_labels == 2
    )
    for split in (data.train, data.validation["validation"]):
        assert split.column_names == ["sentence1", "sentence2", "label", "index"]
        assert split["sentence1"][:] == [row["sentence1"] for row in ROWS]
        assert split["sentence2"][:] == [row["sentence2"] for row in ROWS]
        assert split["label"][:] == [0, 1, 0] and split["index"][:] == [0, 1, 2]


def test_kinds_may_differ_between_splits(tmp_path):
    files = [write(tmp_path / f"part.{kind}", ROWS) for kind in ("csv", "parquet", "jsonl")]
    for pair in itertools.pairwise(files):
        data = load(*pair)
        assert data.train.to_dict() == data.validation["validation"].to_dict()


def test_tab_separated_text_with_stray_quotation_marks(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('sentence1\tlabel\n"Go, she said.\tx\nDone" now\ty\n"a" b\tx\n', encoding="utf-8")
    data = load(path, path)
    assert data.train["sentence1"][:] == ['"Go, she said.', 'Done" now', '"a" b']


def test_two_stray_quotation_marks_swallow_no_rows_between_them(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('sentence1\tlabel\n"It rained.\tx\nWe sang.\tx\nWe went home."\ty\n', encoding="utf-8")
    assert load(path, path).train["sentence1"][:] == ['"It rained.', "We sang.", 'We went home."']
    path.write_text('sentence1\tlabel\n"two\nlines\tand a tab"\tx\nWe sang.\ty\n', encoding="utf-8")
    assert load(path, path).train["sentence1"][:] == ["two\nlines\tand a tab", "We sang."], "quoted as usual"


def test_byte_order_mark_windows_lines_blank_lines_and_spaced_header(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b"\xef\xbb\xbfsentence1, label\r\none,a\r\n\r\ntwo,b\r\n")
    data = load(path, path)
    assert data.train["sentence1"][:] == ["one", "two"] and data.task.sentence2 is None


@pytest.mark.parametrize(
    ("labels", "names", "encoded"),
    [
        (["b", "a", "C"], ("C", "a", "b"), [2, 1, 0]),
        ([10, 9, -1, 9], ("-1", "9", "10"), [2, 1, 0, 1]),  # by value, not by spelling
        (["0111", "111", "0200"], ("0111", "111", "0200"), [0, 1, 2]),  # codes: no zero is lost
        (["+1", "-1"], ("-1", "1"), [1, 0]),
        (["12345678901234567891", "12345678901234567890"], ("12345678901234567890", "12345678901234567891"), [1, 0]),
        ([True, False], ("false", "true"), [1, 0]),
        (["1", "x", "2.5"], ("1", "2.5", "x"), [0, 2, 1]),
        (list(range(150)), tuple(map(str, range(150))), list(range(150))),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_classes_of_any_number_and_names(labels, names, encoded, kind, tmp_path):
    path = write(tmp_path / f"train.{kind}", labelled(*labels))
    if kind == "csv" and labels == [True, False]:
        names = ("False", "True")
    data = load(path, path)
    assert data.task.label_names == names and data.task.num_labels == len(names)
    assert data.train["label"][:] == encoded and not data.task.is_regression


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_float_labels_mean_regression(kind, tmp_path):
    train = write(tmp_path / f"train.{kind}", labelled(0.5, 2.0, 1e-3, -4.25))
    dev = write(tmp_path / f"dev.{kind}", labelled(3, 1))  # whole numbers are scores too
    data = load(train, dev)
    assert data.task.is_regression and data.task.num_labels == 1 and data.task.label_names == ()
    assert data.task.metrics == ("pearson", "spearmanr", "r2")
    assert data.train["label"][:] == [0.5, 2.0, 1e-3, -4.25]
    assert data.validation["validation"]["label"][:] == [3.0, 1.0]


def test_json_lines_and_arrays_are_the_same(tmp_path):
    rows = labelled("a", "b")
    array, lines = write(tmp_path / "array.json", rows), tmp_path / "lines.json"
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert load(array, lines).train.to_dict() == load(lines, array).train.to_dict()


def test_a_text_column_is_the_sentence(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    assert load(path, path).train["sentence1"][:] == ["x", "y"]
    path = write(tmp_path / "b.csv", [{"text": "x", "sentence1": "z", "label": k} for k in "ab"])
    assert load(path, path).train["sentence1"][:] == ["z", "z"], "a column of our name is meant"


@pytest.mark.parametrize(
    "labels, problem_type, names, encoded",
    [
        ([1.0, 0.0, 10.0], "single_label_classification", ("0", "1", "10"), [1, 0, 2]),
        (["1.0", 0], "single_label_classification", ("0", "1"), [1, 0]),
        (["12345678901234567890.0", "12345678901234567891.0"],)
        + ("single_label_classification", ("12345678901234567890", "12345678901234567891"), [0, 1]),
        ([0.5, 1.0], "single_label_classification", ("0.5", "1.0"), [0, 1]),
        ([3, 1, 2], "regression", (), [3.0, 1.0, 2.0]),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_kind_of_problem_can_be_said(labels, problem_type, names, encoded, kind, tmp_path):
    path = write(tmp_path / f"train.{kind}", labelled(*labels))
    data = load(path, path, problem_type=problem_type)
    assert data.task.label_names == names and data.train["label"][:] == encoded
    assert data.task.is_regression == (problem_type == "regression")


def test_pandas_missing_label_in_json(tmp_path, good):
    path = tmp_path / "train.jsonl"
    path.write_text('{"sentence1": "x", "label": 0}\n{"sentence1": "y", "label": NaN}\n')
    for kind in (None, "single_label_classification"):
        assert "1 of 2 rows have no label, the first is row 2" in refused(path, path, problem_type=kind)[0]


def test_a_parquet_column_of_a_type_that_datasets_lacks(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train.parquet"
    meta = pa.array([[("a", "b")], []], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"sentence1": ["x", "y"], "label": ["a", "b"], "meta": meta}), path)
    assert load(path, path).train["sentence1"][:] == ["x", "y"]


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", denied)
    assert "no such file; check the path" in refused(tmp_path / "a.csv", tmp_path / "b.csv")[0]


def test_names_are_no_numbers_of_a_regression(good):
    assert "label 'a' is a name, but this is a regression" in refused(good, good, problem_type="regression")[0]


def test_class_labels_that_datasets_wrote_keep_their_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence1": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    path = tmp_path / "train.parquet"
    Dataset.from_dict({"sentence1": ["x", "y"], "label": [1, 0]}, features=features).to_parquet(path)
    data = load(path, path)
    assert data.task.label_names == ("neg", "pos") and data.train["label"][:] == [1, 0]
    Dataset.from_dict({"sentence1": ["x", "y"], "label": [1, -1]}, features=features).to_parquet(path)
    assert "1 of 2 rows have no label" in refused(path, path)[0]


BAD_FILES = {
    "empty.csv": (b"", "the file is empty"),
    "empty.jsonl": (b"\n\n", "has no rows"),
    "header.csv": (b"sentence1,label\n", "has no rows (columns: sentence1, label)"),
    "header.tsv": (b"sentence1\tlabel\n\n", "has no rows"),
    "data.xlsx": (b"PK", "unknown extension '.xlsx'; use one of .csv, .tsv, .jsonl, .json, .parquet"),
    "noextension": (b"x", "unknown extension ''"),
    "columns.csv": (b"words,label\na,b\n", "columns missing: sentence1; found 'words', 'label'"),
    "columns.jsonl": (b'{"a": 1}\n', "columns missing: sentence1, label; found 'a'"),
    "semicolon.csv": (b"sentence1;label\na;b\n", "the delimiter looks like a semicolon"),
    "quoted.csv": (
        b'"sentence1";"label"\n"a, b";"x"\n',
        "the delimiter looks like a semicolon; save it with commas or tabs",
    ),
    "quotedrow.csv": (
        b'sentence1;label\r\n"a";"x"\r\n',
        "the header 'sentence1;label' is one column, the delimiter looks",
    ),
    "comma.tsv": (b"sentence1,label\na,b\n", "the delimiter looks like a comma; name it .csv"),
    "tab.csv": (b"sentence1\tlabel\na\tb\n", "the delimiter looks like a tab; name it .tsv"),
    "ragged.csv": (b"sentence1,label\na,b\nc\n", "line 3 has 1 columns, the header has 2"),
    "unquoted.csv": (b"sentence1,label\none, two,b\n", "line 2 has 3 columns, the header has 2"),
    "quote.csv": (b'sentence1,label\n"a" b,x\n', "line 2: "),
    "open.csv": (b'sentence1,label\n"a,x\nb,y\n', "unexpected end of data"),
    "twice.csv": (b"sentence1,label,label\na,b,c\n", "duplicate columns ['label']"),
    "latin1.csv": (b"sentence1,label\na,b\ncaf\xe9,b\n", "line 3 is not UTF-8"),
    "nul.csv": (b"sentence1,label\na\0,b\n", "NUL byte at byte 17"),
    "utf16.tsv": ("sentence1\tlabel\n".encode("utf-16"), "NUL byte"),
    "nolabel.csv": (b"sentence1,label\na,x\nb,\nc,y\nd, \n", "2 of 4 rows have no label, the first is row 2"),
    "nulllabel.jsonl": (b'{"sentence1": "a", "label": null}\n', "1 of 1 rows have no label"),
    "notexts.csv": (
        b"sentence1,label\na,x\n,y\n  ,x\n",
        "2 of 3 rows have no sentence1, the first is row 2; fill in or drop",
    ),
    "nosecond.tsv": (
        b"sentence1\tsentence2\tlabel\na\tb\tx\na\t\ty\n",
        "1 of 2 rows have no sentence2, the first is row 2",
    ),
    "nulltext.jsonl": (b'{"sentence1": null, "label": 1}\n{"sentence1": "a"}\n', "1 of 2 rows have no sentence1"),
    "listlabel.jsonl": (
        b'{"sentence1": "a", "label": [1]}\n',
        "row 1: label [1] is neither a name nor a number",
    ),
    "notext.jsonl": (b'{"sentence1": 5, "label": 1}\n', "row 1: sentence1 is 5, not a text"),
    "surrogate.jsonl": (b'{"sentence1": "\\ud800", "label": 1}\n', "half a surrogate pair"),
    "array.json": (b'[{"sentence1": "a", "label": 1}, 5]', "entry 2 is not an object"),
    "open.json": (b'[{"sentence1": "a", "label": 1}', "it is not JSON"),
    "broken.jsonl": (b'{"sentence1": "a", "label": 1}\n{"sent\n', "line 2 is not JSON"),
    "scalar.jsonl": (b"5\n", "line 1 is not an object"),
    "fake.parquet": (b"not a parquet file at all", "is not a readable parquet file"),
    "oneclass.csv": (b"sentence1,label\na,x\nb,x\n", "every label is 'x': one class only"),
    "constant.csv": (b"sentence1,label\na,0.5\nb,0.5\n", "every label is 0.5"),
    "infinite.csv": (b"sentence1,label\na,0.5\nb,inf\n", "row 2: label inf is not finite"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    found = refused(path, path)
    assert found[0].startswith(f"train_file='{path}': ") and message in found[0]


def test_files_that_are_not_there(tmp_path, good):
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    missing, is_folder = refused(tmp_path / "godo.csv", folder)
    assert "no such file; did you mean" in missing and "good.csv" in missing
    assert "is a folder" in is_folder


def test_problems_of_all_files_come_at_once(tmp_path):
    bad = [tmp_path / name for name in ("columns.csv", "latin1.csv")]
    for path in bad:
        path.write_bytes(BAD_FILES[path.name][0])
    assert [problem.split("=")[0] for problem in refused(*bad)] == [
        "train_file",
        "validation_file",
    ]


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        (["a", "b"], ["a", "c"], "labels never seen in train_file: 'c'; known are 'a', 'b'"),
        ([0, 1], [1, 2], "labels never seen in train_file: '2'; known are '0', '1'"),
        ([1, 2, 5], [1, 4], "(if labels are numbers on a scale, pass --problem_type regression)"),
        (["a", "b"], [0.5, 1.5], "labels are floats ('0.5', '1.5'), but names in train_file"),
        ([0, 1], [0.5, 1.5], "labels are floats ('0.5', '1.5'), but integers in train_file"),
        ([0, 1], ["no", "yes"], "labels are names ('no', 'yes'), but integers in train_file"),
        ([0.5, 1.5], ["no", "yes"], "label 'no' is a name, but labels in train_file are numbers"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_splits_that_do_not_fit_together(train, dev, message, kind, tmp_path):
    train_file = write(tmp_path / f"train.{kind}", labelled(*train))
    dev_file = write(tmp_path / f"dev.{kind}", labelled(*dev))
    (problem,) = refused(train_file, dev_file)
    assert problem.startswith("validation_file=") and message in problem


def test_second_sentence_in_one_split_only(tmp_path, good):
    pair = write(tmp_path / "pair.csv", [{"sentence1": "a", "sentence2": "b", "label": "a"}])
    (problem,) = refused(good, pair)
    assert problem.startswith("train_file=") and "validation_file does" in problem


def test_what_may_be_a_mistake_is_doubted(tmp_path, good):
    """Which trains all the same."""
    other = write(tmp_path / "other.csv", [{"sentence1": f"new {i}", "label": "ab"[i % 2]} for i in range(4)])
    assert doubts(load(good, other)) == []
    (copied,) = doubts(load(good, good))
    assert copied == "3 of 3 validation texts are trained on too: the score says little about new ones"
    half = write(
        tmp_path / "half.jsonl",
        [*labelled("a", "b"), {"sentence1": "x", "label": "a"}, {"sentence1": "y", "label": "b"}],
    )
    assert "2 of 4 validation texts" in doubts(load(good, half))[0]
    assert doubts(load(half, other, max_train_samples=2)) == []
    one = write(tmp_path / "one.csv", [{"sentence1": f"new {i}", "label": "a"} for i in range(2)])
    assert doubts(load(good, one)) == [
        "every validation label is 'a': the score cannot tell a good model from one that always says so"
    ]


def test_a_run_says_its_doubts_as_it_begins(good, monkeypatch):
    from prunadapt_ds import setup

    said = []
    session = SimpleNamespace(
        config=parse([f"--{name}={good}" for name in ("train_file", "validation_file")]),
        data=load(good, good),
        ds=SimpleNamespace(path="zero3.json", stage=3, dtype="fp32", resolved={}, values={}),
        backbone=SimpleNamespace(notes=[]),
        train_rows=SimpleNamespace(lengths=[]),
        tracker=SimpleNamespace(say=said.append, text=lambda *_: None),
        learning_rate=1e-3,
        total_steps=1,
        latency=None,
    )
    monkeypatch.setattr(setup, "_cut_rows", lambda session: None)
    setup.announce(session)
    assert "warning: 3 of 3 validation texts are trained on too: the score says little about new ones" in said


def test_ratings_that_are_taken_for_classes_are_doubted(tmp_path):
    scale = write(tmp_path / "scale.csv", labelled(*range(11)))
    few = write(tmp_path / "few.csv", labelled(*range(10)))
    names = write(tmp_path / "names.csv", labelled(*"abcdefghijkl"))
    new = write(tmp_path / "new.csv", [{"sentence1": "new", "label": 3}, {"sentence1": "one", "label": 4}])
    assert doubts(load(scale, new)) == [
        "11 whole numbers are taken for classes; for numbers on a scale, pass --problem_type regression"
    ]
    assert doubts(load(few, new)) == []
    for kind in ("single_label_classification", "regression"):
        assert doubts(load(scale, new, problem_type=kind), kind) == []
    assert not any("whole numbers" in doubt for doubt in doubts(load(names, names)))
    constant = write(tmp_path / "constant.csv", [{"sentence1": f"new {i}", "label": 3} for i in range(2)])
    assert "every validation label is 3.0" in doubts(load(scale, constant, problem_type="regression"), "regression")[0]


def test_pairs_are_the_same_texts_only_as_pairs(tmp_path):
    train = write(tmp_path / "train.csv", [{"sentence1": "a", "sentence2": b, "label": b} for b in "xy"])
    dev = write(tmp_path / "dev.csv", [{"sentence1": "a", "sentence2": b + "!", "label": b} for b in "xy"])
    assert doubts(load(train, dev)) == []


def test_subsets_apply_to_every_split(tmp_path, good):
    data = load(good, good, max_train_samples=2, max_eval_samples=1)
    assert (len(data.train), len(data.validation["validation"])) == (2, 1)
