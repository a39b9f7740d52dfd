"""What the pages tell a reader to type, taken apart and handed to the real parsers. Nothing is run.

A program parses its options before anything else; `Parsed`, raised by the first thing it does afterwards, says that it got there.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import tomllib
from pathlib import Path

from prunadapt_ds import console, distributed
from prunadapt_ds.commands import compare, glue_table, init_slurm, plan
from tests.conftest import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        *(
            ROOT / name
            for name in ("README.md", "DESCRIPTION.md", "CONTRIBUTING.md", "slurm/README.md", "ds_configs/README.md")
        ),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
PROGRAMS = frozenset(
    [
        "python",
        "deepspeed",
        "torchrun",
        "mpirun",
        "srun",
        "sbatch",
        "prunadapt",
        "make",
        "pip",
        "tensorboard",
        "jupyter",
    ]
)
OPTION = re.compile(r"(?<![\w-])--([a-zA-Z][\w-]*)")
TARGETS = frozenset(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SETTINGS = re.compile(r"^[A-Z_]+=")
ELSEWHERE = frozenset(  # options of programs whose parsers are not at hand: sbatch, srun, mpirun, TensorBoard
    [
        "nodes",
        "gpus-per-node",
        "gpus",
        "gpus-per-task",
        "gres",
        "cpus-per-task",
        "array",
        "signal",
        "ntasks-per-node",
        "container-image",
        "mem",
        "allow-run-as-root",
        "logdir",
        "host",
        "help",
    ]
)


class Parsed(BaseException):
    """The options were understood."""


class Refused(AssertionError):
    """The line would not run."""


def blocks(text, language):
    """The fenced blocks of a page in one language."""
    return [body for _, name, body in FENCE.findall(text) if name == language]


def spoken(text):
    """Commands within the sentences of a page, as `lines` gives them: a program with words behind it. Of `a|b|c` each is one."""
    found = []
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text)):
        code = " ".join(code.split())
        if code.startswith("launcher/") and " " in code:
            code = f"python {code}"
        program, *rest = re.sub(r"^([A-Z_]+=\S+ )+", "", code).split(" ")
        if program == "prunadapt" and re.fullmatch(r"[\w-]+(\| ?[\w-]+)*", " ".join(rest)):  # named, not typed
            found += [[program, word.strip(), "--help"] for word in " ".join(rest).split("|")]
        elif program in PROGRAMS and rest:
            found += lines(code)
    return found


def lines(block):
    """Commands of a bash block, each as a list of words: comments gone, continued lines joined, pipes and lists taken apart.

    Of a loop's values the first stands for all.
    """
    found = []
    for name, value in re.findall(r"^for (\w+) in ([^\s;]+)", block, re.MULTILINE):
        block = block.replace(f"${name}", value)
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return found


def check(words):
    """Raises Refused unless the program exists and takes these words."""
    words = list(words)
    while words and (SETTINGS.match(words[0]) or words[0] in ("do", "for", "done")):
        if words.pop(0) == "for":
            return
    if not words:
        return
    program, *rest = words
    checker = {
        "deepspeed": _deepspeed,
        "torchrun": _torchrun,
        "mpirun": _after_python,
        "srun": _srun,
        "python": _python,
        "prunadapt": _command,
        "sbatch": _sbatch,
        "bash": _script,
        "make": _make,
        "pip": _pip,
        "source": lambda rest: _need(rest == [".venv/bin/activate"], rest),
        "echo": lambda rest: None,
        "tensorboard": lambda rest: _need("--host" in rest and "--logdir" in rest, rest),
        "kill": lambda rest: _need(rest[0] in ("-USR1", "-TERM"), rest),
        "hf": _hf,
        "jupyter": lambda rest: _need(Path(ROOT, rest[-1]).is_file(), rest),
    }.get(program)
    _need(checker is not None, f"nobody knows {program!r}")
    checker([word for word in rest if word != "..."])


def _need(condition, what):
    if not condition:
        raise Refused(str(what))


def _deepspeed(words):
    from deepspeed.launcher.runner import parse_args

    found = _quietly(parse_args, words)
    _started([found.user_script, *found.user_args], is_module=found.module)


def _torchrun(words):
    from torch.distributed.run import get_args_parser

    found = _quietly(get_args_parser().parse_args, words)
    _started([found.training_script, *found.training_script_args], is_module=found.module)


def _after_python(words):
    _need("python" in words, "starts no python")
    own = words[: words.index("python")]
    _need(all(OPTION.match(w) or w.startswith("-") or w.isdigit() for w in own), own)
    _python(words[words.index("python") + 1 :])


def _srun(words):
    """Ranks of its own, or one shell a node that starts them; a variable of SLURM's there stands for a number."""
    if "bash" not in words:
        return _after_python(words)
    own, (option, script) = words[: words.index("bash")], words[words.index("bash") + 1 :]
    _need(option == "-c" and all(w.startswith("-") for w in own), words)
    (inner,) = lines(re.sub(r"\$SLURM_\w+", "0", script))
    _need(inner[0] == "exec", "the shell has to become the launcher, or signals end at it")
    check(inner[1:])


def _python(words):
    if words and words[0] == "-m":
        _started(words[1:], is_module=True)
    elif words and words[0] == "-c":
        compile(words[1], "the command line", "exec")
    else:
        _started(words, is_module=False)


def _started(words, is_module):
    """What stands behind a launcher: a file of the project, or a module and what it is told."""
    name, *rest = words
    if is_module:
        if name == "prunadapt_ds":
            return _command(rest)
        if name in sys.stdlib_module_names:
            return None
        _need(Path(ROOT, *name.split(".")).with_suffix(".py").is_file(), f"there is no module {name}")
    else:
        path = ROOT / name
        _need(path.is_file(), f"there is no {name}")
        if path.parent == ROOT / "launcher":
            return _command([path.stem, *rest])
        text = path.read_text()
        for option in OPTION.findall(" ".join(rest)):
            _need(option == "help" or f'"--{option}"' in text, f"{name} has no --{option}")
    return None


def _command(words):
    """Runs `prunadapt ...` as far as its options are parsed. Folders that options name are taken to exist."""
    _need(words, "which command?")
    if words[0] in ("COMMAND", "--help", "--version"):
        return
    names = {c.name for c in console.COMMANDS}
    name = words[0].replace("_", "-")
    _need(name in names, f"there is no command {name}")
    for option in ("--data_dir", "--resume"):
        if option in words and words[words.index(option) + 1] not in ("auto", "never", "DIR"):
            Path(words[words.index(option) + 1].lstrip("/")).mkdir(parents=True, exist_ok=True)
            words[words.index(option) + 1] = words[words.index(option) + 1].lstrip("/")
    if "--config" in words:
        Path(words[words.index("--config") + 1]).write_text("")
    said = io.StringIO()
    with stopped_after_parsing(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = console.main([name, *words[1:]])
        except Parsed:
            return
        except SystemExit as end:
            code = end.code
    _need(code == 0, f"{' '.join(words)}: {said.getvalue().strip()[-300:]}")


@contextlib.contextmanager
def stopped_after_parsing():
    """The first thing that any program does with its options raises Parsed."""

    def stop(*_, **__):
        raise Parsed

    first = [(distributed, "init"), (plan, "read_config"), (glue_table, "gather"), (compare, "find")]
    first += [(init_slurm, "copy"), (console, "prepare_environment")]
    kept = [(module, name, getattr(module, name)) for module, name in first]
    argv, path = sys.argv, os.environ["PATH"]
    for module, name in first:
        setattr(module, name, (lambda: None) if name == "prepare_environment" else stop)
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)
        sys.argv, os.environ["PATH"] = argv, path


def _hf(words):
    """The real program, given a folder that is not there: it reads its options, and then has nothing to send."""
    from huggingface_hub.cli.hf import app

    _need(words[0] == "upload" and len(words) > 2, words)
    try:
        app.main([*words[:2], "there-is-no-such-folder", *words[3:]], standalone_mode=False)
    except FileNotFoundError:
        return
    except Exception as error:
        raise Refused(f"hf {words}: {error}") from error
    raise Refused(f"hf {words} did something")


def _quietly(parse, words):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(words)
    except (SystemExit, argparse.ArgumentError) as error:
        raise Refused(said.getvalue()[-300:]) from error


def _script(words):
    _need(words and (ROOT / words[0]).is_file(), f"there is no {words[:1]}")


def _sbatch(words):
    own = [w for w in words if w.startswith("slurm/")][:1]
    _need(own, "submits no template")
    place = words.index(own[0])
    for word in words[:place]:
        _need(word.startswith("--") and word[2:].split("=")[0] in ELSEWHERE, word)
    _script(own)
    _command(["train", *words[place + 1 :]])


def _make(words):
    for word in words:
        _need(SETTINGS.match(word) or word in TARGETS, f"there is no target {word}")


def _pip(words):
    _need(words[0] == "install", words)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for extra in ",".join(re.findall(r"^(?:\.|prunadapt-ds)\[(.*)\]$", word)).split(","):
            _need(not extra or extra in extras, f"there is no extra {extra}")


def options_known():
    """Every option that some program of the project or one of the launchers takes."""
    from deepspeed.launcher import runner
    from torch.distributed.run import get_args_parser

    known = set(ELSEWHERE)
    for command in console.COMMANDS:
        said = io.StringIO()
        with stopped_after_parsing(), contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            console.main([command.name, "--help"])
        known |= set(OPTION.findall(said.getvalue()))
    known |= {o.lstrip("-") for action in get_args_parser()._actions for o in action.option_strings}
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runner.parse_args(["--help"])
    known |= set(OPTION.findall(said.getvalue()))
    for path in (*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")):
        known |= set(re.findall(r'"--([a-z][\w-]*)"', path.read_text()))
    return known
