"""What a program does around its work."""

import signal
import subprocess
import sys

import pytest

from prunadapt_ds import distributed, entry, errors
from prunadapt_ds.errors import Problem, PrunadaptError, UserError
from tests.conftest import ROOT

pytestmark = pytest.mark.fast


@pytest.fixture
def ended(monkeypatch):
    """As on a rank of several under NCCL: in order, what ended the process or left the group."""
    seen = []
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "speaks_of", lambda error: True)
    monkeypatch.setattr(distributed, "device", lambda: distributed.torch.device("cuda"))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: seen.append("left"))

    def end(code):
        seen.append(f"ended with {code}")
        raise SystemExit(code)

    monkeypatch.setattr(distributed.os, "_exit", end)
    return seen


def failing(error):
    def work():
        raise error

    return work


def test_an_error_of_one_rank_does_not_wait_for_the_others(ended, capsys):
    """To leave NCCL's group would: they are in a collective, and the traceback would never be seen."""
    with pytest.raises(SystemExit):
        entry.guarded(failing(ZeroDivisionError("of this rank")))
    assert ended == ["ended with 1"] and "ZeroDivisionError: of this rank" in capsys.readouterr().err


def test_nor_does_one_that_has_lost_another(ended, capsys):
    with pytest.raises(SystemExit):
        entry.guarded(failing(distributed.dist.DistBackendError("NCCL error: remote process exited")))
    assert ended == ["ended with 1"] and "rank 1 has lost another rank" in capsys.readouterr().err


def test_what_all_ranks_know_is_said_and_the_group_left(ended, capsys):
    assert entry.guarded(failing(UserError(Problem("r", 0, "must be more")))) == 2
    assert entry.guarded(failing(PrunadaptError("the disk is full"))) == 1
    assert entry.guarded(lambda: None) == 0
    assert ended == ["left"] * 3 and capsys.readouterr().err == "error: r=0: must be more\nerror: the disk is full\n"


def test_a_program_of_one_process(capsys):
    assert [errors.exit_code_of(lambda: None), errors.exit_code_of(lambda: 1)] == [0, 1]
    assert errors.exit_code_of(failing(UserError(Problem("folder", "x", "exists")))) == 2
    assert capsys.readouterr().err == "error: folder='x': exists\n"
    with pytest.raises(ZeroDivisionError):
        errors.exit_code_of(failing(ZeroDivisionError()))


PROGRAM = """
import sys, tempfile, time
from pathlib import Path
sys.argv = ["program"]
from prunadapt_ds.environment import leave, prepare_program
prepare_program()
if {moment!r} == "imports":
    print("here", flush=True)
    time.sleep(60)
from prunadapt_ds import entry, files
def work():
    with files.whole_file(Path({output!r})) as file:
        file.write("half")
        print("here", flush=True)
        time.sleep(60)
leave(entry.guarded(work))
"""


def in_front():
    """Before the program starts: Ctrl-C reaches it, although these tests may run in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_the_background():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("moment, code", [("imports", -signal.SIGINT), ("work", 130)])
def test_ctrl_c_leaves_no_traceback_and_nothing_half_done(tmp_path, moment, code):
    """In a program's imports the signal ends it; in its work an exception does, so that what was begun is removed."""
    program = PROGRAM.format(moment=moment, output=str(tmp_path / "answers.csv"))
    pipe, command = subprocess.PIPE, [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=in_front) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (code, "") and list(tmp_path.iterdir()) == []


def test_programs_are_interrupted_so_and_libraries_keep_their_handler():
    for file in (ROOT / "launcher").glob("*.py"):
        assert "prepare_environment" not in file.read_text(), f"{file} is a program"
    code = (
        "import signal; from prunadapt_ds.environment import interruptible, prepare_environment; prepare_environment()\n"
        "with interruptible(): assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=in_front).returncode == 0
    code = (
        "import signal; from prunadapt_ds.environment import interruptible, prepare_program; prepare_program()\n"
        "with interruptible(): assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=in_the_background).returncode == 0
