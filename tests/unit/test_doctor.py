"""What the doctor calls wrong, of ranks that are made up."""

from dataclasses import replace

import pytest

from prunadapt_ds import launchers
from prunadapt_ds.commands import doctor
from prunadapt_ds.commands.doctor import Rank, problems
from prunadapt_ds.config import parse

pytestmark = pytest.mark.fast
CPU = Rank(0, 0, "a", "cpu", frozenset({0, 1}), 1, dict.fromkeys(doctor.PACKAGES, "1.0"), [])
GPU = replace(CPU, device="cuda:0 H100 80 GiB", threads=1)


def test_nothing_is_wrong():
    assert not problems([CPU, replace(CPU, rank=1, local_rank=1)])
    assert not problems([GPU, replace(GPU, rank=1, host="b")])


@pytest.mark.parametrize(
    "ranks, said",
    [
        ([replace(CPU, problems=["no compiler"])], "no compiler"),
        ([CPU, replace(CPU, rank=1, problems=["full"])], "full (ranks [1])"),
        (
            [CPU, replace(CPU, rank=1, versions={**CPU.versions, "torch": "2.0"})],
            "torch differs between ranks: 1.0, 2.0",
        ),
        ([GPU, replace(CPU, rank=1, host="b")], "1 of 2 ranks have no GPU"),
        ([CPU, replace(CPU, rank=1, threads=2)], "a: 3 threads of 2 ranks on 2 cores"),
    ],
    ids=["one rank", "one of two", "versions", "no GPU", "threads"],
)
def test_what_is_wrong_is_said_once(ranks, said, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (found,) = problems(ranks)
    assert found.startswith(said)


def test_the_page_ends_with_what_is_wrong(monkeypatch):
    monkeypatch.setenv(launchers.LAUNCHER_VARIABLE, "python")
    monkeypatch.setattr(doctor, "backend", lambda: "gloo")
    page = doctor.describe([CPU], {1024: 0.001}, ["no compiler", "full"])
    assert page[-2:] == ["problem: no compiler", "problem: full"] and "no problems found" not in page
    assert doctor.describe([CPU], {1024: 0.001}, [])[-1] == "no problems found"


def test_what_was_not_opened_is_said(monkeypatch, capsys):
    monkeypatch.setenv(doctor.launchers.LAUNCHER_VARIABLE, "python")
    monkeypatch.setattr(doctor, "backend", lambda: "gloo")
    monkeypatch.setattr(doctor, "examine", lambda config: CPU)
    monkeypatch.setattr(doctor, "all_reduce_seconds", lambda size: 0.001)
    monkeypatch.setattr(doctor.distributed, "init", lambda: None)
    monkeypatch.setattr(doctor.distributed, "all_gather_objects", lambda value: [value])
    given = ["--model_name_or_path", "./nowhere", "--task_name", "rte", "--r", "4", "--output_dir", "out"]
    assert doctor.run(parse(given, doctor.USAGE)) == []
    *_, line, verdict = capsys.readouterr().out.splitlines()
    assert line == "not opened --model_name_or_path, --task_name: a run checks what they name as it starts"
    assert verdict == "no problems found"
    doctor.run(parse(given[4:], doctor.USAGE))
    assert "not opened" not in capsys.readouterr().out


def test_what_a_rank_sees_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [text.split(":")[0] for text in doctor.compiler_problems()] == [
        "no C++ compiler (no-such-compiler)",
        "ninja is not on the PATH",
    ]
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert any(text.startswith("Python's headers are missing") for text in doctor.compiler_problems())
    (tmp_path / "file").write_text("")
    assert doctor.folder_problems(tmp_path / "file" / "out")[0].endswith("file is a file")
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert doctor.folder_problems(tmp_path / "new" / "out") == [
        f"--output_dir {tmp_path / 'new' / 'out'}: {tmp_path} cannot be written to by this user"
    ]


@pytest.mark.parametrize(
    "visible, sees, said",
    [(None, False, True), ("0,1", False, True), ("", False, False), ("-1", False, False), (None, True, False)],
)
def test_gpus_that_torch_does_not_see_are_told(tmp_path, monkeypatch, visible, sees, said):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: Large (UUID: GPU-1)'\necho 'GPU 1: Large (UUID: GPU-2)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: sees)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = doctor.gpu_problems()
    assert bool(found) is said and all("2 GPU(s)" in text and "DS_ACCELERATOR=cpu" in text for text in found)
    program.unlink()
    assert not doctor.gpu_problems()
