"""SLURM templates without a SLURM: what the shell does with values, and what becomes of exit codes. tests/slurm/ has the real one.

`srun`, `scontrol` and `sbatch` are small programs here that write down how they were called."""

import os
import re
import shutil
import subprocess

import pytest

from prunadapt_ds import init_slurm
from prunadapt_ds.glue_table import TASKS
from tests.conftest import ROOT

pytestmark = pytest.mark.fast
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sh")), *sorted((ROOT / "benchmarks").glob("*.sh"))]
RECORD = '#!/usr/bin/env bash\nprintf "%s\\0" "${0##*/}" "$@" >> "$CALLS/${0##*/}"\nexit ${EXIT_CODE:-0}\n'
NASTY = "$(touch pwned) `touch pwned` ; touch pwned\n'\" && touch pwned"


@pytest.fixture
def shell(tmp_path):
    """Runs a template in a folder of its own; answers (process, calls of srun, scontrol, sbatch)."""
    tools, calls, project = (tmp_path / name for name in ("tools", "calls", "project"))
    for folder in (tools, calls, project):
        folder.mkdir()
    init_slurm.copy(project)
    for name in ("srun", "scontrol", "sbatch"):
        (tools / name).write_text(RECORD)
        (tools / name).chmod(0o755)

    def run(script, *arguments, **variables):
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "SLURM_SUBMIT_DIR": str(project),
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_ON_NODE": "16",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_JOB_PARTITION": "normal",
            **variables,
        }
        command = ["bash", str(project / "slurm" / script), *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert not list(tmp_path.rglob("pwned")), "a value was run as a command"
        return done, {p.name: p.read_text().split("\0")[:-1] for p in calls.iterdir()}

    run.project = project
    return run


def array(index, count, **variables):
    return {
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": str(index),
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_COUNT": str(count),
        **variables,
    }


def cells(calls):
    """(task, seed) of every run that srun was asked for."""
    words = calls.get("srun", [])
    tasks = [words[i + 1] for i, word in enumerate(words) if word == "--task_name"]
    return list(zip(tasks, (words[i + 1] for i, word in enumerate(words) if word == "--seed"), strict=True))


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_scripts_know_the_tasks():
    text = (ROOT / "slurm" / "glue_all.sh").read_text()
    assert re.search(r'known=" (.*) "', text)[1].split() == list(TASKS)
    assert f"--array=0-{len(TASKS) - 1}\n" in text


@pytest.mark.parametrize(
    "task",
    [
        "rte mrcp",
        "rte\nmrcp",
        "'rte'",
        '"rte"',
        "$(touch pwned)",
        "`touch pwned`",
        "rte;touch pwned",
        "../x",
        NASTY,
        "*",
        "RTE",
    ],
)
def test_bad_task_names_are_refused(shell, task):
    done, calls = shell("glue_all.sh", TASKS=task, **array(0, 9))
    assert done.returncode == 2 and "TASKS: there is no task" in done.stderr and not calls
    assert {p.name for p in shell.project.iterdir()} == {"slurm", "ds_configs"}


@pytest.mark.parametrize("seed", ["-1", "1.5", "a", "$(touch pwned)", "0; touch pwned", "1e3", "9999999999"])
def test_bad_seeds_are_refused(shell, seed):
    done, calls = shell("glue_all.sh", SEEDS=seed, **array(0, 9))
    assert done.returncode == 2 and "is not a whole number" in done.stderr and not calls


def test_empty_lists_and_bad_numbers_are_refused(shell):
    assert "at least one" in shell("glue_all.sh", TASKS=" \n", **array(0, 9))[0].stderr
    done, calls = shell("train.sh", RANKS_PER_NODE="2; touch pwned")
    assert done.returncode == 2 and "RANKS_PER_NODE" in done.stderr and not calls


def test_values_reach_the_program_as_they_are(shell):
    done, calls = shell(
        "train.sh", NASTY, MODEL=NASTY, DATA_DIR="a b", OUTPUT_DIR="out/it's $(touch pwned)", SPARSITY="0.6"
    )
    assert done.returncode == 0, done.stderr
    words = calls["srun"]
    assert words[words.index("--model_name_or_path") + 1] == NASTY and NASTY in words[-3:]
    assert words[words.index("--data_dir") + 1] == "a b" and words[words.index("--target_sparsity") + 1] == "0.6"
    assert words[-2:] == ["--output_dir", "out/it's $(touch pwned)"]
    assert {"--nodes=2", "--ntasks-per-node=4", "--ntasks=8", "--cpus-per-task=4"} <= set(words)


def test_a_folder_of_an_awkward_name_is_only_a_folder(shell):
    """Spaces, quotes and what looks like a command, in the folder that an array job and its second job write to."""
    root = 'out/it\'s "$(touch pwned)" ; touch pwned'
    done, calls = shell("glue_all.sh", OUTPUT_ROOT=root, TASKS="rte", **array(0, 1))
    assert done.returncode == 0, done.stderr
    assert calls["srun"][-2:] == ["--output_dir", f"{root}/rte/seed0"]
    assert (shell.project / root / "rte" / "seed0" / "exit_code").read_text() == "0\n"


@pytest.mark.parametrize("name, value", [("TASKS", NASTY), ("SEEDS", NASTY), ("OUTPUT_ROOT", NASTY)])
def test_gathering_takes_words_as_words(shell, name, value):
    (shell.project / "python").write_text(RECORD)
    (shell.project / "python").chmod(0o755)
    done, calls = shell("gather.sh", PATH=f"{shell.project}:{os.environ['PATH']}", VENV="none", **{name: value})
    assert done.returncode == 0, done.stderr
    words = calls["python"][1:]
    assert words[:3] == ["-m", "prunadapt_ds", "glue-table"] and (
        value in words if name == "OUTPUT_ROOT" else "$(touch" in words
    )


def test_llm_needs_a_model(shell):
    done, calls = shell("llm.sh")
    assert done.returncode == 2 and "MODEL is not set" in done.stderr and not calls
    assert "--gradient_checkpointing" in shell("llm.sh", MODEL="big")[1]["srun"]


@pytest.mark.parametrize("count", [1, 2, 4, 9, 27, 40])
def test_elements_share_all_cells_whatever_their_number(shell, count):
    for index in range(count):
        _, calls = shell("glue_all.sh", SEEDS="0 1 2", **array(index, count))
    found = cells(calls)
    assert sorted(found) == sorted((task, seed) for task in TASKS for seed in "012")
    assert calls["sbatch"].count("sbatch") == 1 and "--dependency=afterany:7" in calls["sbatch"]


@pytest.mark.parametrize("script", ["train.sh", "llm.sh", "glue_all.sh"])
@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_exit_codes(shell, script, code):
    """75 starts the job again; whatever else fails is the job's own exit code, after its other cells."""
    variables = array(3, 9, SEEDS="0 1") if script == "glue_all.sh" else {}
    (shell.project / "outputs").mkdir()
    done, calls = shell(script, MODEL="m", EXIT_CODE=str(code), **variables)
    assert done.returncode == code
    assert ("scontrol" in calls) == (code == 75)
    if script == "glue_all.sh":
        assert cells(calls) == [("stsb", "0")] if code == 75 else [("stsb", "0"), ("stsb", "1")]
        assert code != 75 or calls["scontrol"][-2:] == ["requeue", "7_3"] or "requeue" in calls["scontrol"]
    elif code == 75:
        assert calls["scontrol"] == ["scontrol", "requeue", "7"]
    (file,) = list(shell.project.rglob("seed0/exit_code")) or list(shell.project.rglob("exit_code"))
    assert file.read_text() == f"{code}\n"


def test_requeueing_ends(shell):
    done, calls = shell("train.sh", EXIT_CODE="75", SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    assert done.returncode == 75 and "scontrol" not in calls and "stays stopped" in done.stderr


def test_submitted_from_elsewhere(shell):
    done, _ = shell("train.sh", SLURM_SUBMIT_DIR="/usr")
    assert done.returncode == 2 and "submit from the project's folder" in done.stderr
