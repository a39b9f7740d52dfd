"""What the pages say can be typed can be typed: commands, options, targets, files, links, and code."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import tomllib

import pytest

from prunadapt_ds import console
from tests.conftest import ROOT
from tests.unit import commands

pytestmark = pytest.mark.fast
TYPED = [
    (name, words)
    for name, path in commands.PAGES.items()
    for block in commands.blocks(path.read_text(), "bash")
    for words in commands.lines(block)
]
SPOKEN = [(name, words) for name, path in commands.PAGES.items() for words in commands.spoken(path.read_text())]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Files that options name are made here."""
    monkeypatch.chdir(tmp_path)


def test_there_are_commands_on_the_pages():
    assert len(SPOKEN) > 30 and len({name for name, _ in SPOKEN}) > 5
    assert len(TYPED) > 50 and {"README.md", "docs/glue.md", "docs/operations.md"} <= {name for name, _ in TYPED}


@pytest.mark.parametrize("name", commands.PAGES)
def test_every_command_is_understood(name):
    wrong = []
    for _, words in (typed for typed in (*TYPED, *SPOKEN) if typed[0] == name):
        try:
            commands.check(words)
        except commands.Refused as refused:
            wrong.append(f"{' '.join(words)}\n    {refused}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line, why",
    [
        ("deepspeed launcher/train.py --task_nam mrpc", "did you mean --task_name"),
        ("deepspeed --num_accelerators two launcher/train.py", "invalid int value"),
        ("torchrun --nproc-per-node 2 -m prunadapt_ds trian", "no command trian"),
        ("srun -N2 bash -c 'exec torchrun --node-rnk=$SLURM_NODEID launcher/train.py'", "nrecognized arguments"),
        ("srun -N2 bash -c 'torchrun --nnodes=2 launcher/train.py'", "signals end at it"),
        ("python launcher/tain.py", "there is no launcher/tain.py"),
        ("python examples/own_data.py --nothing", "has no --nothing"),
        ("prunadapt predict --input_file -", "model_name_or_path"),
        ("prunadapt export --run_dir outputs --export_formats adapter", "invalid choice"),
        ("sbatch --nods=4 slurm/train.sh", "--nods"),
        ("sbatch slurm/train.sh --target_sparsity 2", "less than 1"),
        ("make tea", "no target tea"),
        ("pip install '.[everything]'", "no extra everything"),
        ("rm -rf outputs", "nobody knows"),
    ],
)
def test_a_wrong_command_is_noticed(line, why):
    (words,) = commands.lines(line)
    with pytest.raises(commands.Refused, match=re.escape(why)):
        commands.check(words)


def test_lines_are_taken_apart_as_a_shell_does():
    block = 'A=1 make x  # why\necho "a | b" | prunadapt predict \\\n  --input_file - && make y\n'
    assert commands.lines(block) == [
        ["A=1", "make", "x"], ["echo", "a | b"], ["prunadapt", "predict", "--input_file", "-"], ["make", "y"],
    ]  # fmt: skip


def test_commands_within_sentences_are_found():
    text = "`make\ntea`, `DATA=/x sbatch slurm/train.sh`, `prunadapt plan|\ntrain`, `launcher/export.py --run_dir out`, `make`.\n"
    assert commands.spoken(text + "```bash\nmake toast\n```\n") == [
        ["make", "tea"], ["DATA=/x", "sbatch", "slurm/train.sh"], ["prunadapt", "plan", "--help"],
        ["prunadapt", "train", "--help"], ["python", "launcher/export.py", "--run_dir", "out"],
    ]  # fmt: skip


def test_every_command_of_the_generated_page_is_understood():
    """The site's page of all commands: its blocks, and the examples of those whose help it prints."""
    for name in ("mkdocs", "latex2mathml"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.commands_page()
    examples = [block.split("example: ")[1] for block in commands.blocks(page, "text")]
    typed = [words for block in (*commands.blocks(page, "bash"), *examples) for words in commands.lines(block)]
    assert {words[1] for words in typed} == {command.name for command in console.COMMANDS}
    for words in (*typed, *commands.spoken(page)):
        commands.check(words)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", sorted({t for _, (p, *ts) in (*TYPED, *SPOKEN) if p == "make" for t in ts}))
def test_every_target_on_a_page_has_a_recipe_that_is_understood(target):
    """As make would run it in an environment that is there already."""
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    for words in commands.lines(done.stdout):
        words = [word for word in words if not word.startswith("PATH=")]
        if words[0] in ("deepspeed", "tensorboard") or (words[0] == "python" and words[1] != "-m"):
            commands.check(words)


def test_every_option_named_exists():
    known = commands.options_known()
    wrong = {
        f"{name}: --{option}"
        for name, path in commands.PAGES.items()
        for option in commands.OPTION.findall(path.read_text())
        if option not in known
    }
    assert not wrong, sorted(wrong)


@pytest.mark.parametrize("name", commands.PAGES)
def test_files_and_targets_named_exist(name):
    text = commands.PAGES[name].read_text()
    for code in commands.INLINE.findall(text):
        for target in re.findall(r"^make ([a-z-]+)$", code):
            assert target in commands.TARGETS, f"{name}: make {target}"
        path = code.split(" ")[-1] if code.startswith(tuple(f"{name} " for name in commands.PROGRAMS)) else code
        if re.fullmatch(r"(launcher|examples|benchmarks|slurm|ds_configs|tests|prunadapt_ds)/[\w/.-]+", path):
            assert (ROOT / path).exists(), f"{name}: {path}"
        if re.fullmatch(r"zero\w+\.json", code):
            assert (ROOT / "ds_configs" / code).is_file(), f"{name}: {code}"


@pytest.mark.parametrize("name", commands.PAGES)
def test_code_compiles_and_imports_what_there_is(name):
    for block in commands.blocks(commands.PAGES[name].read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_yaml_on_the_pages_holds_options_of_a_run():
    import yaml

    from prunadapt_ds.config import OPTIONS

    found = [set(yaml.safe_load(b)) for p in commands.PAGES.values() for b in commands.blocks(p.read_text(), "yaml")]
    assert found and set().union(*found) <= set(OPTIONS)


@pytest.mark.parametrize("name", commands.PAGES)
def test_links_lead_somewhere(name):
    """Within docs/, mkdocs checks more (test_site.py); here what a forge shows. Some pages of the site are generated."""
    generated = {"slurm.md", "deepspeed.md", "changelog.md", "contributing.md", "commands.md", "models.md"}
    path = commands.PAGES[name]
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not link.startswith("http") and not (path.parent == ROOT / "docs" and link in generated):
            assert (path.parent / link).exists(), f"{name}: {link}"


def test_the_page_of_the_index_needs_no_files_beside_it():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / setup["readme"]).read_text()
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert setup["urls"] and all(url.startswith("https://") for url in setup["urls"].values())


def test_the_notebook_is_committed_without_outputs():
    book = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    text = "".join("".join(cell["source"]) + "\n" for cell in book["cells"] if cell["cell_type"] == "markdown")
    for words in (words for block in commands.blocks(text, "bash") for words in commands.lines(block)):
        commands.check(words)
