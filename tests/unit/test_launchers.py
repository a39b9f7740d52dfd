"""What launchers say in the environment: read, checked, never guessed."""

import random
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from prunadapt_ds.errors import LaunchError
from prunadapt_ds.launchers import (
    SETTINGS,
    Place,
    check_settings,
    find,
    first_host,
    free_port,
    number,
    refuse_shared_gpu,
    rendezvous_deadline,
    step_port,
)
from tests.conftest import ROOT

pytestmark = pytest.mark.fast

ENV = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "11",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def without(values, *names, **more):
    return {k: v for k, v in {**values, **more}.items() if k not in names}


def test_places():
    assert find({}) == Place("python")
    assert find({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) == Place("python"), "a batch script is one process"
    assert find(ENV) == Place("the launcher", 1, 4, 1, 4, "h", 29500)
    assert find({**ENV, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}) == Place(
        "torchrun", 1, 4, 1, 2, "h", 29500
    )
    assert find({**ENV, "CROSS_SIZE": "2", "LOCAL_SIZE": "2"}) == Place("deepspeed", 1, 4, 1, 2, "h", 29500)
    assert find(SLURM) == Place("srun", 3, 4, 1, 2, "gpu03", 10000 + 64 * 11 + 2)
    assert find({**SLURM, **ENV}).launcher == "the launcher", "torchrun under srun"
    assert find({**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "9"}).master_port == 9
    assert find({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1
    assert find(find(ENV).variables()).rank == 1


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name):
    with pytest.raises(LaunchError) as caught:
        find(without(ENV, name))
    assert caught.value.exit_code == 2 and [p.field for p in caught.value.problems] == [name]


@pytest.mark.parametrize("name", ["SLURM_LOCALID", "SLURM_STEP_NODELIST"])
def test_a_missing_variable_of_srun(name):
    with pytest.raises(LaunchError, match=r"SLURM_LOCALID|MASTER_ADDR"):
        find(without(SLURM, name))


@pytest.mark.parametrize(
    "name, value",
    [("RANK", "4"), ("RANK", "x"), ("RANK", "-1"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "0"), ("MASTER_PORT", "70000"),
     ("LOCAL_RANK", "1.5"), ("MASTER_ADDR", "")],
)  # fmt: skip
def test_values_that_cannot_be(name, value):
    with pytest.raises(LaunchError, match=name):
        find({**ENV, name: value})


def test_steps_of_neighbouring_jobs_have_ports_of_their_own():
    """Elements of an array share a node, and each is at another of its steps."""
    ports = {step_port(job, step) for job in range(70000, 70313) for step in range(64)}
    assert len(ports) == 313 * 64 and min(ports) >= 10000 and max(ports) < 32768


def test_a_free_port_is_one_that_the_system_hands_to_nobody():
    random.seed(0)
    first = {free_port() for _ in range(20)}
    random.seed(0)
    again = {free_port() for _ in range(20)}
    assert first != again, "two runs with one seed"
    last_step_port = max(step_port(job, 63) for job in range(313))
    assert all(last_step_port < port < 32768 for port in first | again)


def test_a_port_that_somebody_listens_on_is_not_free(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(random.SystemRandom, "sample", lambda self, ports, count: [port])
        assert free_port() != port


@pytest.mark.parametrize("now, limit, end", [(106, 25, 125), (120, 25, 128), (106, 180, 280), (106, 3, 109)])
def test_patience_is_counted_from_the_start_of_the_program(now, limit, end):
    assert rendezvous_deadline(100, now, limit) == end


def test_ranks_that_share_a_gpu_are_told_which():
    from torch.distributed import HashStore

    def told(gpus):
        store = HashStore()

        def rank(number):
            try:
                refuse_shared_gpu(Place("deepspeed", number, len(gpus)), store, gpus[number])
            except LaunchError as error:
                return str(error)

        with ThreadPoolExecutor(len(gpus)) as ranks:
            return list(ranks.map(rank, range(len(gpus))))

    assert told("abc") == [None] * 3
    shared = told("abcb")
    assert len(set(shared)) == 1 and "ranks 1 and 3 have the same GPU" in shared[0], "every rank says the same"


def test_a_rank_that_never_names_its_gpu_is_not_waited_for():
    from torch.distributed import HashStore

    with pytest.raises(LaunchError, match="not every rank has found its GPU"):
        refuse_shared_gpu(Place("deepspeed", 0, 2), HashStore(), "a", patience=0.2)


def test_node_lists():
    lists = {"gpu[03-07,12],cpu1": "gpu03", "a,b": "a", "n[1,3]": "n1", "r[2-3]-ib": "r2-ib", "": ""}
    assert {text: first_host(text) for text in lists} == lists


def test_numbers_before_a_place_is_checked():
    assert number({"RANK": "x", "PMI_RANK": "2"}, ("RANK", "PMI_RANK")) == 2 and number({}, ("RANK",)) == 0


def test_settings_are_checked_together():
    check_settings({})
    check_settings(dict.fromkeys(SETTINGS, "25"))
    for wrong in ("2m", "-1", "0", "1.5", ""):
        with pytest.raises(LaunchError) as caught:
            check_settings(dict.fromkeys(SETTINGS, wrong))
        assert [(p.field, p.value) for p in caught.value.problems] == [(name, wrong) for name in SETTINGS]


def test_settings_are_documented():
    text = (ROOT / "docs" / "operations.md").read_text()
    assert all(f"| `{name}` |" in text for name in SETTINGS)
