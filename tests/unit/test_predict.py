"""Answers for files and standard input, in process: order, names, numbers, and what is refused."""

import csv
import dataclasses
import io
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prunadapt_ds import answers, card, distributed, trained_folder
from prunadapt_ds.batches import evaluation_batches
from prunadapt_ds.commands import evaluate, predict
from prunadapt_ds.config import parse
from prunadapt_ds.data import TASKS
from prunadapt_ds.errors import Problem, UserError
from tests.tiny import tiny_data, tiny_model, tiny_tokenizer
from tests.unit.test_card import report_of

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    tiny_data(folder, n_train=4, n_dev=23)
    for name, labels in (("model", 3), ("number", 1)):
        model = tiny_model("bert", labels, initializer_range=0.5)
        if labels == 3:
            model.config.id2label = {0: "no", 1: "perhaps", 2: "yes"}
            model.config.label2id = {"no": 0, "perhaps": 1, "yes": 2}
        model.save_pretrained(folder / name)
        tiny_tokenizer(folder / name)
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One process without a group, and without DeepSpeed, which this does not need."""
    monkeypatch.setattr(distributed, "init", lambda: None)


def run(base, tmp_path, *argv, model="model", name="out.jsonl"):
    predict.run(["--model_name_or_path", str(base / model), "--max_seq_length", "32",
                 "--per_device_eval_batch_size", "4", "--output_file", str(tmp_path / name), *map(str, argv)])  # fmt: skip
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()
    return (tmp_path / name).read_text()


def expected(base, model="model"):
    """Logits one row at a time, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    net = AutoModelForSequenceClassification.from_pretrained(base / model).eval()
    tokenizer = AutoTokenizer.from_pretrained(base / model)
    rows = list(csv.DictReader((base / "validation.csv").open()))
    with torch.no_grad():
        found = [
            net(**tokenizer(r["sentence1"], r["sentence2"], truncation=True, max_length=32, return_tensors="pt")).logits
            for r in rows
        ]
    return torch.cat(found)


def test_every_row_in_order_with_names_and_probabilities(base, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "CHUNK", 10)
    lines = [json.loads(x) for x in run(base, tmp_path, "--input_file", base / "validation.csv").splitlines()]
    logits = expected(base)
    assert [x["index"] for x in lines] == list(range(23))
    names = ["no", "perhaps", "yes"]
    assert [x["prediction"] for x in lines] == [names[i] for i in logits.argmax(1)]
    assert len({x["prediction"] for x in lines}) > 1
    shares = torch.tensor([[x["probabilities"][name] for name in names] for x in lines])
    torch.testing.assert_close(shares, logits.softmax(1), atol=2e-6, rtol=0)


def test_text_is_another_name_of_a_single_sentence(base, tmp_path, monkeypatch, capsys):
    rows = [{"sentence1": "sun joy"}, {"sentence1": "rain"}]
    outputs = []
    for name in ("sentence1", "text"):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps([{name: row["sentence1"]} for row in rows]))
        outputs.append(run(base, tmp_path, "--input_file", file))
        lines = "".join(json.dumps({name: row["sentence1"]}) + "\n" for row in rows)
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        outputs.append(run(base, tmp_path, "--input_file", "-"))
    assert len(set(outputs)) == 1 and len(outputs[0].splitlines()) == 2


def test_csv_and_other_names(base, tmp_path):
    text = run(
        base, tmp_path, "--input_file", base / "validation.csv", "--label_names", "a", "b,c", "d", name="x/out.csv"
    )
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["index", "prediction", "probability_a", "probability_b,c", "probability_d"]
    assert len(rows) == 23 and {r["prediction"] for r in rows} <= {"a", "b,c", "d"}


def test_regression_gives_the_number(base, tmp_path):
    text = run(base, tmp_path, "--input_file", base / "validation.csv", model="number")
    found = torch.tensor([json.loads(line)["prediction"] for line in text.splitlines()])
    torch.testing.assert_close(found, expected(base, "number")[:, 0], atol=1e-5, rtol=1e-5)
    text = run(base, tmp_path, "--input_file", base / "validation.csv", model="number", name="out.csv")
    assert text.splitlines()[0] == "index,prediction"
    answerer = SimpleNamespace(label_names=())
    rows = list(predict.answered(torch.tensor([[4.8123456e-5], [309875.0], [-2.5]]), answerer, start=7))
    assert [row["prediction"] for row in rows] == [4.812346e-05, 309875, -2.5] and rows[0]["index"] == 7


@pytest.fixture
def exported(base, tmp_path):
    """The model as the export of a run that read 8 tokens of an input."""
    run_dir = tmp_path / "run"
    shutil.copytree(base / "model", run_dir / "exports" / "compact")
    (run_dir / "run.json").write_text('{"max_seq_length": 8}')
    (run_dir / "report.json").write_text('{"macs": {"seq_length": 9}}')
    return run_dir


def test_inputs_are_cut_as_the_run_cut_them(base, exported, tmp_path, capsys):
    """Unless the option says otherwise."""
    texts = tmp_path / "new.csv"
    texts.write_text("sentence1\n" + "".join(f"{'sun joy rain pain ' * n}tree\n" for n in range(1, 6)))

    def answered(*more):
        folder = ["--model_name_or_path", str(exported / "exports" / "compact"), "--input_file", str(texts)]
        predict.run([*folder, "--output_file", str(tmp_path / "out.jsonl"), *more])
        return (tmp_path / "out.jsonl").read_text()

    own = answered()
    assert "at most 8 tokens of an input (as in its run)" in capsys.readouterr().err
    assert own == answered("--max_seq_length", "8") != answered("--max_seq_length", "32")


def test_where_the_length_of_a_run_stands(exported, tmp_path, monkeypatch):
    folder = exported / "exports" / "compact"
    monkeypatch.chdir(folder)
    assert trained_folder.run_length(folder) == trained_folder.run_length(Path(".")) == 8
    for text in ("[", "{}", "[]", '{"max_seq_length": "8"}', "[" * 100_000):
        (exported / "run.json").write_text(text)
        assert trained_folder.run_length(folder) == 9
    (exported / "report.json").write_text('{"macs": {"seq_length": null}}')
    assert trained_folder.run_length(folder) is None and trained_folder.scored_length(str(folder)) == 128
    assert trained_folder.run_length(tmp_path) is None and trained_folder.run_length(Path("org/model")) is None


def scores(base, model, **files):
    argv = [f"--model_name_or_path={base / model}", "--max_seq_length=32"]
    argv += [f"--{name}_file={path}" for name, path in files.items()]
    return evaluate.run(parse(argv, evaluate.USAGE, trains=False))


def test_a_file_is_scored_without_training_data(base, tmp_path):
    """The model's own class names say what its labels mean; a model without any counts them."""
    names, words = ["no", "perhaps", "yes"], ["sun", "rain", "joy", "pain", "tree", "road"] * 4

    def file(name, labels):
        rows = [f"{word},{word} sun,{labels[i % 3]}\n" for i, word in enumerate(words)]
        (tmp_path / name).write_text("sentence1,sentence2,label\n" + "".join(rows))
        return tmp_path / name

    named, numbered = file("named.csv", names), file("numbered.csv", range(3))
    expected = scores(base, "model", train=named, validation=named)
    assert scores(base, "model", validation=named) == expected and 0 < expected["accuracy"] < 1
    shutil.copytree(base / "model", tmp_path / "unnamed")
    config = json.loads((tmp_path / "unnamed" / "config.json").read_text())
    config["id2label"] = {i: f"LABEL_{i}" for i in range(3)}
    (tmp_path / "unnamed" / "config.json").write_text(json.dumps(config))
    assert scores(tmp_path, "unnamed", validation=numbered) == expected
    literal = file("literal.csv", [f"LABEL_{i}" for i in range(3)])
    assert scores(tmp_path, "unnamed", validation=literal) == expected, "such names may have been the user's own"
    config["id2label"] = dict(enumerate("123"))
    (tmp_path / "unnamed" / "config.json").write_text(json.dumps(config))
    as_pandas_writes = file("floats.csv", ["1.0", "2.0", "3.0"])
    assert scores(tmp_path, "unnamed", validation=as_pandas_writes) == expected
    with pytest.raises(UserError, match=r"labels are integers|labels never seen in the model: .*known are"):
        scores(base, "model", validation=numbered)


def test_a_regressor_is_scored_without_training_data(base, tmp_path):
    """Whole numbers, which a training file would make classes, are scores to it."""
    (tmp_path / "scores.csv").write_text("sentence1,sentence2,label\nsun,joy,3\nrain,pain,1\nsun,rain,2\n")
    assert scores(base, "number", validation=tmp_path / "scores.csv").keys() == {"pearson", "spearmanr", "r2", "score"}
    with pytest.raises(UserError, match="is a name, but this is a regression"):
        scores(base, "number", validation=base / "validation.csv")


@pytest.mark.parametrize("task, said", [("sst2", "trained on single texts"), ("mrpc", "trained on pairs of texts")])
def test_a_model_of_pairs_takes_no_single_texts_nor_the_reverse(base, tmp_path, monkeypatch, task, said):
    """As the metadata of its card says; a folder without a card of ours takes both."""
    monkeypatch.chdir(tmp_path)
    single, pairs = tmp_path / "single.csv", tmp_path / "pairs.csv"
    single.write_text("sentence1,label\nsun,no\nrain,perhaps\njoy,yes\n")
    pairs.write_text("sentence1,sentence2,label\nsun,joy,no\nrain,pain,perhaps\njoy,sun,yes\n")
    fits, other = (single, pairs) if task == "sst2" else (pairs, single)
    for folder in ("copied", "adapter's", "stock"):
        shutil.copytree(base / "model", folder)
    r, _ = report_of(TASKS[task])
    for folder, kind in (("copied", "compact"), ("adapter's", "adapter")):
        Path(folder, "README.md").write_text(card.render(r, "some/encoder", TASKS[task], kind))
    Path("stock/README.md").write_text("Somebody's model.\n")
    for folder in ("copied", "adapter's"):
        run(tmp_path, tmp_path / "out", "--input_file", fits, model=folder)
        scores(tmp_path, folder, validation=fits)
        with pytest.raises(UserError, match=said):
            run(tmp_path, tmp_path / "out", "--input_file", other, model=folder)
        with pytest.raises(UserError, match=said):
            scores(tmp_path, folder, validation=other)
    with pytest.raises(UserError, match=said):
        answers.load(
            "copied",
            False,
            32,
            4,
            task=dataclasses.replace(TASKS["rte" if task == "sst2" else "sst2"], label_names=("no", "perhaps", "yes")),
        )
    for file in (single, pairs):
        run(tmp_path, tmp_path / "out", "--input_file", file, model="stock")
        scores(tmp_path, "stock", validation=file)


def test_a_score_reads_as_much_as_the_run_did(exported, tmp_path):
    (tmp_path / "own.csv").write_text("sentence1,label\nsun,no\nrain,perhaps\njoy,yes\n")
    data = [f"--{name}_file={tmp_path / 'own.csv'}" for name in ("train", "validation")]
    seen = []

    def score(*more):
        def remember(split, tokenizer, longest):
            seen.append(longest)
            raise UserError(Problem("seen", longest, "enough"))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "tokenize", remember)
            evaluate.main([f"--model_name_or_path={exported / 'exports' / 'compact'}", *data, *more])

    score()
    score("--max_seq_length=32")
    assert seen == [8, 32]


def test_standard_input_and_output(base, tmp_path, monkeypatch, capfd):
    """Nothing but rows on standard output, whatever libraries print; an empty line is a row too."""
    monkeypatch.setattr("sys.stdin", io.StringIO("sun joy\n\nrain pain\n"))
    noisy = answers.load
    monkeypatch.setattr(answers, "load", lambda *a, **k: (print("noise"), noisy(*a, **k))[1])
    argv = ["--model_name_or_path", str(base / "model"), "--input_file", "-", "--max_seq_length", "32"]
    predict.run(argv)
    said = capfd.readouterr()
    assert [json.loads(line)["index"] for line in said.out.splitlines()] == [0, 1, 2]
    assert "noise" in said.err and "answered 3 rows" in said.err
    monkeypatch.setattr("sys.stdin", io.StringIO('{"sentence1": "sun", "sentence2": "joy", "label": 1}\n'))
    predict.run(argv)
    assert len(capfd.readouterr().out.splitlines()) == 1


def test_empty_texts_are_answered_and_counted(base, tmp_path, monkeypatch, capsys):
    """In a file as on standard input; in pairs too."""
    monkeypatch.setattr(answers, "CHUNK", 2)
    (tmp_path / "new.csv").write_text('sentence1,sentence2\nsun,joy\nrain,tree\nsun,"  "\n,joy\n')
    assert len(run(base, tmp_path, "--input_file", tmp_path / "new.csv").splitlines()) == 4
    assert "answered 4 rows, 2 of them without a text (the first has index 2)\n" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("sun\nrain\n\n"))
    assert len(run(base, tmp_path, "--input_file", "-").splitlines()) == 3
    assert "answered 3 rows, 1 of them without a text (the first has index 2)\n" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("sun\n"))
    run(base, tmp_path, "--input_file", "-")
    assert "answered 1 rows\n" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_failure(base, monkeypatch, capfd):
    """As in `predict | head`: it ends at once, although the input goes on."""
    lines = itertools.repeat("sun joy\n", 10_000)
    monkeypatch.setattr("sys.stdin", lines)
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(1)
    os.dup2(writer, 1)
    try:
        predict.run(["--model_name_or_path", str(base / "model"), "--max_seq_length", "32", "--input_file", "-"])
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(writer)
    assert next(lines, None) is not None


@pytest.mark.parametrize(
    "text, what",
    [
        ("", "has no rows"),
        ('{"sentence1": "a"}\nsun\n', "line 2 is not a JSON object"),
        ('\n{"sentence1": "a"}\n', "line 2 is a JSON object, but the first line was not"),
        ('\ufeff{"sentence1": "a"}\nsun\n', "line 2 is not a JSON object"),
        ('{"sentence1": "a"}\n{"sentence1": "a", "sentence2": "b"}\n', "row 2: has sentence1 and sentence2"),
        ('{"sentence1": "a"}\n{"sentence1": null}\n', "row 2: sentence1 is None"),
        ('{"sentence2": "a"}\n', "row 1: has no sentence1"),
        ('{"sentence1": "\\ud800"}\n', "row 1: sentence1 holds half a surrogate pair"),
        ('{"sentence1": "a"\n', r'line 1 looks like a part of JSON; give .*\{"sentence1"'),
        ("{'text': 'a'}\n", "line 1 looks like a part of JSON"),
        ('sun\n[{"sentence1": "a"}]\n', "line 2 looks like a part of JSON"),
        ('[\n  {\n    "text": "a"\n  }\n]\n', "line 1 looks like a part of JSON"),
        ('{"sentence1": "a"}\n\n \n{"sentence1": "b"}\n', "line 2 is blank, and answers are numbered by rows"),
    ],
)
def test_bad_standard_input(base, tmp_path, monkeypatch, text, what):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    with pytest.raises(UserError, match=what):
        run(base, tmp_path, "--input_file", "-")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("text", ["sun\ncaf\xe9\n", '{"sentence1": "sun"}\n{"sentence1": "caf\xe9"}\n'])
def test_other_encodings_on_standard_input(base, tmp_path, monkeypatch, text, errors):
    """Whatever the locale makes of them."""
    for said, encoding in ((text.encode("latin1"), "utf-8"), (text.encode("latin1"), "ascii")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said), encoding=encoding, errors=errors))
        with pytest.raises(UserError, match="line 2 is not UTF-8; convert the input"):
            run(base, tmp_path, "--input_file", "-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii", errors=errors))
    assert len(run(base, tmp_path, "--input_file", "-").splitlines()) == 2


def test_a_text_may_hold_braces(base, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('sun {"text": 1}\n{\n{"a": 1}\n"text": sun\n'))
    assert len(run(base, tmp_path, "--input_file", "-").splitlines()) == 4


@pytest.mark.parametrize(
    "name, text, blank",
    [
        ("a.csv", "sentence1\nsun\n\nrain\n", 3),
        ("a.csv", 'sentence1,sentence2\r\n"sun\r\n\r\nrain","tree\nroad"\r\n\r\njoy,pain\r\n', 6),
        ("a.tsv", "sentence1\n\nsun\nrain\n", 2),
        ("a.tsv", 'sentence1\tid\n"sun\t1\n\nrain"\t2\n', 3),
        ("a.jsonl", '{"text": "sun"}\n  \n{"text": "rain"}\n', 2),
        ("a.json", '\n{"text": "sun"}\n{"text": "rain"}\n', 1),
    ],
)
def test_a_blank_line_between_rows_is_refused(base, tmp_path, name, text, blank):
    """A line that has no answer would shift all that follow. At the end, or inside of a text, it shifts nothing."""
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(UserError, match=f"line {blank} is blank, and answers are numbered by rows"):
        run(base, tmp_path, "--input_file", tmp_path / name)
    lines = text.encode().split(b"\n")
    (tmp_path / name).write_bytes(b"\n".join(lines[: blank - 1] + lines[blank:]) + b"\n\n")
    assert len(run(base, tmp_path, "--input_file", tmp_path / name).splitlines()) == 2


def test_all_rows_of_a_file_are_checked_before_the_first_is_predicted(base, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "CHUNK", 2)
    monkeypatch.setattr(answers, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "rows.jsonl").write_text('{"sentence1": "a"}\n' * 4 + '{"sentence1": 3}\n')
    with pytest.raises(UserError, match="row 5"):
        run(base, tmp_path, "--input_file", str(tmp_path / "rows.jsonl"))


def test_a_late_mistake_leaves_nothing(base, tmp_path, monkeypatch):
    """The third chunk is bad, after two were written; what stood there before still does."""
    monkeypatch.setattr(answers, "CHUNK", 2)
    (tmp_path / "out.jsonl").write_text("before\n")
    monkeypatch.setattr("sys.stdin", io.StringIO('{"sentence1": "a"}\n' * 4 + '{"sentence1": 3}\n'))
    with pytest.raises(UserError, match="row 5"):
        run(base, tmp_path, "--input_file", "-")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before\n"]


@pytest.mark.parametrize(
    "argv, fields",
    [
        ([], {"model_name_or_path", "input_file"}),
        (["--run_root", "a", "--data_dir", "b"], {"model_name_or_path", "input_file", "run_root", "data_dir"}),
        (["--model_name_or_path", "a", "--input_file", "b", "--output_file", "c.txt"], {"output_file"}),
        (["--model_name_or_path", "a", "--input_file", "b", "--label_names", "c", "c"], {"label_names"}),
        (["--model_name_or_path", "a", "--input_file", "b", "--r", "8"], {"r"}),
        (["--glue_submission", "--input_file", "b"], {"input_file", "data_dir", "run_root"}),
        (["--glue_submission", "--data_dir", "b", "--run_root", "a", "--output_file", "x.csv"], {"output_file"}),
    ],
)
def test_options_that_do_not_go_together(argv, fields):
    with pytest.raises(UserError) as caught:
        predict.run(argv)
    assert {p.field for p in caught.value.problems} == fields


def test_the_input_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("sentence1,label\nsun,1\n")
    (tmp_path / "b.csv").symlink_to("a.csv")
    for output in ("a.csv", "./a.csv", str(tmp_path / "a.csv"), "b.csv"):
        with pytest.raises(UserError, match="is the input file; name another"):
            predict.run(["--model_name_or_path", "x", "--input_file", "a.csv", "--output_file", output])


def test_files_and_models_that_do_not_fit(base, tmp_path):
    def refused(*argv, **options):
        with pytest.raises(UserError) as caught:
            run(base, tmp_path / "out", *argv, **options)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
        return str(caught.value)

    (tmp_path / "text.csv").write_text("words,label\na,1\n")
    assert "column sentence1 is missing" in refused("--input_file", tmp_path / "text.csv")
    assert "no such file" in refused("--input_file", tmp_path / "nowhere.csv")
    assert "name as many" in refused("--input_file", base / "validation.csv", "--label_names", "a", "b")
    assert "one number" in refused("--input_file", base / "validation.csv", "--label_names", "a", "b", model="number")
    assert "at least 5" in refused("--input_file", base / "validation.csv", "--max_seq_length", "4")
    tiny_model("bert").base_model.save_pretrained(tmp_path / "headless")
    tiny_tokenizer(tmp_path / "headless")
    assert "is not trained for this" in refused("--input_file", base / "validation.csv", model=tmp_path / "headless")


@pytest.mark.parametrize("count, batch_size, world_size", [(23, 4, 2), (5, 4, 3), (8, 4, 2), (1, 4, 2)])
def test_ranks_together_compute_the_batches_of_one(count, batch_size, world_size):
    lengths = [(7 * i) % 11 for i in range(count)]
    one = list(evaluation_batches(lengths, batch_size, 0, 1))
    ranks = [list(evaluation_batches(lengths, batch_size, r, world_size)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert [b for round_ in zip(*ranks, strict=True) for b in round_ if b] == one
    assert sorted(i for b in one for i in b) == list(range(count))
