"""The templates of slurm/ on a real SLURM of two nodes: submitted, signalled, preempted, requeued, gathered."""

import json
import re
import time

import pytest
import torch

from tests.conftest import ROOT
from tests.tiny import tiny_instructions, tiny_language_folder

ci, full = pytest.mark.slurm, pytest.mark.full
TEMPLATES = ["train.sh", "llm.sh", "glue_all.sh", "gather.sh"]
STEPS = 40
OPTIONS = ["--max_seq_length", "32", "--max_steps", str(STEPS), "--num_decisions", "2", "--logging_steps", "1"]
OPTIONS += ["--shrink", "always"]  # `auto` asks the clock, and runs are compared
OPTIONS += ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "16"]
TWO_NODES = ["--nodes=2", "--gpus-per-node=1"]
STRANGE = 'out it\'s $(touch pwned) "x"'


@pytest.fixture
def submit(cluster, variables, tmp_path):
    """Submits a template; its log is `submit.log`."""

    def run(script, *options, arguments=(), **more):
        submit.log = tmp_path / "log"
        words = [*options, f"--output={submit.log}", f"slurm/{script}", *OPTIONS, *arguments]
        return cluster.submit(*words, cwd=ROOT, env={**variables, **more})

    submit = run
    return run


def until(what, timeout=300):
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def wait_for_step(job, cluster, log, step):
    def there():
        return log.exists() and f"step {step}/{STEPS}" in log.read_text()

    until(lambda: there() or cluster.state(job) in ("FAILED", "COMPLETED"))
    assert cluster.state(job) == "RUNNING", log.read_text()


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def same_result(a, b):
    assert a["status"] == b["status"] == "complete"
    assert a["plan_hash"] == b["plan_hash"]
    assert a["metric"] == b["metric"]


@ci
@pytest.mark.parametrize("script", TEMPLATES)
def test_templates_are_accepted(cluster, script):
    cluster.command("sbatch", "--test-only", f"slurm/{script}", cwd=ROOT)


@ci
@pytest.mark.parametrize(
    "bad",
    ["--gpus-per-node=9", "--nodes=3", "--partition=nowhere", "--mem=1T", "--constraint=h100", "--cpus-per-task=99"],
)
@pytest.mark.parametrize("script", TEMPLATES)
def test_bad_variants_are_refused(cluster, script, bad):
    with pytest.raises(RuntimeError, match=r"(?i)error|invalid|not available"):
        cluster.command("sbatch", "--test-only", bad, f"slurm/{script}", cwd=ROOT)


@pytest.fixture(scope="session")
def glue(cluster, variables, tmp_path_factory):
    """rte and wnli on two nodes each, one after the other; mrpc, whose files are missing; the gathered table."""
    folder = tmp_path_factory.mktemp("glue")
    root = folder / STRANGE
    env = {**variables, "TASKS": "rte\nmrpc  wnli", "OUTPUT_ROOT": str(root)}
    words = ["--array=0-1", *TWO_NODES, f"--output={folder}/%a.log", "slurm/glue_all.sh", *OPTIONS]
    array = cluster.submit(*words, cwd=ROOT, env=env)
    ended = cluster.wait(array)
    until(lambda: list(root.glob(".gather-*")))
    gathered = cluster.wait((root / f".gather-{array}").read_text().strip())
    return folder, root, array, ended, gathered


@ci
def test_array_of_tasks_and_the_table(cluster, glue):
    folder, root, array, ended, gathered = glue
    logs = [(folder / f"{i}.log").read_text() for i in (0, 1)]
    states = {name: job["JobState"] for name, job in ended.items()}
    assert states == {f"{array}_0": "COMPLETED", f"{array}_1": "FAILED"}, f"{logs[0]}\n{cluster.story(array)}"
    (job,) = gathered.values()
    assert job["ExitCode"] == "1:0", "a table with holes says so"
    for task in ("rte", "wnli"):
        report = report_of(root / task / "seed0")
        assert report["status"] == "complete" and report["world_size"] == 2
    assert "2 ranks" in logs[0] and logs[0].count("exit code 0") == 2 and "exit code 2" in logs[1]
    assert logs[0].count("step 1/") == 2, "every line once, whatever the number of ranks"
    table = (root / "glue.md").read_text()
    assert "average of complete runs, **not of all**" in table
    assert "mrpc, seed 0: failed. exit code 2: data_dir=" in table and "no such file" in table
    found = json.loads((root / "glue.json").read_text())
    scores = [report_of(root / task / "seed0")["metric"]["exported"]["score"] for task in ("rte", "wnli")]
    assert found["average_of_what_is_there"]["exported"] == pytest.approx(sum(scores) / 2)
    assert {p.name for p in (root / "tensorboard").iterdir()} == {"rte-seed0", "wnli-seed0"}
    assert list(root.glob("gather-*.out")) and not list(ROOT.glob("pwned"))


@ci
def test_signalled_requeued_and_gone_on(cluster, submit, glue, tmp_path):
    """USR1, as at the time limit, to both nodes: a checkpoint, exit code 75, the same job again, the same result."""
    _, root, *_ = glue
    out = tmp_path / "out"
    job = submit("train.sh", *TWO_NODES, OUTPUT_DIR=str(out), arguments=["--task_name", "rte"])
    log = tmp_path / "log"
    wait_for_step(job, cluster, log, 12)
    cluster.command("scancel", "--signal=USR1", job)
    (ended,) = cluster.wait(job).values()
    text = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), f"{text}\n{ended}\n{cluster.story(job)}"
    assert f"{out}: exit code 75" in text and "requeued to go on" in text and "goes on after step" in text
    assert "Traceback" not in text
    same_result(report_of(out), report_of(root / "rte" / "seed0"))


@full
def test_preempted_and_gone_on(cluster, submit, glue, tmp_path):
    """TERM, from SLURM itself: a more urgent job takes both nodes; the run goes on when they are free again."""
    _, root, *_ = glue
    out, log = tmp_path / "out", tmp_path / "log"
    job = submit("llm.sh", "--cpus-per-task=16", *TWO_NODES, OUTPUT_DIR=str(out), arguments=["--task_name", "rte"])
    wait_for_step(job, cluster, log, 8)
    urgent = cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3", cwd=ROOT
    )
    until(lambda: cluster.state(urgent) != "PENDING")
    assert cluster.state(job) == "PENDING"
    cluster.wait(urgent)
    (ended,) = cluster.wait(job).values()
    text = log.read_text()
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1, text
    assert "exit code 75" in text and "goes on after step" in text
    same_result(report_of(out), report_of(root / "rte" / "seed0"))


@full
def test_a_language_model_on_two_nodes(cluster, submit, tmp_path):
    """llm.sh from instructions to a folder that the stock classes load and generate from."""
    from transformers import AutoModelForCausalLM

    out, data = tmp_path / "out", tiny_instructions(tmp_path / "data")
    model = tiny_language_folder(tmp_path / "llama", "llama")
    words = ["--task_type", "causal_lm", "--train_file", str(data / "train.jsonl")]
    words += ["--validation_file", str(data / "validation.jsonl"), "--uniform", "--distill_top_k", "4"]
    node = ["--cpus-per-task=16", *TWO_NODES]
    job = submit("llm.sh", *node, MODEL=str(model), DATA_DIR="", OUTPUT_DIR=str(out), arguments=words)
    (ended,) = cluster.wait(job).values()
    assert ended["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    report = report_of(out)
    assert (
        report["status"] == "complete" and report["world_size"] == 2 and report["metric"]["exported"]["perplexity"] > 1
    )
    assert not report["exports"]["uniform"]["needs_remote_code"]
    stock = AutoModelForCausalLM.from_pretrained(out / "exports" / "uniform")
    assert stock.generate(torch.tensor([[6, 9, 12]]), max_new_tokens=5, do_sample=False).shape[1] > 3


@full
def test_time_limit(cluster, submit, tmp_path):
    """SLURM sends USR1 by itself before the limit; the job comes back by itself and goes on. That such a run ends as one that
    was never stopped is in `test_signalled_requeued_and_gone_on`; this one is longer than any machine could be fast."""
    out, log = tmp_path / "out", tmp_path / "log"
    long = ["--task_name", "wnli", "--max_steps", "100000", "--logging_steps", "100"]
    job = submit("train.sh", "--time=00:02:00", "--signal=USR1@60", OUTPUT_DIR=str(out), arguments=long)
    until(lambda: log.exists() and "requeued to go on" in log.read_text())
    until(lambda: cluster.jobs(job)[job]["Restarts"] == "1")
    cluster.wait(job, "RUNNING")
    until(lambda: re.search(r"goes on after step \d+[\s\S]*\nstep ", log.read_text()))
    assert cluster.jobs(job)[job]["Restarts"] == "1"
    cluster.command("scancel", job)
    cluster.wait(job)
    text = log.read_text()
    assert "exit code 75" in text and "stopped by SIGUSR1" in text and "Traceback" not in text, text
    assert int(re.findall(r"goes on after step (\d+)", text)[0]) > 0


@full
def test_a_signal_before_the_ranks_listen(cluster, submit, glue, tmp_path):
    """While they import: it ends them, and the job starts again."""
    _, root, *_ = glue
    out, log = tmp_path / "out", tmp_path / "log"
    job = submit("train.sh", *TWO_NODES, OUTPUT_DIR=str(out), arguments=["--task_name", "rte"])
    until(lambda: f"{job}.0" in cluster.command("squeue", "-h", "-s", "-j", job, "-o", "%i"))
    time.sleep(0.5)
    cluster.command("scancel", "--signal=USR1", job)
    (ended,) = cluster.wait(job).values()
    text = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), text
    assert f"{out}: exit code 75" in text and "stopped by" not in text and "goes on after" not in text
    same_result(report_of(out), report_of(root / "rte" / "seed0"))


@full
def test_a_cancelled_job_does_not_come_back(cluster, submit, tmp_path):
    job = submit("train.sh", OUTPUT_DIR=str(tmp_path / "out"), arguments=["--task_name", "rte"])
    wait_for_step(job, cluster, tmp_path / "log", 3)
    cluster.command("scancel", job)
    (ended,) = cluster.wait(job).values()
    time.sleep(5)
    assert (cluster.state(job), ended["Restarts"]) == ("CANCELLED", "0"), (tmp_path / "log").read_text()


@full
def test_a_requeued_element_and_the_table_that_waits_for_it(cluster, variables, glue, tmp_path):
    """Two cells that were chosen out of three; one is signalled, comes back and ends, and only then the table is made."""
    _, reference, *_ = glue
    root = tmp_path / "out"
    env = {**variables, "TASKS": "mrpc rte wnli", "OUTPUT_ROOT": str(root)}
    words = ["--array=1,2", *TWO_NODES, f"--output={tmp_path}/%a.log", "slurm/glue_all.sh", *OPTIONS]
    array = cluster.submit(*words, cwd=ROOT, env=env)
    log, marker = tmp_path / "1.log", root / f".gather-{array}"
    until(lambda: log.exists() and f"step 12/{STEPS}" in log.read_text())
    cluster.command("scancel", "--signal=USR1", f"{array}_1")
    until(lambda: cluster.jobs(array)[f"{array}_1"]["Restarts"] == "1")
    gather = marker.read_text().strip()
    assert cluster.state(gather) == "PENDING"
    ended = cluster.wait(array)
    (gathered,) = cluster.wait(gather).values()
    assert {job["JobState"] for job in ended.values()} == {"COMPLETED"}, log.read_text()
    assert all(gathered["StartTime"] >= job["EndTime"] for job in ended.values())
    assert log.read_text().count("cell 1: rte, seed 0") == 2 and "cell 2: wnli" in (tmp_path / "2.log").read_text()
    for task in ("rte", "wnli"):
        same_result(report_of(root / task / "seed0"), report_of(reference / task / "seed0"))
    table = (root / "glue.md").read_text()
    assert not (root / "mrpc").exists() and "mrpc, seed 0: missing" in table and "exit code" not in table


@full
def test_a_backbone_in_host_memory(cluster, submit, tmp_path):
    out = tmp_path / "out"
    config = {"DS_CONFIG": "ds_configs/zero3_offload_cpu.json", "OUTPUT_DIR": str(out)}
    node = ["--cpus-per-task=16", *TWO_NODES]
    job = submit("llm.sh", *node, arguments=["--task_name", "rte"], **config)
    (ended,) = cluster.wait(job).values()
    assert ended["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert report_of(out)["status"] == "complete" and report_of(out)["world_size"] == 2


@full
def test_complete_cells_are_not_run_again(cluster, variables, glue):
    """The same submission again: finished runs answer at once, the failed one is tried anew."""
    folder, root, *_ = glue
    before = {task: (root / task / "seed0" / "report.json").stat().st_mtime_ns for task in ("rte", "wnli")}
    env = {**variables, "TASKS": "rte mrpc wnli", "OUTPUT_ROOT": str(root)}
    words = ["--array=0-2", *TWO_NODES, f"--output={folder}/again-%a.log", "slurm/glue_all.sh", *OPTIONS]
    ended = cluster.wait(cluster.submit(*words, cwd=ROOT, env=env))
    assert sorted(job["JobState"] for job in ended.values()) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert before == {task: (root / task / "seed0" / "report.json").stat().st_mtime_ns for task in before}
    assert "complete already" in (folder / "again-0.log").read_text()
