"""Whatever a file holds, it is read or refused as a user's mistake: no other exception leaves a parser."""

import csv
import io
import json
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunadapt_ds import checkpoint, earlier_run, formats, model_folder, resume
from prunadapt_ds.commands import compare, glue_table
from prunadapt_ds.config import OPTIONS, Config, parse
from prunadapt_ds.data import TASKS, TaskData, load_language, load_task
from prunadapt_ds.data.glue import load_tsv
from prunadapt_ds.ds_config import DsConfig, resolve_ds_config
from prunadapt_ds.ds_fields import KNOWN_KEYS
from prunadapt_ds.errors import UserError
from tests.tiny import layout_and_structure, tiny_model
from tests.unit.test_report import filled

pytestmark = pytest.mark.fast
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

CHARACTERS = st.sampled_from(
    [*"abc019,;|\t\n\r\"' .-+eE_{}[]:#&*!%@\\", "\0", "\ufeff", "é", "日", "\u2028", "\U0001f600"]
)
RAW = st.binary(max_size=60) | st.text(CHARACTERS, max_size=80).map(lambda text: text.encode("utf-8", "replace"))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(CHARACTERS | st.characters(), max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = st.sampled_from(["sentence1", "sentence2", "label", "text", "prompt", "response", "index", "", "a"])
CELLS = st.sampled_from(["a", "b", "0", "1", "0.5", "nan", "1e999", "", " ", 'say "x"', "x,y", "x\ty", "x\ny"])
TABLES = st.tuples(st.lists(COLUMNS, max_size=4), st.lists(st.lists(CELLS, max_size=4), max_size=4))
RECORDS = st.lists(st.dictionaries(COLUMNS, SCALARS | CELLS, max_size=3) | VALUES, max_size=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def table(header_and_rows, delimiter):
    header, rows = header_and_rows
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([header, *rows])
    return text.getvalue().encode()


def lines(records):
    return "\n".join(map(json.dumps, records)).encode()


DATA_FILES = {
    "csv": RAW | TABLES.map(lambda t: table(t, ",")),
    "tsv": RAW | TABLES.map(lambda t: table(t, "\t")),
    "jsonl": RAW | RECORDS.map(lines),
    "json": RAW | RECORDS.map(lambda records: json.dumps(records).encode()),
    "parquet": RAW | RAW.map(lambda raw: b"PAR1" + raw + b"PAR1"),
    "txt": RAW,
}


def read(work):
    """What `work` returns, or None where it raises UserError whose every problem is a line of text."""
    try:
        return work()
    except UserError as error:
        assert error.problems and all(p.remedy for p in error.problems)
        assert len(str(error).splitlines()) == len(error.problems)
        str(error).encode("utf-8")
        return None


@pytest.mark.parametrize("kind", DATA_FILES)
@given(data=st.data())
@fuzz
def test_data_files(place, kind, data):
    paths = [place / f"{name}.{kind}" for name in ("train", "dev")]
    for path in paths:
        path.write_bytes(data.draw(DATA_FILES[kind]))
    train, dev = map(str, paths)
    config = SimpleNamespace(
        **dict.fromkeys(("task_name", "data_dir", "problem_type", "max_train_samples", "max_eval_samples")),
        train_file=train,
        validation_file=dev,
    )
    for load in (lambda: load_task(config, 0), lambda: load_language(config)):
        found = read(load)
        assert found is None or (
            isinstance(found, TaskData) and len(found.train) and len(found.validation["validation"])
        )


TSV_COLUMNS = st.sampled_from(sorted({c for task in TASKS.values() for c in task.tsv_columns if not c.isdigit()}))
TSV_CELLS = CELLS | st.sampled_from(["entailment", "not_entailment", "neutral", "3.2", "-1", "٣", "1_0", "9" * 5000])
TSV = st.tuples(st.lists(TSV_COLUMNS, max_size=5), st.lists(st.lists(TSV_CELLS, max_size=5), max_size=3)).map(
    lambda t: "\n".join("\t".join(row) for row in [t[0], *t[1]]).encode()
)


@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb", "mnli", "rte"])
@given(data=st.data())
@fuzz
def test_glue_files(place, name, data):
    task = TASKS[name]
    folder = place / task.folder
    folder.mkdir(exist_ok=True)
    for file in ("train.tsv", *(split.tsv for split in task.validation_splits)):
        (folder / file).write_bytes(data.draw(RAW | TSV))
    found = read(lambda: load_tsv(task, str(place), trains=True))
    if found is not None:
        labels = found["train"]["label"]
        assert labels and all(isinstance(x, float) if task.is_regression else x in (0, 1, 2) for x in labels)


def as_json(values):
    return json.dumps(values).encode()


@given(raw=RAW | st.dictionaries(st.sampled_from([*OPTIONS, "x"]), VALUES, max_size=4).map(as_json))
@fuzz
def test_config_files(place, raw):
    """JSON is yaml, too."""
    (place / "run.yaml").write_bytes(raw)
    found = read(lambda: parse(["--config", str(place / "run.yaml")]))
    assert found is None or isinstance(found, Config)


PIECES = CHARACTERS | st.sampled_from(
    [": ", "- ", "\n  ", "r: ", "seed: ", "!!int ", "!!timestamp ", "? ", "2020-13-01"]
)


@given(text=st.lists(PIECES, max_size=20).map("".join))
@fuzz
def test_config_files_of_odd_yaml(place, text):
    (place / "odd.yaml").write_text(text, encoding="utf-8", errors="replace")
    read(lambda: parse(["--config", str(place / "odd.yaml")]))


ZERO = st.dictionaries(
    st.sampled_from(
        ["stage", "offload_param", "offload_optimizer", "reduce_bucket_size", "zero_quantized_weights", "x"]
    ),
    VALUES | st.sampled_from([0, 3, "auto", {"device": "cpu"}, {"device": "nvme", "nvme_path": 3}]),
    max_size=3,
)
DS_FILES = st.dictionaries(
    st.sampled_from([*KNOWN_KEYS, "x"]), VALUES | ZERO | st.sampled_from(["auto", {"enabled": "auto"}]), max_size=4
)


@given(raw=RAW | (DS_FILES | ZERO.map(lambda zero: {"zero_optimization": zero}) | VALUES).map(as_json))
@fuzz
def test_ds_configs(place, raw):
    (place / "ds.json").write_bytes(raw)
    config = parse(["--ds_config", str(place / "ds.json")])
    found = read(lambda: resolve_ds_config(config, 2, probe=lambda: False))
    assert found is None or (isinstance(found, DsConfig) and "auto" not in found.values.values())


META = st.fixed_dictionaries(
    {}, optional={"format": SCALARS | st.just(1), "step": SCALARS, "files": VALUES | st.just({}), "sha256": SCALARS}
)


@given(
    raw=RAW
    | VALUES.map(as_json)
    | META.map(as_json)
    | META.map(lambda v: as_json({**v, "sha256": checkpoint._digest(v)}))
)
@fuzz
def test_checkpoints(place, raw):
    """Also where the checksum is right."""
    folder = place / "checkpoints" / "step-3"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / checkpoint.STATE).write_bytes(raw)
    try:
        found, damaged = checkpoint.newest(folder.parent)
        assert (found is None) == bool(damaged) and (found is None or isinstance(found.step, int))
    except checkpoint.Unread:  # a later version's, or files of names that no file can have
        pass
    read(lambda: earlier_run._given(folder))


@given(
    report=RAW | VALUES.map(as_json) | st.just(b'{"status": "complete"}'), run=RAW | VALUES.map(as_json), noted=VALUES
)
@fuzz
def test_what_an_earlier_run_left(place, report, run, noted):
    out = place / "out"
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_bytes(report)
    (out / "run.json").write_bytes(run)
    (out / "checkpoints" / resume.REBUILDS).write_text(json.dumps(noted))
    read(lambda: earlier_run._finished(out, {"seed": 0}))
    rebuilds = resume.noted_rebuilds(parse(["--output_dir", str(out)]))
    assert all(isinstance(step, int) and isinstance(done, bool) for step, done in rebuilds.items())


@pytest.fixture(scope="module")
def layout():
    layout, _ = layout_and_structure(tiny_model("bert"), 16)
    return layout.to_dict()


@given(data=st.data())
@fuzz
def test_exports_and_plans(place, layout, data):
    """The configuration of a compact folder and the plan beside it, each whole, spoilt in places, or nonsense."""
    compact = place / "run" / "exports" / "compact"
    compact.mkdir(parents=True, exist_ok=True)

    def spoilt(values):
        changed = data.draw(st.dictionaries(st.sampled_from(sorted(values)), VALUES, max_size=2))
        return {**values, **changed}

    unit = {"layer": 0, "kind": "heads", "dense": 4, "kept": [0, 1]}
    plan = {"units": [spoilt(unit) for _ in range(data.draw(st.sampled_from([0, 1, 6])))]}
    structure = {"layout": spoilt(layout), "kept": data.draw(st.just([[2, 2]] * 3) | VALUES)}
    config = {"model_type": "bert", "architectures": ["PrunedBertModel"], "pruned_structure": structure}
    (compact / "config.json").write_bytes(data.draw(RAW | VALUES.map(as_json) | st.just(as_json(spoilt(config)))))
    (place / "run" / "plan.json").write_bytes(data.draw(RAW | VALUES.map(as_json) | st.just(as_json(plan))))
    found = read(lambda: formats.read_plan(place / "run" / "plan.json", compact))
    assert found is None or all(set(u["kept"]) <= set(range(u["dense"])) for u in found["units"])
    read(lambda: model_folder.check(str(compact)))
    read(lambda: model_folder.check(str(compact), to_train=False))


@given(data=st.data())
@fuzz
def test_reports(place, data):
    """A report of somewhere else is shown as missing or failed beside a sound one, whatever is in it."""
    sound, report = place / "sound", filled()
    sound.mkdir(exist_ok=True)
    (sound / "report.json").write_bytes(as_json(report))
    for key in data.draw(st.lists(st.sampled_from(sorted(report)), max_size=2)):
        inner = report[key]
        if isinstance(inner, dict) and inner and data.draw(st.booleans()):
            inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(VALUES)
        else:
            report[key] = data.draw(VALUES)
    folder = place / "reports" / "rte" / "seed0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_bytes(data.draw(RAW | VALUES.map(as_json) | st.just(as_json(report))))
    rows = compare.table(compare.lines(compare.find([str(folder), str(sound)])))
    assert len(rows) == 2
    read(lambda: compare.find([str(folder)]))
    cells = [glue_table.read_cell(place / "reports", "rte", 0)]
    assert glue_table.markdown(glue_table.summary(cells, ["rte"], [0]))
