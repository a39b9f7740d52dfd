"""Checkpoints on disk: whole or absent, never believed unchecked. And what may change between two parts of a run."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunadapt_ds import checkpoint, clocks, earlier_run, files, formats, inputs, resume, setup, snapshot
from prunadapt_ds.clocks import StepTimes
from prunadapt_ds.commands import unfinished
from prunadapt_ds.config import OPTIONS, parse
from prunadapt_ds.errors import PrunadaptError, UserError
from prunadapt_ds.files import LOCK_NAME, OwnedFolder, replace
from prunadapt_ds.importance import Recorder
from prunadapt_ds.label_scale import LabelScale
from tests.conftest import ROOT
from tests.tiny import tiny_data, tiny_folder

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


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    for name in (".step-3.tmp", ".step-1.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint.TENSORS).write_bytes(b"half")
    save(tmp_path, 12)
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


def auto(tmp_path, *argv):
    return earlier_run.find(parse(["--output_dir", str(tmp_path / "out"), *argv]))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    root = tmp_path / "out" / "checkpoints"
    save(root, 1, 2)
    os.truncate(root / "step-2" / checkpoint.TENSORS, 10)
    (root / "step-1" / checkpoint.STATE).unlink()
    words = r"resume='auto': .*step-2: tensors.*cut short.*step-1: checkpoint.json is missing.*--resume never"
    with pytest.raises(UserError, match=words):
        auto(tmp_path)
    assert auto(tmp_path, "--resume", "never").checkpoint is None
    with pytest.raises(UserError, match=r"no intact checkpoint \(.*step-2: .*step-1: "):
        auto(tmp_path, "--resume", str(root))
    assert steps_in(root) == [2, 1]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
def test_what_cannot_be_read_is_neither_damaged_nor_passed_over(tmp_path, monkeypatch, number, name):
    root = tmp_path / "out" / "checkpoints"
    save(root, 1, 2)
    plain = Path.open

    def failing(path, *args, **options):
        if path == root / "step-2" / name:
            raise OSError(number, os.strerror(number), str(path))
        return plain(path, *args, **options)

    monkeypatch.setattr(Path, "open", failing)
    monkeypatch.setattr(Path, "read_text", lambda path, **options: failing(path, "r", **options).read())
    for argv in ([], ["--resume", str(root)], ["--resume", str(root / "step-2")]):
        with pytest.raises(
            UserError, match=rf"step-2/{name} cannot be read \({os.strerror(number)}.*nothing was changed"
        ):
            auto(tmp_path, *argv)
    with pytest.raises(UserError, match=rf"run_dir=.*{os.strerror(number)}"):
        unfinished.find(tmp_path / "out")
    assert steps_in(root) == [2, 1]


def test_a_run_whose_report_cannot_be_read_is_not_taken_for_an_interrupted_one(tmp_path, monkeypatch):
    save(tmp_path / "checkpoints", 1)
    finished(tmp_path, seed=0)
    assert unfinished.find(tmp_path) is None

    def failing(path, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_text", failing)
    with pytest.raises(OSError, match=r"report\.json"):
        unfinished.find(tmp_path)


def test_a_folder_that_does_not_answer_is_not_empty(tmp_path, monkeypatch):
    root, plain = tmp_path / "out" / "checkpoints", os.listdir
    save(root, 1)

    def failing(path="."):
        if path == root:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain(path)

    monkeypatch.setattr(os, "listdir", failing)
    with pytest.raises(PrunadaptError, match=r"reading the output folder failed: .*Input/output error"):
        auto(tmp_path)


def test_a_checkpoint_of_a_later_version_is_not_damaged(tmp_path, monkeypatch):
    root = tmp_path / "out" / "checkpoints"
    save(root, 1)
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    save(root, 2)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"step-2 is of a later version \(format 2, this one reads 1\)"):
        auto(tmp_path)
    assert steps_in(root) == [2, 1]


def test_a_checkpoint_that_vanishes_before_it_is_used_is_every_rank_s_error(tmp_path):
    save(tmp_path, 1)
    found = checkpoint.read(tmp_path / "step-1")
    files.discard(tmp_path / "step-1")
    with pytest.raises(PrunadaptError, match=r"reading .*step-1 failed: "):
        snapshot.restore(None, found)


def test_what_was_passed_over_below_a_named_folder_is_said(tmp_path):
    save(tmp_path, 1, 2)
    os.truncate(tmp_path / "step-2" / checkpoint.TENSORS, 10)
    found, passed_over = earlier_run._given(tmp_path)
    assert found.step == 1 and len(passed_over) == 1 and "step-2" in passed_over[0]
    with pytest.raises(UserError, match=r"resume='.*nowhere': there is no such folder"):
        earlier_run._given(tmp_path / "nowhere")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(files, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
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


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", range(8))
def test_a_folder_is_whole_or_absent_whenever_its_writer_dies(tmp_path, monkeypatch, calls):
    """After so many calls that change the disk; what removes trees has then removed a part of one."""
    content = {"a", "b"}

    def write():
        with files.whole_folder(tmp_path / "out") as unfinished:
            for name in sorted(content):
                (unfinished / name).write_text("")

    def dying(function, half):
        def call(path, *args, **options):
            nonlocal left
            if left == 0:
                half(path)
                raise Killed
            left -= left > 0
            return function(path, *args, **options)

        return call

    def remove_half(path):
        for name in sorted(os.listdir(path))[:1] if os.path.isdir(path) else []:
            os.unlink(os.path.join(path, name))

    left = -1
    monkeypatch.setattr(files.shutil, "rmtree", dying(shutil.rmtree, remove_half))
    monkeypatch.setattr(Path, "rename", dying(Path.rename, lambda path: None))
    write()
    left = calls
    with contextlib.suppress(Killed):
        write()
    assert not (tmp_path / "out").exists() or set(os.listdir(tmp_path / "out")) == content
    left = -1
    write()
    assert os.listdir(tmp_path) == ["out"], "the next one takes away what the dead one left"
    left = calls
    with contextlib.suppress(Killed):
        files.discard(tmp_path / "out")
    assert not (tmp_path / "out").exists() or set(os.listdir(tmp_path / "out")) == content


def test_a_folder_that_cannot_be_put_in_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    with files.whole_folder(tmp_path / "out") as unfinished:
        (unfinished / "old").write_text("")
    plain = Path.rename

    def failing(path, target):
        if path.name == ".out.tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="error"), files.whole_folder(tmp_path / "out") as unfinished:
        (unfinished / "new").write_text("")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["old"]


def test_a_folder_s_folders_are_whole_too(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(files, "sync", lambda path: synced.add(path.name))
    with files.whole_folder(tmp_path / "out") as unfinished:
        (unfinished / "inner").mkdir()
        (unfinished / "inner" / "a").write_text("")
        (unfinished / "inner" / "a").chmod(0o600)
    assert (tmp_path / "out" / "inner" / "a").stat().st_mode & 0o777 == files.usual_mode()
    assert (tmp_path / "out" / "inner").stat().st_mode & 0o100, "or nobody gets in"
    assert {"inner", "a", ".out.tmp"} <= synced


def test_a_cast_folder_is_readable_whenever_its_writer_dies(tmp_path, monkeypatch):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')

    plain = os.replace

    def full(path, target):
        if os.path.basename(target) == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            formats.cast(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": "float32"}
    formats.cast(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "model.safetensors")["w"].dtype == torch.bfloat16
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said_and_written_to(tmp_path, monkeypatch, capsys, number):
    def flock(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    OwnedFolder(tmp_path / "out").release()
    said = capsys.readouterr().err
    assert said.count("has no locks") == 1 and os.strerror(number) in said and "no other run" in said
    assert not list(tmp_path.iterdir())


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot be written .*error"):
        OwnedFolder(tmp_path / "out")


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
    config = parse(["--ds_config", path, *argv])
    return earlier_run.options(config, setup.agreed_ds_config(config))


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
    assert not earlier_run.changes(asked(ds_config(**values), *argv), asked(ds_config()), "out")


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
    (problem,) = earlier_run.changes(now, before, "out")
    assert problem.field == name and problem.value == now[name] and repr(before[name]) in problem.remedy
    assert "--resume never" in problem.remedy
    assert ("ranks x --per_device_train_batch_size x" in problem.remedy) is (name == "train_batch_size")


def test_going_on_from_elsewhere_takes_no_other_runs_folder(tmp_path, ds_config):
    mine, other = asked(ds_config()), asked(ds_config(), "--seed", "1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps(other))
    argv = ["--output_dir", str(tmp_path / "out"), "--resume", str(tmp_path)]
    with pytest.raises(UserError, match=r"seed=0: the run in .*out began with 1"):
        earlier_run._find(parse(argv), mine)
    (tmp_path / "out" / "run.json").write_text(json.dumps(mine))
    with pytest.raises(UserError, match="no intact checkpoint"):
        earlier_run._find(parse(argv), mine)


def test_going_on_from_elsewhere_takes_no_folder_of_other_data(tmp_path):
    """What the options name is compared by content in a run's own folder, where it may have moved."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text(json.dumps({"train_file": "b.csv", "seed": 0}))
    found = checkpoint.Checkpoint(tmp_path / "a" / "checkpoints" / "step-2", 2, {"names": {"train_file": "a.csv"}})
    with pytest.raises(UserError, match=r"train_file='a.csv': the run in .*b has 'b.csv'.* name another --output_dir"):
        earlier_run._refuse_other_inputs(tmp_path / "b", found, {"train_file": "moved.csv"})
    earlier_run._refuse_other_inputs(tmp_path / "a", found, {})
    earlier_run._refuse_other_inputs(tmp_path / "new", found, {})
    # The same command again: compared by content.
    earlier_run._refuse_other_inputs(tmp_path / "b", found, {"train_file": "b.csv"})
    (tmp_path / "b" / "run.json").write_text(json.dumps({"train_file": "a.csv"}))
    earlier_run._refuse_other_inputs(tmp_path / "b", found, {"train_file": "moved.csv"})


def test_metrics_of_another_folder_say_nothing_about_these(tmp_path, monkeypatch):
    """The same command again, after a kill: the lines in the folder are all of steps that are trained once more."""
    state = {"options": {}, "metrics_bytes": 690, "names": {}}
    found = checkpoint.Checkpoint(tmp_path / "a" / "checkpoints" / "step-2", 2, state)
    monkeypatch.setattr(earlier_run, "_given", lambda folder: (found, []))
    (tmp_path / "a").mkdir()
    for name, kept in (("a", 690), ("b", 0)):
        start = earlier_run._find(parse(["--output_dir", str(tmp_path / name), "--resume", str(tmp_path / "a")]), {})
        assert start.saved == {**state, "metrics_bytes": kept} and start.checkpoint.folder == found.folder


def test_every_option_is_compared_or_free_for_a_reason(ds_config):
    assert set(OPTIONS) >= earlier_run.FREE | earlier_run.BY_CONTENT | earlier_run.RESOLVED
    assert set(OPTIONS) - set(asked(ds_config())) == earlier_run.FREE | earlier_run.BY_CONTENT | {
        "ds_config",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    }


@pytest.mark.parametrize("others, dtype", [(True, "bf16"), (False, "fp32")])
def test_bf16_is_taken_by_itself_where_every_rank_is_fast_at_it(ds_config, monkeypatch, others, dtype):
    """Another rank that is not: this one takes fp32 too, and so says what the run is known by."""
    monkeypatch.setattr("prunadapt_ds.ds_config.fast_bf16", lambda: True)
    monkeypatch.setattr("prunadapt_ds.distributed.true_on_all_ranks", lambda holds: holds and others)
    config = parse(["--ds_config", ds_config(bf16={"enabled": "auto"}), "--resume", "never"])
    assert setup.agreed_ds_config(config).dtype == dtype
    assert earlier_run.find(config).options["bf16"] is (dtype == "bf16")


def finished(folder, **options):
    (folder / "report.json").write_text(json.dumps({"status": options.pop("status", "complete")}))
    (folder / "run.json").write_text(json.dumps(options))


def test_a_complete_run_is_known_again_by_its_options(tmp_path):
    finished(tmp_path, seed=0)
    assert earlier_run._finished(tmp_path, {"seed": 0, "an option of a later version": 1})["status"] == "complete"
    with pytest.raises(UserError, match=r"seed=1.*began with 0"):
        earlier_run._finished(tmp_path, {"seed": 1})
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match="unknown options"):
        earlier_run._finished(tmp_path, {"seed": 0})


def test_other_exports_of_a_complete_run_need_no_training(tmp_path):
    finished(tmp_path, seed=0, export_formats=["compact"], export_dtype=None)
    asked = {"seed": 0, "export_formats": ["compact", "padded"], "export_dtype": "bfloat16"}
    words = f"prunadapt export --run_dir {tmp_path} --export_formats padded --export_dtype bfloat16"
    with pytest.raises(UserError, match=f"this run is complete; .*{words}"):
        earlier_run._finished(tmp_path, asked)
    with pytest.raises(UserError, match=r"seed=1.*began with 0"):
        earlier_run._finished(tmp_path, {**asked, "seed": 1})
    for others in ({"export_formats": ["compact"]}, {"export_formats": ["compact", "adapter"]}):
        with pytest.raises(UserError, match=r"export_dtype='bfloat16'.*began with None"):
            earlier_run._finished(tmp_path, {**asked, **others})


def test_a_complete_run_answers_for_what_it_was_made_with_alone(tmp_path):
    """Wherever that lies now: content is compared, and a path that leads to other content is refused."""
    tiny_folder(tmp_path / "bert", "bert")
    tiny_data(tmp_path / "data", n_train=8, n_dev=4)

    def config(data):
        files = [f"--{name}_file={tmp_path / data / name}.csv" for name in ("train", "validation")]
        return parse([*files, f"--model_name_or_path={tmp_path / 'bert'}", f"--output_dir={tmp_path}"])

    asked = {"seed": 0}
    finished(tmp_path, **asked, **earlier_run.names(config("data")), identity=inputs.content_of(config("data")))
    assert earlier_run._find(config("data"), asked).finished["status"] == "complete"
    (tmp_path / "data").rename(tmp_path / "moved")
    assert earlier_run._find(config("moved"), asked).finished["status"] == "complete"
    tiny_data(tmp_path / "data", n_train=9, n_dev=4)
    with pytest.raises(UserError, match=r"train_file='.*train.csv': its content is not what the run began with"):
        earlier_run._find(config("data"), asked)
    tiny_folder(tmp_path / "bert", "bert", seed=1)
    with pytest.raises(UserError, match=r"model_name_or_path='.*bert': its content"):
        earlier_run._find(config("moved"), asked)
    finished(tmp_path, **asked, **earlier_run.names(config("moved")), identity=[])  # an older version wrote none
    assert earlier_run._find(config("moved"), asked).finished["status"] == "complete"
    with pytest.raises(UserError, match=r"train_file='.*began with"):
        earlier_run._find(config("data"), asked)


@pytest.mark.parametrize(
    "name", ["report.md", "predictions.jsonl", "metrics.jsonl", "exports/padded/note.txt", "report.json"]
)
@pytest.mark.parametrize("how", ["auto", "never"])
def test_a_run_replaces_nothing_where_no_run_has_been(tmp_path, ds_config, name, how):
    """The user's own file is named, whatever --resume says; with what a run leaves beside it, it counts as that run's."""
    config = parse(["--output_dir", str(tmp_path), "--resume", how])
    assert earlier_run._find(config, {}).checkpoint is None
    (tmp_path / "metrics.jsonl").touch()  # of a run that ended while it began
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"output_dir=.*holds {'/'.join(name.split('/')[:2])} of something else"):
        earlier_run._find(config, {})
    (tmp_path / "run.json").write_text("{}")
    assert earlier_run._find(config, {}).checkpoint is None


def test_a_run_that_goes_on_elsewhere_leaves_its_options_there(tmp_path):
    """Once: what it began with stays."""
    found = {"config": parse([]), "options": {"seed": 3, "r": 4}, "output_dir": tmp_path, "identity": {}}
    session = SimpleNamespace(**found, label_scale=LabelScale(2.0, 3.0))
    resume.keep_options(session)
    session.options = {"seed": 5}
    resume.keep_options(session)
    stated = json.loads((tmp_path / "run.json").read_text())
    assert stated["seed"] == 3 and stated["r"] == 4 and stated["model_name_or_path"] == "sample"
    assert stated["label_scale"] == [2.0, 3.0]


def test_a_folder_keeps_its_run_until_the_next_one_takes_it(tmp_path, monkeypatch):
    """A kill while the folder is cleared leaves what the next run recognises as a run's, not as somebody else's files."""
    session = SimpleNamespace(config=parse(["--output_dir", str(tmp_path)]), options={"seed": 1}, output_dir=tmp_path)
    session.identity, session.latency, session.label_scale = {}, None, LabelScale()
    finished(tmp_path, seed=0)
    (tmp_path / "exports").mkdir()
    (tmp_path / "predictions.jsonl").write_text("{}")
    with monkeypatch.context() as killed:
        killed.setattr(resume.graphs, "discard_exports", lambda folder: 1 / 0)
        with pytest.raises(PrunadaptError, match="clearing the output folder"):
            resume.begin(session)
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 0
    earlier_run._refuse_foreign_files(tmp_path)
    resume.begin(session)
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1
    assert not (tmp_path / "predictions.jsonl").exists() and not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_an_unfinished_run_is_no_complete_one(tmp_path, status):
    finished(tmp_path, seed=0, status=status)
    assert earlier_run._finished(tmp_path, {"seed": 0}) is None
    assert earlier_run._finished(tmp_path / "absent", {"seed": 0}) is None


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

    from prunadapt_ds import rebuild

    config = parse(["--output_dir", str(tmp_path / "out"), "--shrink", "auto"])
    session = SimpleNamespace(
        config=config,
        backbone=SimpleNamespace(structure=None),
        plan=SimpleNamespace(hash="new"),
        present=SimpleNamespace(hash="old"),
        clocks=SimpleNamespace(weighed_steps=StepTimes({100: [1.0]})),
        rebuilt={6: decided},
    )
    resume.note_rebuilds(session)
    session.rebuilt = resume.noted_rebuilds(config)
    assert rebuild.pays_to_shrink(session, SimpleNamespace(decision_steps=(6, 8)), 6) is decided
    assert resume.noted_rebuilds(parse(["--output_dir", str(tmp_path / "none")])) == {}


@pytest.mark.parametrize(
    "saved, found",
    [
        ({"plain": {"100": [1.0]}, "recording": {"50": [0.7]}}, StepTimes({100: [1.0]}, {50: [0.7]})),
        ({"100": [1.0], "50": [0.7]}, StepTimes({100: [1.0], 50: [0.7]})),
        ({}, StepTimes()),
    ],
    ids=["as written", "of before steps that record were told from others", "none"],
)
def test_the_times_of_steps_come_back(saved, found):
    assert clocks.step_times(saved) == found


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
