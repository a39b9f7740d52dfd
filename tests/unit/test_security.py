"""What is never done: unpickle, run a stranger's code unasked, evaluate text, let others write, listen on the network."""

import ast
import json
import os
import re

import pytest

from prunadapt_ds import files
from prunadapt_ds.commands import compare, evaluate, glue_table, init_slurm
from prunadapt_ds.config import OPTIONS
from tests.conftest import ROOT
from tests.tiny import tiny_data, tiny_model, tiny_tokenizer
from tests.unit.test_report import filled

pytestmark = pytest.mark.fast
SOURCES = sorted(p for d in ("prunadapt_ds", "launcher", "examples", "benchmarks") for p in (ROOT / d).rglob("*.py"))
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "_pickle"}
CALLS = {
    *("eval", "exec", "torch.load", "torch.save", "np.load", "numpy.load", "os.system", "os.popen"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load"),
}


def faults(source):
    """Lines of a source that unpickle, evaluate text, go through a shell, or load weights that may be pickled."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {n}" for n in names if n.split(".")[0] in PICKLERS]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
        if called in CALLS:
            found.append(f"{node.lineno}: calls {called}")
        if options.get("shell") == "True" or options.get("allow_pickle") == "True":
            found.append(f"{node.lineno}: {called} with shell or pickle")
        if options.get("trust_remote_code") == "True":
            found.append(f"{node.lineno}: {called} trusts any code")
        is_model = called.endswith(".from_pretrained") and not re.search("Tokenizer|Config|PeftModel", called)
        if is_model and options.get("use_safetensors") != "True":
            found.append(f"{node.lineno}: {called} takes pickled weights")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_safetensors_and_json_are_read(path):
    found = faults(path.read_text())
    if path.parts[-2] == "benchmarks":  # they load what this project has just written, as a user would
        found = [f for f in found if not f.endswith(("takes pickled weights", "trusts any code"))]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=True)",
        "eval(text)",
        "yaml.load(text, Loader=Loader)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=True)",
    ],
)
def test_each_of_them_would_be_seen(line):
    assert faults(f"def f():\n    {line}\n")


def test_code_of_others_is_off_by_default():
    assert OPTIONS["trust_remote_code"].default is False


def test_tensorboard_listens_here_only():
    (recipe,) = re.findall(r"^tensorboard:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe.endswith("tensorboard --logdir outputs --host 127.0.0.1")
    for path in [ROOT / "Makefile", ROOT / "README.md", *ROOT.glob("docs/*.md"), *SOURCES]:
        for line in path.read_text().splitlines():
            assert "tensorboard --logdir" not in line or "--host 127.0.0.1" in line, f"{path.name}: {line}"


# ----------------------------------------------------------------------------------------------------- file modes


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def loose(folder):
    """What others than the owner may write."""
    return [str(p) for p in folder.rglob("*") if p.lstat().st_mode & 0o022]


def test_files_are_the_owners_to_write_whatever_the_umask(tmp_path, open_umask):
    """Whole runs are looked at in tests/integration/test_runs.py."""
    (tmp_path / "a").mkdir()
    assert loose(tmp_path), "or this test sees nothing"
    (tmp_path / "a").rmdir()
    with files.owner_writes_alone():
        files.replace(tmp_path / "new" / "a.json", "{}")
        with files.whole_folder(tmp_path / "export") as unfinished:
            (unfinished / "model.safetensors").write_bytes(b"x")
            (unfinished / "model.safetensors").chmod(0o600)
        files.OwnedFolder(tmp_path / "out").release()
    assert not loose(tmp_path)
    assert (tmp_path / "export" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert os.umask(0) == 0, "is put back"


def test_templates_are_the_owners_to_write(tmp_path, open_umask):
    assert init_slurm.main([str(tmp_path / "project")]) == 0
    assert not loose(tmp_path), "slurm/train.sh is submitted by its owner"


def test_a_tight_umask_stays_tight(tmp_path):
    before = os.umask(0o077)
    try:
        with files.owner_writes_alone(), files.whole_folder(tmp_path / "export") as unfinished:
            (unfinished / "a").write_text("")
        assert (tmp_path / "export" / "a").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "export").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_programs_without_ranks(tmp_path, open_umask, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "rte/seed0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "report.json").write_text(json.dumps(filled()))
    for path in tmp_path.rglob("*"):
        path.chmod(0o755)
    assert compare.main(["run", "--output_dir", "compared"]) == 0
    assert glue_table.main([".", "--tasks", "rte"]) in (0, 1)
    tiny_model("bert").save_pretrained("classifier")
    tiny_tokenizer("classifier")
    data = tiny_data(tmp_path / "data", n_train=4, n_dev=4)
    for path in tmp_path.rglob("*"):
        path.chmod(path.stat().st_mode & ~0o022)
    argv = ["--model_name_or_path", "./classifier", "--output_dir", "scores", "--max_seq_length", "32"]
    argv += ["--train_file", str(data / "train.csv"), "--validation_file", str(data / "validation.csv")]
    before = dict(os.environ)
    assert evaluate.main(argv) == 0
    for name in set(os.environ) - set(before):
        del os.environ[name]
    assert (tmp_path / "scores" / "scores.json").is_file() and not loose(tmp_path)
