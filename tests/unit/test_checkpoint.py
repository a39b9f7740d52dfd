"""Checkpoints on disk: whole or absent, never believed unchecked. And what may change between two parts of a run."""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from prunadapt_ds import checkpoint, resume, snapshot
from prunadapt_ds.config import OPTIONS, parse
from prunadapt_ds.errors import UserError
from prunadapt_ds.files import LOCK_NAME, OwnedFolder, replace
from prunadapt_ds.importance import Recorder
from tests.conftest import ROOT

pytestmark = pytest.mark.fast


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"master/a": torch.randn(7, 5, generator=generator), "window": torch.zeros(2, 3)}


def save(root, *steps, keep=10):
    for step in steps:
        checkpoint.write(root, step, tensors(step), {"plan": [[1, 2], []], "rebuilt": {4: True}}, keep)


def steps_in(root):
    return [step for step, _ in checkpoint.listed(root)]


def test_what_is_written_is_read(tmp_path):
    save(tmp_path, 12)
    found, notes = checkpoint.newest(tmp_path)
    assert found.step == 12 and not notes
    assert found.state["plan"] == [[1, 2], []] and found.state["rebuilt"] == {"4": True}
    assert all(torch.equal(t, found.tensors()[name]) for name, t in tensors(12).items())
    assert {p.name for p in tmp_path.iterdir()} == {"step-12"}


def test_the_newest_are_kept_in_the_order_of_numbers(tmp_path):
    save(tmp_path, 2, 8, 10, 100, keep=3)
    assert steps_in(tmp_path) == [100, 10, 8]


def test_who_goes_back_writes_later_ones_anew(tmp_path):
    save(tmp_path, 2, 4, 6)
    save(tmp_path, 3)
    assert steps_in(tmp_path) == [3, 2]


def every_byte_matters():
    return [(name, where) for name in (checkpoint.TENSORS, checkpoint.STATE) for where in (0.0, 0.3, 0.5, 0.9, 1.0)]


@pytest.mark.parametrize("name, where", every_byte_matters())
def test_a_flipped_bit_is_seen(tmp_path, name, where):
    save(tmp_path, 1, 2)
    file = tmp_path / "step-2" / name
    content = bytearray(file.read_bytes())
    content[min(int(where * len(content)), len(content) - 1)] ^= 4
    file.write_bytes(content)
    found, notes = checkpoint.newest(tmp_path)
    assert found.step == 1
    assert len(notes) == 1 and "step-2" in notes[0] and "skipped" in notes[0]


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("how", ["cut short", "emptied", "removed"])
def test_a_damaged_file_is_seen(tmp_path, name, how):
    save(tmp_path, 1, 2)
    file = tmp_path / "step-2" / name
    if how == "removed":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2 if how == "cut short" else 0)
    found, notes = checkpoint.newest(tmp_path)
    assert found.step == 1 and len(notes) == 1


def test_nothing_intact_is_nothing(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") == (None, [])
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-x").mkdir()
    found, notes = checkpoint.newest(tmp_path)
    assert found is None and len(notes) == 1


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"step-1"}
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 1)
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_files_are_replaced_whole(tmp_path):
    replace(tmp_path / "a.json", "old")
    replace(tmp_path / "a.json", "new")
    with pytest.raises(UnicodeEncodeError):
        replace(tmp_path / "a.json", "\ud800")
    assert (tmp_path / "a.json").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------- one owner

HOLD = "import sys, time; from pathlib import Path; from prunadapt_ds.files import OwnedFolder; \
OwnedFolder(Path(sys.argv[1])); print('held', flush=True); time.sleep(100)"


def hold(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_owner_and_a_dead_one_is_none(tmp_path):
    other = hold(tmp_path / "out")
    with pytest.raises(UserError, match=f"process {other.pid} on .*name another folder"):
        OwnedFolder(tmp_path / "out")
    other.kill()
    other.wait()
    assert (tmp_path / "out" / LOCK_NAME).exists(), "the killed process could not take it away"
    OwnedFolder(tmp_path / "out").release()
    assert not list((tmp_path / "out").iterdir()), "the folder was not ours, the file is"


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    owned = OwnedFolder(tmp_path / "a" / "b")
    owned.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("parts", [("file", "out"), ("file",)])
def test_a_folder_that_cannot_be(tmp_path, parts):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir"):
        OwnedFolder(tmp_path.joinpath(*parts))


# ------------------------------------------------------------------------------------------- what may change


@pytest.fixture
def ds_config(tmp_path):
    def write(**values):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"gradient_clipping": "auto", **values}))
        return str(path)

    return write


def asked(path, *argv):
    return resume.options(parse(["--ds_config", path, *argv]))


SAME = {
    "ZeRO stage": ({"zero_optimization": {"stage": 2}}, []),
    "micro-batch against accumulation": (
        {},
        ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "2"],
    ),
    "what is said and kept": ({}, ["--logging_steps", "3", "--eval_steps", "5", "--checkpoint_steps", "7"]),
    "where it lies": ({}, ["--output_dir", "elsewhere", "--model_name_or_path", "bert", "--resume", "never"]),
    "the default, said": ({}, ["--weight_decay", "0.01"]),
    "the same from the file": ({"gradient_clipping": 1.0}, []),
}


@pytest.mark.parametrize("case", SAME)
def test_changes_that_do_not_change_the_run(ds_config, case):
    values, argv = SAME[case]
    assert not resume.changes(asked(ds_config(**values), *argv), asked(ds_config()), "out")


OTHER = {
    "bf16": ({"bf16": {"enabled": True}}, []),
    "max_grad_norm": ({"gradient_clipping": 0.5}, []),
    "betas": ({"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9]}}}, []),
    "learning_rate": ({}, ["--learning_rate", "0.01"]),
    "train_batch_size": ({}, ["--per_device_train_batch_size", "16"]),
    "seed": ({}, ["--seed", "1"]),
    "shrink": ({}, ["--shrink", "never"]),
    "target_sparsity": ({}, ["--target_sparsity", "0.4"]),
    "max_steps": ({}, ["--max_steps", "7"]),
}


@pytest.mark.parametrize("name", OTHER)
def test_changes_that_do_are_named_with_both_values(ds_config, name):
    values, argv = OTHER[name]
    before, now = asked(ds_config()), asked(ds_config(**values), *argv)
    (problem,) = resume.changes(now, before, "out")
    assert problem.field == name and problem.value == now[name] and repr(before[name]) in problem.remedy
    assert "--resume never" in problem.remedy


def test_every_option_is_compared_or_free_for_a_reason(ds_config):
    assert set(OPTIONS) >= resume.FREE | resume.BY_CONTENT | resume.RESOLVED
    assert set(OPTIONS) - set(asked(ds_config())) == resume.FREE | resume.BY_CONTENT | {
        "ds_config",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    }


def finished(folder, **options):
    (folder / "report.json").write_text(json.dumps({"status": options.pop("status", "complete")}))
    (folder / "run.json").write_text(json.dumps(options))


def test_a_complete_run_is_known_again_by_its_options(tmp_path):
    finished(tmp_path, seed=0)
    assert resume._finished(tmp_path, {"seed": 0, "an option of a later version": 1})["status"] == "complete"
    with pytest.raises(UserError, match=r"seed=1.*began with 0"):
        resume._finished(tmp_path, {"seed": 1})
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match="unknown options"):
        resume._finished(tmp_path, {"seed": 0})


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_an_unfinished_run_is_no_complete_one(tmp_path, status):
    finished(tmp_path, seed=0, status=status)
    assert resume._finished(tmp_path, {"seed": 0}) is None
    assert resume._finished(tmp_path / "absent", {"seed": 0}) is None


# -------------------------------------------------------------------------------------- sums of an open window


def test_a_window_goes_on_where_it_stood():
    recorder, other = (Recorder(3, activations=False) for _ in range(2))
    for one in (recorder, other):
        one.begin(torch.tensor([0.5, 0.5]), torch.ones(2, 4))
        one.add(0, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        one.end()
    fresh = Recorder(3, activations=False)
    fresh.restore(recorder.capture())
    found, wanted = fresh.all_reduce(), other.all_reduce()
    assert found.count == wanted.count == 2
    assert all(torch.equal(found.sums[name], wanted.sums[name]) for name in wanted.sums)


# ------------------------------------------------------------------------------------ what the clock has decided


@pytest.mark.parametrize("decided", [True, False])
def test_a_decision_of_the_clock_is_repeated_not_made_again(tmp_path, decided):
    """Killed between a decision to rebuild and the next checkpoint: the clock is not asked a second time."""
    from types import SimpleNamespace

    from prunadapt_ds import train

    config = parse(["--output_dir", str(tmp_path / "out"), "--shrink", "auto"])
    session = SimpleNamespace(
        config=config,
        backbone=SimpleNamespace(structure=None),
        plan=SimpleNamespace(hash="new"),
        present=SimpleNamespace(hash="old"),
        weighed_times=lambda: SimpleNamespace(seconds={100: [1.0]}),
        rebuilt={6: decided},
    )
    resume.note_rebuilds(session)
    session.rebuilt = resume.noted_rebuilds(config)
    assert train.pays_to_shrink(session, SimpleNamespace(decision_steps=(6, 8)), 6) is decided
    assert resume.noted_rebuilds(parse(["--output_dir", str(tmp_path / "none")])) == {}


@pytest.mark.parametrize(
    "saved, found",
    [
        ([[0.1, 0.2, 1.0], [0.3, 0.0, 0.0]], [[0.1, 0.2, 1.0], [0.3, 0.0, 0.0]]),
        ([0.1, 0.3], [[0.1, 0.0, 0.0], [0.3, 0.0, 0.0]]),
        ([], []),
    ],
    ids=["as written", "of the loss alone", "none"],
)
def test_the_open_interval_comes_back(saved, found):
    """Losses since the last log line, with the distance from the teacher; older checkpoints hold the loss alone."""
    device = torch.device("cpu")
    session = SimpleNamespace(
        recorder=None, losses=[torch.zeros(3)], device=device, config=SimpleNamespace(train=SimpleNamespace(seed=0))
    )
    of_rank = {"losses": saved, "python": random.getstate(), "numpy": snapshot.numpy_state()}
    state = json.loads(json.dumps({"world_size": 1, "step": 4, "ranks": [of_rank]}))
    tensors = {f"random/{name}": value[None] for name, value in snapshot.random_states(device).items()}
    snapshot.restore_of_ranks(session, state, tensors)
    assert [torch.equal(mine, torch.tensor(row)) for mine, row in zip(session.losses, found, strict=True)] == [
        True
    ] * len(found)
