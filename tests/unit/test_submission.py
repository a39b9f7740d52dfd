"""GLUE's leaderboard: official test files in, the zip it takes out."""

import json
import stat
import zipfile

import pytest
import torch

from prunadapt_ds import answers, distributed
from prunadapt_ds.commands import predict, submission
from prunadapt_ds.data import TASKS, stream_blind
from prunadapt_ds.errors import UserError
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.fast
# Test files as in the official release: header, and a row of it.
OFFICIAL = {
    "CoLA.tsv": ("index\tsentence", "{i}\tthe {w} house"),
    "SST-2.tsv": ("index\tsentence", "{i}\tthe {w} house"),
    "MRPC.tsv": ("\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String", '{i}\t10\t11\t"the {w} house\tthe "{w}" road'),
    "STS-B.tsv": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
        "{i}\tg\tf\t2012\t1\tnone\tnone\tthe {w} house\tthe {w} road",
    ),
    "QQP.tsv": ("id\tquestion1\tquestion2", "{i}\tis it {w}\twas it {w}"),
    "MNLI-m.tsv": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
        "\tsentence1\tsentence2",
        "{i}\t31\t31n\tg\t( a )\t( b )\t(A a)\t(B b)\tthe {w} house\tthe {w} road",
    ),
    "QNLI.tsv": ("index\tquestion\tsentence", "{i}\tis it {w}\tit is {w}"),
    "RTE.tsv": ("index\tsentence1\tsentence2", "{i}\tthe {w} house\tthe {w} road"),
}  # fmt: skip
OFFICIAL |= {"MNLI-mm.tsv": OFFICIAL["MNLI-m.tsv"], "WNLI.tsv": OFFICIAL["RTE.tsv"], "AX.tsv": OFFICIAL["RTE.tsv"]}
SETS = {blind.submission: (task, blind) for task, blind in submission.blind_sets()}
WORDS = ["sun", "joy", "rain", "pain", "love", "hate"]
# The leaderboard's own spelling, from its instructions.
SPELLED = {
    words: set(spelled.split())
    for names, spelled in (
        ("CoLA SST-2 MRPC QQP WNLI", "0 1"),
        ("MNLI-m MNLI-mm AX", "entailment neutral contradiction"),
        ("QNLI RTE", "entailment not_entailment"),
    )
    for words in (f"{name}.tsv" for name in names.split())
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(distributed, "init", lambda: None)


def write_set(data_dir, name, rows=7, change=lambda lines: lines):
    header, row = OFFICIAL[name]
    path = data_dir / SETS[name][1].path
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *(row.format(i=i, w=WORDS[i % len(WORDS)]) for i in range(rows))]
    path.write_text("\n".join(change(lines)) + "\n")
    return data_dir


def write_model(folder, task, names=None):
    """A random model of the task, whose configuration names the labels in the order `names`."""
    labels = names or task.label_names
    model = tiny_model("bert", len(labels) or 1, initializer_range=0.5)
    if labels:
        model.config.id2label, model.config.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def write_run(root, task, seed, score, status="complete"):
    folder = root / task.name / f"seed{seed}"
    write_model(folder / "exports" / "compact", task)
    report = {"status": status, "task": task.name, "metric": {"exported": {"score": score}}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def submit(tmp_path, data_dir, *argv):
    predict.run(["--glue_submission", "--data_dir", str(data_dir), "--max_seq_length", "32",
                 "--output_file", str(tmp_path / "s.zip"), *map(str, argv)])  # fmt: skip
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        assert archive.testzip() is None
        assert all(stat.S_IMODE(info.external_attr >> 16) == 0o644 for info in archive.infolist())
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_table_knows_all_eleven_sets():
    assert set(SETS) == set(OFFICIAL) and len(SETS) == 11
    for task in TASKS.values():
        if task.blind_sets and not task.is_regression:
            words = task.submitted or task.label_names
            assert all(set(words) == SPELLED[b.submission] for b in task.blind_sets) and len(words) == len(
                task.label_names
            )
    assert TASKS["wnli"].label_names[1] == "entailment" and TASKS["wnli"].submitted[1] == "1"


def test_all_of_glue(tmp_path, capsys, monkeypatch):
    """Nine models, eleven sets; every file is what the leaderboard takes, and answers its own rows."""
    monkeypatch.setattr(answers, "CHUNK", 5)
    data, root = tmp_path / "data", tmp_path / "runs"
    for name in OFFICIAL:
        write_set(data, name)
    models = [f"{t.name}={write_model(root / t.name, t)}" for t in TASKS.values() if t.blind_sets]
    found = submit(tmp_path, data, "--task_models", *models)
    assert list(found) == sorted(OFFICIAL)
    for name, text in found.items():
        task, _ = SETS[name]
        assert submission.problems(task, text, 7) == []
        lines = [line.split("\t") for line in text.splitlines()]
        assert lines[0] == ["index", "prediction"] and [x[0] for x in lines[1:]] == [str(i) for i in range(7)]
        if name == "STS-B.tsv":
            assert all(0 <= float(x[1]) <= 5 for x in lines[1:])
        else:
            assert {x[1] for x in lines[1:]} <= SPELLED[name]
        assert lines[1][1] == lines[7][1]  # the same words, in two chunks
    said = capsys.readouterr().err
    assert "missing" not in said and "not official: MNLI/test_matched.tsv has 7 rows, the official file 9,796" in said


def test_every_task_is_read_as_its_run_read_it(tmp_path, monkeypatch):
    data, seen = tmp_path / "data", {}
    for name, length in (("rte", 8), ("wnli", 16)):
        write_set(data, TASKS[name].blind_sets[0].submission)
        (write_run(tmp_path / "runs", TASKS[name], 0, 0.5) / "run.json").write_text(f'{{"max_seq_length": {length}}}')
    real = submission.answer
    monkeypatch.setattr(
        submission,
        "answer",
        lambda a, task, *rest: (seen.update({task.name: a.max_seq_length}), real(a, task, *rest))[1],
    )
    argv = ["--glue_submission", "--data_dir", str(data), "--run_root", str(tmp_path / "runs")]
    predict.run([*argv, "--output_file", str(tmp_path / "s.zip")])
    assert seen == {"rte": 8, "wnli": 16}


def test_labels_in_another_order_are_told_by_their_names(tmp_path):
    data = write_set(tmp_path / "data", "MNLI-m.tsv")
    task = TASKS["mnli"]
    straight = submit(tmp_path, data, "--task_models", f"mnli={write_model(tmp_path / 'a', task)}")
    first = (tmp_path / "s.zip").read_bytes()
    assert straight == submit(tmp_path, data, "--task_models", f"mnli={tmp_path / 'a'}")
    assert (tmp_path / "s.zip").read_bytes() == first
    turned = ("contradiction", "entailment", "neutral")
    other = submit(tmp_path, data, "--task_models", f"mnli={write_model(tmp_path / 'b', task, turned)}")
    renamed = dict(zip(task.label_names, turned, strict=True))
    expected = [renamed[line.split("\t")[1]] for line in straight["MNLI-m.tsv"].splitlines()[1:]]
    assert [line.split("\t")[1] for line in other["MNLI-m.tsv"].splitlines()[1:]] == expected


def test_the_best_run_answers_and_what_is_missing_is_said(tmp_path, capsys):
    data = write_set(tmp_path / "data", "RTE.tsv")
    root = tmp_path / "runs"
    write_run(root, TASKS["rte"], 0, 0.6)
    best = write_run(root, TASKS["rte"], 1, 0.7)
    write_run(root, TASKS["rte"], 2, 0.9, status="interrupted")
    write_run(root, TASKS["wnli"], 0, 0.5)
    assert list(submit(tmp_path, data, "--run_root", root)) == ["RTE.tsv"]
    said = capsys.readouterr().err
    assert f"rte: {best}/exports/compact (development score 70.0, best of 2 runs)" in said
    assert "missing: WNLI.tsv (WNLI/test.tsv is not there)" in said and "missing: QQP.tsv (no model of qqp)" in said
    assert "all 11 files" in said


def test_numbers_are_cut_to_the_range():
    logits = torch.tensor([[-1.0], [2.34567], [9.0]])
    assert submission.spell(TASKS["stsb"], logits) == ["0.000", "2.346", "5.000"]


@pytest.mark.parametrize(
    "task, text, what",
    [
        ("rte", "Index\tprediction\n0\tentailment\n", "header"),
        ("rte", "index\tprediction\n0\tentailment", "has no newline"),
        ("rte", "index\tprediction\n", "0 predictions for 1 rows"),
        ("rte", "index\tprediction\n1\tentailment\n", "expected index 0"),
        ("rte", "index\tprediction\n0 entailment\n", "expected index 0"),
        ("rte", "index\tprediction\n0\t1\n", "'1' is not a valid prediction for rte"),
        ("wnli", "index\tprediction\n0\tentailment\n", "is not a valid prediction for wnli"),
        ("mnli", "index\tprediction\n0\tnot_entailment\n", "is not a valid prediction for mnli"),
        ("stsb", "index\tprediction\n0\t5.001\n", "is not a valid prediction for stsb"),
        ("stsb", "index\tprediction\n0\tnan\n", "is not a valid prediction for stsb"),
        ("stsb", "index\tprediction\n0\thigh\n", "is not a valid prediction for stsb"),
    ],
)
def test_the_validator_refuses(task, text, what):
    (problem,) = submission.problems(TASKS[task], text, 1)
    assert what in problem


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda lines: lines[:1], "has no rows"),
        (lambda lines: [], "has no rows|columns .* are missing"),
        (lambda lines: ["sentence1\tsentence2", *lines[1:]], "columns .'index'. are missing"),
        (lambda lines: lines[:3] + lines[4:], "line 4: index '3' where 2 was expected"),
        (lambda lines: [*lines[:4], "3\tshort"], None),
        (lambda lines: [lines[0], *(f"{i}\tshort" for i in range(40))], "too few columns"),
    ],
)
def test_damaged_test_files(tmp_path, change, what):
    """Few rows that are cut short are answered all the same; the rest is refused by line."""
    data = write_set(tmp_path / "data", "RTE.tsv", change=change)
    task, blind = SETS["RTE.tsv"]
    if what is None:
        assert list(stream_blind(task, blind, str(data)))[-1] == {"sentence1": "short", "sentence2": ""}
        return
    with pytest.raises(UserError, match=what):
        list(stream_blind(task, blind, str(data)))


def test_everything_wrong_is_said_before_a_model_is_loaded(tmp_path):
    data = write_set(tmp_path / "data", "RTE.tsv", change=lambda lines: lines[:1])
    cases = {
        ("rte", "mrcp=a", "sample=a", "rte=./nowhere", "sst2=a", "sst2=b"): ["TASK=DIR", "mrpc", "no test set", "no such", "twice"],
        (f"rte={tmp_path}",): ["has no rows"],
        (f"wnli={tmp_path}",): ["has none of WNLI/test.tsv"],
    }  # fmt: skip
    for models, expected in cases.items():
        with pytest.raises(UserError) as caught:
            submit(tmp_path, data, "--task_models", *models)
        said = [str(p) for p in caught.value.problems]
        assert len(said) == len(expected) and all(e in s for e, s in zip(expected, said, strict=True)), said
    with pytest.raises(UserError, match="holds no finished run"):
        submit(tmp_path, data, "--run_root", data)
    write_run(tmp_path / "runs", TASKS["rte"], 0, 0.6).joinpath("exports/compact/config.json").unlink()
    with pytest.raises(UserError, match="export the run again"):
        submit(tmp_path, data, "--run_root", tmp_path / "runs")
    assert not (tmp_path / "s.zip").exists()


@pytest.mark.parametrize("output", ["file/x.zip", "folder.zip"])
def test_a_zip_that_cannot_be_written_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, output):
    monkeypatch.setattr(answers, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.zip").mkdir()
    write_set(tmp_path / "data", "RTE.tsv")
    model = write_model(tmp_path / "rte", TASKS["rte"])
    words = ["--glue_submission", "--data_dir", tmp_path / "data", "--task_models", f"rte={model}"]
    with pytest.raises(UserError, match=r"output_file=.*cannot be written"):
        predict.run([*map(str, words), "--output_file", str(tmp_path / output)])


def test_a_model_of_another_task_is_refused(tmp_path):
    data = write_set(tmp_path / "data", "MNLI-m.tsv")
    with pytest.raises(UserError, match="has 2 outputs, the task mnli needs 3"):
        submit(tmp_path, data, "--task_models", f"mnli={write_model(tmp_path / 'm', TASKS['rte'])}")
    assert not (tmp_path / "s.zip").exists()
