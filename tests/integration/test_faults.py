"""A table of faults: nothing lost, a clear line, a non-zero exit on every rank, no hang.

| fault | what happens | test |
|---|---|---|
| checkpoint truncated, a bit flipped | the one before is taken | test_resume, test_checkpoint |
| no checkpoint is intact, or one cannot be read | exit 2, all stays | test_checkpoint |
| disk full in a checkpoint, in the export | exit 1, the last checkpoint stays | test_a_full_disk |
| metrics.jsonl cannot be opened | exit 1 on every rank | test_metrics_that_cannot_be_opened |
| output_dir cannot be written, has a live owner | exit 2 before anything is loaded | test_no_place_to_write, test_a_folder_in_use |
| loss is NaN or infinite | exit 1, step and samples named, the last checkpoint stays | test_a_loss_that_is_no_number |
| one rank dies | the others end | test_one_rank_dies |
| one rank's data differs | exit 4 | test_one_rank_has_other_data |
| ranks disagree on a plan | exit 4 | test_ranks_that_disagree_on_a_plan |
| a rank is stuck, or suspended | who notices writes its stacks and ends, all end | test_a_stuck_rank, test_a_suspended_rank |
| rank 0 fails alone | every rank raises | test_what_only_rank_0_can_see |
| TensorBoard's folder vanishes, or cannot be made | the run goes on | test_tensorboard_s_folder_vanishes, test_report |
| ds_config changed between two parts of a run | named, or taken where it changes nothing | test_resume |
| hub unreachable | exit 2 in seconds, offline options named | test_hub |
| a compiler's lock left by a dead process | removed | test_the_lock_of_a_dead_compiler |
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from prunadapt_ds import checkpoint, distributed
from prunadapt_ds.errors import PrunadaptError
from tests.distributed import runs
from tests.distributed.harness import Ranks, run_ranks
from tests.distributed.test_laws import arguments
from tests.integration.test_resume import argv, run
from tests.tiny import exchange_two_words, tiny_data, tiny_folder

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    tiny_folder(folder / "bert", "bert")
    tiny_data(folder / "data", n_train=37, n_dev=21)
    return folder


def status(output):
    return json.loads((output / "report.json").read_text())["status"]


def test_a_loss_that_is_no_number(base, tmp_path):
    """Learning rate 1e30: the second step's loss is not finite; the first one's checkpoint stays the last."""
    out = tmp_path / "out"
    ended = run(argv(base, out, learning_rate=1e30, checkpoint_steps=1))
    assert [rank.code for rank in ended] == [1, 1]
    (line,) = [line for line in ended[0].text.splitlines() if line.startswith("error")]
    assert "not a finite number at step 2, on training samples" in line and "checkpoints/step-1" in line
    assert "error" not in ended[1].text and "Traceback" not in ended[0].text + ended[1].text
    assert checkpoint.newest(out / "checkpoints")[0].step == 1
    assert status(out) == "failed"


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of a given size, mounted at a folder."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount a small tmpfs here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    "kilobytes, every, last, what", [(700, 2, {2, 4, 6, 8}, "checkpoint"), (430, 100, {12}, "export")]
)
def test_a_full_disk(base, tmp_path, small_disk, kilobytes, every, last, what):
    """A checkpoint takes about 270 KB, 170 later, as do TensorBoard's file and the export: one of these does not fit."""
    disk = small_disk(kilobytes)
    ended = run(argv(base, disk / "out", checkpoint_steps=every))
    assert [rank.code for rank in ended] == [1, 1], ended[0].text[-2000:]
    (line,) = [line for line in ended[0].text.splitlines() if line.startswith("error")]
    assert f"writing the {what}" in line and "No space left on device" in line
    assert "Traceback" not in ended[0].text + ended[1].text
    found, damaged = checkpoint.newest(disk / "out" / "checkpoints")
    assert found.step in last and not damaged
    assert not list((disk / "out").glob("**/.*")), "nothing half-written stays"


def test_no_place_to_write(base, tmp_path):
    (tmp_path / "file").write_text("")
    argv = arguments(base, tmp_path / "ds", output_dir=tmp_path / "file" / "out")
    first, second = run_ranks(runs.whole_run_said, 2, argv)
    assert first[0] == second[0] == 2
    assert first[1].startswith("error: output_dir=") and "cannot be written" in first[1] and not second[1]


def test_metrics_that_cannot_be_opened(base, tmp_path):
    """And TensorBoard that cannot be either, which would not have mattered."""
    (tmp_path / "out" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "out" / "runs").write_text("")
    ended = run(argv(base, tmp_path / "out"))
    assert [rank.code for rank in ended] == [1, 1]
    (line,) = [line for line in ended[0].text.splitlines() if line.startswith("error")]
    assert "opening metrics.jsonl failed: " in line and "Is a directory" in line
    assert "error" not in ended[1].text and "Traceback" not in ended[0].text + ended[1].text


def test_a_folder_in_use(base, tmp_path):
    from tests.unit.test_checkpoint import hold

    owner = hold(tmp_path / "out")
    try:
        first, second = run_ranks(runs.whole_run_said, 2, arguments(base, tmp_path / "out"))
    finally:
        owner.kill()
        owner.wait()
    assert first[0] == second[0] == 2 and f"process {owner.pid} on" in first[1]


@pytest.mark.parametrize("where", ["step-3", "build-0"])
def test_one_rank_dies(base, tmp_path, where):
    ranks = Ranks(argv(base, tmp_path / "out"), 2, {"PRUNADAPT_FAULT": f"SIGKILL@{where}@1"})
    ranks.wait_for(lambda: not ranks.processes[1].is_alive(), timeout=400)
    start = time.monotonic()
    survivor, dead = ranks.wait(60)
    assert dead.code == -9 and survivor.code == 1 and time.monotonic() - start < 60
    assert "error: rank 0 has lost another rank" in survivor.text and "Traceback" not in survivor.text
    newest, _ = checkpoint.newest(tmp_path / "out" / "checkpoints")
    assert (newest and newest.step) == (2 if where == "step-3" else None)


@pytest.mark.parametrize("how", ["data", "an option", "a tokenizer"])
def test_one_rank_is_given_something_else(base, tmp_path, how):
    """Files on the disks of several hosts."""
    tiny_data(tmp_path / "data", n_train=38, n_dev=21)
    mine = argv(base, tmp_path / "out")
    if how == "an option":
        other, what = ["--logging_steps", "2"], "what the options and the DeepSpeed file ask for differs"
    elif how == "a tokenizer":
        folder = Path(shutil.copytree(base / "bert", tmp_path / "bert"))
        exchange_two_words(folder)
        other, what = ["--model_name_or_path", str(folder)], "what the tokenizer makes of the data differs"
    else:
        other, what = ["--train_file", str(tmp_path / "data" / "train.csv")], "the data differs"
    ended = Ranks([mine, [*mine, *other]], 2).wait(400)
    assert [rank.code for rank in ended] == [4, 4]
    assert f"error: {what} between ranks: ranks [1]" in ended[0].text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"ds.json"}


def test_a_tokenizer_that_fails_on_one_rank_ends_all(base, tmp_path):
    folder = Path(shutil.copytree(base / "bert", tmp_path / "bert"))
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["sun"] = 5000  # the model has no such token
    (folder / "tokenizer.json").write_text(json.dumps(values))
    mine = argv(base, tmp_path / "out")
    ended = Ranks([mine, [*mine, "--model_name_or_path", str(folder)]], 2).wait(400)
    assert [rank.code for rank in ended] == [2, 2]
    assert "the tokenizer produces token 5000" in ended[0].text


def test_ranks_that_disagree_on_a_plan(base, tmp_path):
    found = run_ranks(_with_another_plan_on_rank_1, 2, argv(base, tmp_path / "out"))
    assert [code for code, _ in found] == [4, 4]
    assert "the pruning plan of step 4 differs between ranks: ranks [1]" in found[0][1]
    assert status(tmp_path / "out") == "failed"
    assert checkpoint.newest(tmp_path / "out" / "checkpoints")[0].step == 2


def _with_another_plan_on_rank_1(argv):
    from prunadapt_ds import train

    honest = train.decide
    if distributed.rank() == 1:
        train.decide = lambda scores, *others, **options: honest(scores.flip(0), *others, **options)
    try:
        return runs.whole_run_said(argv)
    finally:
        train.decide = honest


@pytest.mark.parametrize("where", ["checkpoint-6/begin", pytest.param("shrink-6/end", marks=pytest.mark.full)])
def test_a_stuck_rank(base, tmp_path, where):
    """Within a minute of when it stopped, also right after what may take an hour."""
    environment = {"PRUNADAPT_FAULT": f"stall@{where}@1", "PRUNADAPT_STUCK_SECONDS": "3"}
    ended = Ranks(argv(base, tmp_path / "out"), 2, environment).wait(300)
    assert [rank.code for rank in ended] == [1, 1]
    assert "error: rank 1 has made no progress for" in ended[1].text
    dump = tmp_path / "out" / "stuck-rank-1.txt"
    assert "in fault_point" in dump.read_text()
    assert "error: rank 0 has" in ended[0].text, "no progress either, or lost the other, whichever it noticed first"
    newest = checkpoint.newest(tmp_path / "out" / "checkpoints")[0]
    assert newest.step == 4
    assert dump.stat().st_mtime - newest.folder.stat().st_mtime < 60


@pytest.mark.full
def test_a_suspended_rank(base, tmp_path):
    """It cannot tell; the one that waits for it does, and says that it stands in a collective."""
    environment = {"PRUNADAPT_FAULT": "SIGSTOP@checkpoint-4/end@1", "PRUNADAPT_STUCK_SECONDS": "3"}
    ranks = Ranks(argv(base, tmp_path / "out"), 2, environment)
    try:
        ranks.wait_for(lambda: not ranks.processes[0].is_alive(), timeout=300)
    finally:
        ranks.processes[1].kill()
    waiting, _ = ranks.wait(30)
    assert waiting.code == 1 and "error: rank 0 has made no progress for" in waiting.text
    dump, newest = tmp_path / "out" / "stuck-rank-0.txt", checkpoint.newest(tmp_path / "out" / "checkpoints")[0]
    assert "train_step" in dump.read_text() and newest.step == 4
    assert dump.stat().st_mtime - newest.folder.stat().st_mtime < 60


def test_tensorboard_s_folder_vanishes(base, tmp_path):
    """Said once, on the console of a run that ends well."""
    ranks = Ranks(argv(base, tmp_path / "out"), 1, {"PRUNADAPT_FAULT": "SIGSTOP@checkpoint-2/end@0"})
    process = ranks.processes[0]
    ranks.wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", 300)
    shutil.rmtree(tmp_path / "out" / "runs")
    (tmp_path / "out" / "runs").write_text("a file")
    os.kill(process.pid, signal.SIGCONT)
    (ended,) = ranks.wait(300)
    assert ended.code == 0 and status(tmp_path / "out") == "complete", ended.text[-2000:]
    assert ended.text.count("TensorBoard logging stopped") == 1 and "Traceback" not in ended.text
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 6, 9, 12, 12]


def test_what_only_rank_0_can_see():
    messages = run_ranks(_rank_0_fails, 2)
    assert messages[0] == messages[1] == "writing the report failed: [Errno 28] No space left on device"


def test_what_holds_everywhere():
    assert run_ranks(_holds, 2, [True, False]) == [False, False] and run_ranks(_holds, 2, [True, True]) == [True, True]


def _holds(of_rank):
    return distributed.true_on_all_ranks(of_rank[distributed.rank()])


def _rank_0_fails():
    def write():
        raise OSError(28, "No space left on device")

    try:
        return distributed.on_rank_0("writing the report", write)
    except PrunadaptError as error:
        return str(error)


def test_the_lock_of_a_dead_compiler(tmp_path):
    lock = tmp_path / "lock"
    distributed.free_compiler_lock(lock)
    with lock.open("w"):
        os.utime(lock, (0, 0))
        assert distributed._is_open_here(lock.stat()), "its owner lives, all wait"
    distributed.free_compiler_lock(lock)
    assert not lock.exists()
