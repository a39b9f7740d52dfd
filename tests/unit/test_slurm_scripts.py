"""SLURM templates without a SLURM: what the shell does with values, and what becomes of exit codes. tests/slurm/ has the real one.

`srun`, `scontrol` and `sbatch` are small programs here that write down how they were called."""

import fcntl
import os
import re
import shutil
import stat
import subprocess

import pytest

from prunadapt_ds.commands import init_slurm
from prunadapt_ds.data.tasks import GLUE
from tests.conftest import ROOT

pytestmark = pytest.mark.fast
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sh")), *sorted((ROOT / "benchmarks").glob("*.sh")), ROOT / ".ci" / "run"]
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

    def put(name, text):
        """Another program in the place of one that the templates call."""
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)

    run.project, run.put = project, put
    return run


def array(index, count, **variables):
    return element(index, range(count), **variables)


def element(index, indices, **variables):
    """What SLURM tells element `index` of `--array=` these indices."""
    return {
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": str(index),
        "SLURM_ARRAY_TASK_MIN": str(min(indices)),
        "SLURM_ARRAY_TASK_MAX": str(max(indices)),
        "SLURM_ARRAY_TASK_COUNT": str(len(indices)),
        **variables,
    }


def cells(calls):
    """(task, seed) of every run that srun was asked for."""
    words = calls.get("srun", [])
    tasks = [words[i + 1] for i, word in enumerate(words) if word == "--task_name"]
    return list(zip(tasks, (words[i + 1] for i, word in enumerate(words) if word == "--seed"), strict=True))


def test_shellcheck():
    assert shutil.which("shellcheck"), "shellcheck comes with the extra `dev`: pip install -e '.[dev]'"
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_scripts_know_the_tasks():
    text = (ROOT / "slurm" / "glue_all.sh").read_text()
    assert re.search(r'known=" (.*) "', text)[1].split() == list(GLUE)
    assert f"--array=0-{len(GLUE) - 1}\n" in text


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


@pytest.mark.parametrize("seed", ["-1", "1.5", "a", "$(touch pwned)", "0; touch pwned", "1e3", "9999999999", "01"])
def test_bad_seeds_are_refused(shell, seed):
    done, calls = shell("glue_all.sh", SEEDS=seed, **array(0, 9))
    assert done.returncode == 2 and "is not a whole number" in done.stderr and not calls


def test_empty_lists_and_bad_numbers_are_refused(shell):
    assert "at least one" in shell("glue_all.sh", TASKS=" \n", **array(0, 9))[0].stderr
    done, calls = shell("train.sh", RANKS_PER_NODE="2; touch pwned")
    assert done.returncode == 2 and "RANKS_PER_NODE" in done.stderr and not calls
    for value in ("x[$(touch pwned)]", "none", "08"):
        done, calls = shell("train.sh", MAX_REQUEUES=value, SLURM_RESTART_COUNT="1", EXIT_CODE="75")
        assert done.returncode == 2 and "MAX_REQUEUES" in done.stderr and not calls


def test_values_reach_the_program_as_they_are(shell):
    done, calls = shell(
        "train.sh", NASTY, MODEL=NASTY, DATA_DIR="a b", OUTPUT_DIR="out/it's $(touch pwned)", SPARSITY="0.6"
    )
    assert done.returncode == 0, done.stderr
    words = calls["srun"]
    assert words[words.index("--model_name_or_path") + 1] == NASTY and NASTY in words[-3:]
    assert words[words.index("--data_dir") + 1] == "a b" and words[words.index("--target_sparsity") + 1] == "0.6"
    assert words[-2:] == ["--output_dir", f"{shell.project}/out/it's $(touch pwned)"]
    assert {"--nodes=2", "--ntasks-per-node=4", "--ntasks=8", "--cpus-per-task=4"} <= set(words)


def test_a_folder_of_an_awkward_name_is_only_a_folder(shell):
    """Spaces, quotes and what looks like a command, in the folder that an array job and its second job write to."""
    root = 'out/it\'s "$(touch pwned)" ; touch pwned'
    done, calls = shell("glue_all.sh", OUTPUT_ROOT=root, TASKS="rte", **array(0, 1))
    assert done.returncode == 0, done.stderr
    assert calls["srun"][-2:] == ["--output_dir", f"{shell.project}/{root}/rte/seed0"]
    assert (shell.project / root / "rte" / "seed0" / "exit_code").read_text() == "0\n"


@pytest.mark.parametrize("name, value", [("TASKS", NASTY), ("SEEDS", NASTY), ("OUTPUT_ROOT", NASTY)])
def test_gathering_takes_words_as_words(shell, name, value):
    shell.put("python", 'printf "%s\\0" "$@" >>"$CALLS/python"')
    shell.put("srun", 'printf "%s\\0" "$@" >>"$CALLS/srun"; while [[ $1 == --* ]]; do shift; done; exec "$@"')
    done, calls = shell("gather.sh", SRUN_OPTIONS="--container-image=a", VENV="none", **{name: value})
    assert done.returncode == 0, done.stderr
    assert calls["srun"][:3] == ["--nodes=1", "--ntasks=1", "--container-image=a"], "where the runs were"
    words = calls["python"]
    assert words[:3] == ["-m", "prunadapt_ds", "glue-table"] and (
        value in words if name == "OUTPUT_ROOT" else "$(touch" in words
    )


def test_gathering_by_hand_needs_no_job(shell):
    shell.put("python", 'printf "%s\\0" "$@" >>"$CALLS/python"')
    done, calls = shell("gather.sh", SLURM_JOB_ID="", VENV="none")
    assert done.returncode == 0 and set(calls) == {"python"}, done.stderr


def test_the_table_s_job_is_charged_like_the_array(shell):
    _, calls = shell("glue_all.sh", SLURM_JOB_ACCOUNT="my project", **array(0, 9))
    assert "--account=my project" in calls["sbatch"]


def test_a_job_names_its_folder_itself(shell):
    for words in (["--output_dir", "x"], ["--output_dir=x"]):
        done, calls = shell("train.sh", *words)
        assert done.returncode == 2 and "set OUTPUT_DIR" in done.stderr and not calls


@pytest.mark.parametrize("told", ["never", "outputs/old"])
@pytest.mark.parametrize("restarts, trained, goes_on", [("0", True, False), ("1", False, False), ("1", True, True)])
def test_a_requeued_job_goes_on_however_it_was_told_to_begin(shell, told, restarts, trained, goes_on):
    """From its own checkpoint, if it got so far: one that was stopped while it started begins as it was told."""
    if trained:
        (shell.project / "outputs" / "7" / "checkpoints" / "step-3").mkdir(parents=True)
    _, calls = shell("train.sh", "--resume", told, SLURM_RESTART_COUNT=restarts)
    words = calls["srun"]
    ends = [told, "--resume", "auto"] if goes_on else ["--resume", told]
    assert words[: words.index("--output_dir")][-len(ends) :] == ends
    assert (shell.project / "outputs" / "7" / "log.txt").read_text() == "start of job 7\n"


def test_llm_needs_a_model(shell):
    done, calls = shell("llm.sh")
    assert done.returncode == 2 and "MODEL is not set" in done.stderr and not calls
    assert "--gradient_checkpointing" in shell("llm.sh", MODEL="big")[1]["srun"]


@pytest.mark.parametrize("count", [1, 2, 4, 9, 27, 40])
def test_elements_share_all_cells_whatever_their_number(shell, count):
    for index in range(count):
        _, calls = shell("glue_all.sh", SEEDS="0 1 2", **array(index, count))
    found = cells(calls)
    assert sorted(found) == sorted((task, seed) for task in GLUE for seed in "012")
    assert calls["sbatch"].count("sbatch") == 1 and "--dependency=afterany:7" in calls["sbatch"]


@pytest.mark.parametrize("indices", [[3, 5], range(0, 9, 2), [7], range(5, 9), [0, 1, 26]], ids=str)
def test_elements_with_gaps_run_the_cells_of_their_numbers(shell, indices):
    """`--array=3,5` after two failures, `0-8:2`, `5-8`: nothing else runs, and nothing twice."""
    for index in indices:
        done, calls = shell("glue_all.sh", SEEDS="0 1 2", **element(index, indices))
        assert done.returncode == 0, done.stderr
        assert f"cell {index}: " in done.stdout
    every = [(task, seed) for seed in "012" for task in GLUE]
    assert cells(calls) == [every[index] for index in indices]
    assert calls["sbatch"].count("sbatch") == 1


def test_a_cell_that_is_none_is_refused(shell):
    done, calls = shell("glue_all.sh", TASKS="rte wnli", **element(4, [1, 4]))
    assert done.returncode == 2 and not calls
    assert done.stderr == "error: --array: there is no cell 4; TASKS and SEEDS make 2, from 0\n"


def test_a_cell_that_another_run_is_at_is_left_alone(shell):
    cell = shell.project / "outputs" / "glue" / "rte" / "seed0"
    cell.mkdir(parents=True)
    (cell / "exit_code").write_text("running\n")
    with (cell / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done, calls = shell("glue_all.sh", TASKS="rte wnli", **array(0, 1))
    assert done.returncode == 2 and cells(calls) == [("wnli", "0")] and "another run is writing there" in done.stderr
    assert {p.name: p.read_text() for p in cell.iterdir()} == {"exit_code": "running\n", ".lock": ""}
    assert shell("glue_all.sh", TASKS="rte wnli", **array(0, 1))[0].returncode == 0, "a lock whose owner is gone"


def test_a_table_that_could_not_be_submitted_is_tried_again(shell):
    marker = shell.project / "outputs" / "glue" / ".gather-7"
    shell.put("sbatch", "echo 11; exit 1")
    done, _ = shell("glue_all.sh", **array(0, 9))
    assert done.returncode == 0 and not marker.exists()
    said = next(line for line in done.stderr.splitlines() if line.startswith("no job to gather"))
    assert said.endswith("OUTPUT_ROOT=outputs/glue bash slurm/gather.sh") and "SEEDS=0 " in said and "TASKS=" in said
    shell.put("sbatch", "echo 12")
    shell("glue_all.sh", **array(0, 9))
    shell.put("sbatch", "echo 13")
    shell("glue_all.sh", **array(0, 9))
    assert marker.read_text() == "12\n", "once submitted, a requeue does not submit it again"


def test_the_last_line_is_in_the_log_when_the_script_ends(shell):
    """SLURM kills what a script leaves behind, and the table reads the log for the reason."""
    shell.put("srun", "echo 'error: seed=-1: the reason' >&2; exit 2")
    shell.put("tee", f'exec >/dev/null 2>&1; sleep 1; {shutil.which("tee")} "$@"')  # does not hold what the test reads
    done, _ = shell("train.sh", OUTPUT_DIR="out")
    assert done.returncode == 2
    assert (shell.project / "out" / "log.txt").read_text() == "start of job 7\nerror: seed=-1: the reason\n"


@pytest.mark.parametrize("when", ["while it runs", "as it ends"])
def test_a_signal_to_the_script_does_not_change_what_becomes_of_the_run(shell, when):
    """Both a step that goes on after the signal, and one that has ended before the script looks again."""
    shell.put("srun", f"kill -TERM $PPID; kill -USR1 $PPID; {'sleep 1;' if when == 'while it runs' else ''} exit 75")
    for _ in range(1 if when == "while it runs" else 10):
        done, calls = shell("train.sh", OUTPUT_DIR="out", EXIT_CODE="1")
        assert done.returncode == 75 and "requeue" in calls["scontrol"], done.stderr
        assert (shell.project / "out" / "exit_code").read_text() == "75\n"


@pytest.mark.parametrize("script", ["train.sh", "glue_all.sh"])
@pytest.mark.parametrize("signal, requeued", [("USR1", True), ("TERM", True), ("KILL", False)])
def test_a_signal_before_the_ranks_listen_requeues_too(shell, script, signal, requeued):
    """It ends them; srun answers 128 and the signal's number."""
    shell.put("srun", f"bash -c 'kill -{signal} $$'")
    done, calls = shell(script, EXIT_CODE="1", **array(0, 1, TASKS="rte"))  # nobody ends a script that has asked for it
    assert ("requeue" in calls.get("scontrol", [])) == requeued and done.returncode == (75 if requeued else 137)


def test_nobody_else_may_write_to_what_a_job_leaves(shell):
    shell.put("srun", 'mkdir -p made; : > "made/file"')
    before = os.umask(0)
    try:
        shell("glue_all.sh", OUTPUT_ROOT="out", TASKS="rte", **array(0, 1))
    finally:
        os.umask(before)
    left = [p for name in ("out", "made") for p in (shell.project / name, *(shell.project / name).rglob("*"))]
    assert {"log.txt", "exit_code", ".gather-7", "file"} <= {p.name for p in left}
    assert not [p for p in left if stat.S_IMODE(p.stat().st_mode) & 0o022]


@pytest.fixture
def bare(tmp_path):
    """Runs a command with nothing on its PATH but what is named; answers the process."""

    def run(*command, cwd=ROOT, **programs):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("bash", "sh", "dirname", "make", "tail", "echo"):
            (folder / name).symlink_to(shutil.which(name))
        for name, text in programs.items():
            (folder / name.replace("_", "-")).write_text(f"#!{shutil.which('bash')}\n{text}\n")
            (folder / name.replace("_", "-")).chmod(0o755)
        return subprocess.run(command, cwd=cwd, env={"PATH": str(folder)}, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize(
    "user, said", [("0", "E: no network\nerror: apt-get could not install"), ("7", "error: as root")]
)
def test_tools_that_cannot_be_installed_are_a_failure(bare, user, said):
    done = bare("make", "-s", "slurm-tools", id=f"echo {user}", apt_get="echo 'E: no network' >&2; exit 1")
    assert done.returncode != 0 and said in done.stdout + done.stderr


def test_the_whole_check_stops_where_its_tools_are_missing(bare, tmp_path):
    """Otherwise every test of SLURM and MPI would be skipped, and nobody would see it."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "Makefile").write_text("slurm-tools:\n\t@exit 1\ntest test-slurm-ci:\n\t@echo $@ ran\n")
    done = bare("bash", ".ci/run", cwd=tmp_path)
    assert done.returncode != 0 and "ran" not in done.stdout


@pytest.mark.parametrize("script", ["train.sh", "llm.sh", "glue_all.sh"])
@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_exit_codes(shell, script, code):
    """75 starts the job again; whatever else fails is the job's own exit code, after its other cells."""
    variables = array(3, 9, SEEDS="0 1") if script == "glue_all.sh" else {}
    (shell.project / "outputs").mkdir()
    done, calls = shell(script, MODEL="m", EXIT_CODE=str(code), **variables)
    assert done.returncode == code
    assert ("requeue" in calls.get("scontrol", [])) == (code == 75)
    if script == "glue_all.sh":
        assert cells(calls) == [("stsb", "0")] if code == 75 else [("stsb", "0"), ("stsb", "1")]
        assert code != 75 or calls["scontrol"][-2:] == ["requeue", "7_3"] or "requeue" in calls["scontrol"]
    elif code == 75:
        assert calls["scontrol"][-2:] == ["requeue", "7"]
    (file,) = list(shell.project.rglob("seed0/exit_code")) or list(shell.project.rglob("exit_code"))
    assert file.read_text() == f"{code}\n"


@pytest.mark.parametrize("state, requeued", [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False)])
def test_a_cancelled_job_is_not_requeued(shell, state, requeued):
    """Its ranks are sent TERM and end with 75 as in a preemption."""
    shell.put(
        "scontrol",
        f'printf "%s\\0" "$@" >>"$CALLS/said"; [[ $2 == show ]] && echo "JobId=7 JobState={state} Reason=None"',
    )
    done, calls = shell("train.sh", EXIT_CODE="75")
    assert done.returncode == 75 and ("requeue" in calls["said"]) == requeued, done.stderr
    assert ("was cancelled" in done.stderr) != requeued


def test_requeueing_ends(shell):
    done, calls = shell("train.sh", EXIT_CODE="75", SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    assert done.returncode == 75 and "requeue" not in calls["scontrol"] and "stays stopped" in done.stderr


def test_submitted_from_elsewhere(shell):
    done, _ = shell("train.sh", SLURM_SUBMIT_DIR="/usr")
    assert done.returncode == 2 and "submit from the project's folder" in done.stderr


def test_the_program_is_told_the_whole_path_of_its_folder(shell):
    """A container may start elsewhere than the job."""
    _, calls = shell("train.sh")
    words = calls["srun"]
    assert words[words.index("--output_dir") + 1].startswith(f"{shell.project}/outputs/")


def test_a_node_that_reports_no_gpu_gets_one_rank(shell):
    _, calls = shell("train.sh", SLURM_GPUS_ON_NODE="0")
    assert "--ntasks-per-node=1" in calls["srun"]


def test_gpus_requested_as_gres_are_not_limited_by_the_template(shell):
    """A step would take SLURM_GPUS_PER_NODE GPUs of a node, which is the template's default."""
    shell.put("srun", 'printf "%s" "${SLURM_GPUS_PER_NODE-unset}" > "$CALLS/step"')
    shell("train.sh", SLURM_GPUS_PER_NODE="1")
    assert (shell.project.parent / "calls" / "step").read_text() == "unset"


def test_an_environment_that_is_not_there(shell):
    done, calls = shell("train.sh", VENV="/no/such/venv")
    assert done.returncode == 2 and "VENV=/no/such/venv: has no bin/activate" in done.stderr and "srun" not in calls
    assert shell("train.sh", VENV="none")[0].returncode == 0


def test_the_gathering_job_has_the_array_s_quality_of_service(shell):
    _, calls = shell("glue_all.sh", TASKS="rte", **array(0, 1))
    assert not any(word.startswith("--qos") for word in calls["sbatch"])
    _, calls = shell("glue_all.sh", TASKS="rte", OUTPUT_ROOT="outputs/other", SLURM_JOB_QOS="high", **array(0, 1))
    assert "--qos=high" in calls["sbatch"]
