"""This process's rank and world size, as its launcher sets them: read from the environment, checked, never guessed.

Ranks meet at MASTER_ADDR and MASTER_PORT. Where these are not set:

| launcher              | rank and world size from       | ranks meet at                                              |
|-----------------------|--------------------------------|------------------------------------------------------------|
| deepspeed, torchrun   | RANK, WORLD_SIZE, LOCAL_RANK   | an error: both variables are required                      |
| mpirun (any MPI)      | MPI, through mpi4py            | rank 0's host, a free port there                           |
| srun                  | SLURM_PROCID and others        | the step's first host, a port derived from job and step    |
| none                  | one process                    | nowhere                                                    |
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunadapt_ds.environment import STARTED
from prunadapt_ds.errors import LaunchError, Problem

RENDEZVOUS_VARIABLE = "PRUNADAPT_RENDEZVOUS_SECONDS"
TIMEOUT_VARIABLE = "PRUNADAPT_TIMEOUT_MINUTES"
SETTINGS = (RENDEZVOUS_VARIABLE, TIMEOUT_VARIABLE, "PRUNADAPT_STUCK_SECONDS")  # a whole number each; docs/operations.md
FIRST_STEP_PORT, STEP_PORTS = 10000, 64 * 313
FIRST_HANDED_OUT = 32768  # start of the ephemeral ports, which the system hands out itself
RENDEZVOUS_SECONDS = 25  # from the program's start, so that a failed launch is reported within half a minute
LEAST_RENDEZVOUS_SECONDS = 8  # from when this rank is ready
LAUNCHER_VARIABLE = "PRUNADAPT_LAUNCHER"
MPI_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
RANK_VARIABLES = ("RANK", *MPI_VARIABLES, "SLURM_PROCID")
LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
UNKNOWN = "the launcher"  # as messages call it
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


@dataclass(frozen=True)
class Place:
    """This process among all. `master_addr` and `master_port`: where rank 0 listens; unused by a single process."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    def variables(self) -> dict[str, str]:
        """The environment variables that DeepSpeed and others read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            LAUNCHER_VARIABLE: self.launcher,
        }


def find(environ: Mapping[str, str]) -> Place:
    """The place that `environ` describes. Raises LaunchError with everything that is missing or not a number."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_variables(environ)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_mpi(environ)
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:  # a batch script has only the first
        return _from_slurm(environ)
    if any(name in environ for name in MPI_VARIABLES):
        return _from_mpi(environ)
    return Place("python")


def number(environ: Mapping[str, str], names: tuple[str, ...], default: int = 0) -> int:
    """The first of the variables that is set to a whole number: for use before, or without, a checked `Place`."""
    return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), default)


def check_settings(environ: Mapping[str, str]) -> None:
    """Raise LaunchError for every one of `SETTINGS` that is set to anything but a whole number of at least 1."""
    found = [(name, environ[name]) for name in SETTINGS if name in environ]
    wrong = [(name, value) for name, value in found if not value.isdecimal() or not int(value)]
    if wrong:
        raise LaunchError([Problem(name, value, "must be a whole number of at least 1") for name, value in wrong])


class _Reader:
    """Reads whole numbers from the environment, and collects what is wrong."""

    def __init__(self, environ: Mapping[str, str], launcher: str):
        self.environ, self.launcher, self.problems = environ, launcher, list[Problem]()

    def number(self, name: str, least: int = 0, most: int | None = None) -> int:
        value = self.environ.get(name)
        if value is None:
            self.problems.append(
                Problem(name, None, f"{self.launcher} did not set it; set it, or start one process only")
            )
        elif not value.isdecimal() or int(value) < least or (most is not None and int(value) > most):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            self.problems.append(Problem(name, value, f"must be a whole number, {limits}"))
        else:
            return int(value)
        return least

    def raise_problems(self) -> None:
        if self.problems:
            raise LaunchError(self.problems)


def _from_variables(environ: Mapping[str, str]) -> Place:
    marks = (("TORCHELASTIC_RUN_ID", "torchrun"), ("CROSS_SIZE", "deepspeed"))  # variables that only these two set
    launcher = next((name for mark, name in marks if mark in environ), UNKNOWN)
    read = _Reader(environ, launcher)
    world_size = read.number("WORLD_SIZE", least=1)
    rank = read.number("RANK", most=world_size - 1 if "WORLD_SIZE" in environ and not read.problems else None)
    if world_size == 1:
        read.raise_problems()
        return Place(launcher)
    local_rank = read.number("LOCAL_RANK")
    port = read.number("MASTER_PORT", least=1, most=65535)
    if not environ.get("MASTER_ADDR"):
        remedy = "the host of rank 0 is not named; set it on every rank"
        read.problems.append(Problem("MASTER_ADDR", environ.get("MASTER_ADDR"), remedy))
    read.raise_problems()
    local_size = number(environ, LOCAL_SIZE_VARIABLES, world_size)
    return Place(launcher, rank, world_size, local_rank, local_size, environ["MASTER_ADDR"], port)


def _from_slurm(environ: Mapping[str, str]) -> Place:
    read = _Reader(environ, "srun")
    world_size = read.number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS", least=1)
    rank, local_rank = read.number("SLURM_PROCID"), read.number("SLURM_LOCALID")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    address = environ.get("MASTER_ADDR") or first_host(nodes)
    if not address:
        read.problems.append(Problem("MASTER_ADDR", None, "srun names no nodes; set it to the host of rank 0"))
    if "MASTER_PORT" in environ:
        port = read.number("MASTER_PORT", least=1, most=65535)
    else:
        port = step_port(number(environ, ("SLURM_JOB_ID",)), number(environ, ("SLURM_STEP_ID",)))
    read.raise_problems()
    tasks = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Place("srun", rank, world_size, local_rank, int(tasks[0]) if tasks else 1, address, port)


def step_port(job: int, step: int) -> int:
    """The port where the ranks of a SLURM step meet, computed by each rank alone.

    It differs between all steps of 313 neighbouring jobs with 64 steps each.
    """
    return FIRST_STEP_PORT + (64 * job + step % 64) % STEP_PORTS


def first_host(nodelist: str) -> str:
    """The first name of a SLURM node list: "gpu[03-07,12],cpu1" -> "gpu03"."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def _from_mpi(environ: Mapping[str, str]) -> Place:
    """Get rank and size from MPI, and broadcast where rank 0 listens. MPI is not used for anything else."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = (
            f"MPI started this process, but mpi4py cannot load MPI's library ({reason}); install it, or use torchrun"
        )
        raise LaunchError(Problem("mpi4py", None, remedy)) from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = node.size == world.size
    read = _Reader(environ, "mpirun")
    port = read.number("MASTER_PORT", least=1, most=65535) if "MASTER_PORT" in environ else free_port()
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if one_host else socket.gethostname())
    address, port = world.bcast((address, port))
    place = Place("mpirun", world.rank, world.size, node.rank, node.size, address, port)
    node.Free()
    MPI.Finalize()  # from here on, a rank may exit in any way
    read.raise_problems()
    return place


def free_port() -> int:
    """A free port of this host that the system will not hand out before rank 0, which first imports torch, listens on it."""
    # Drawn independently of the run's seed.
    usual = random.SystemRandom().sample(range(FIRST_STEP_PORT + STEP_PORTS, FIRST_HANDED_OUT), 100)
    for port in (*usual, 0):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return int(s.getsockname()[1])
    raise LaunchError(
        Problem("MASTER_PORT", None, f"no port of {socket.gethostname()} is free; stop what listens there")
    )


def rendezvous(place: Place) -> Any:
    """Return a store that all ranks share. Raises LaunchError if they have not met by `rendezvous_deadline`.

    torch's own rendezvous is used only under torchrun, whose agents have met already: it tries for twice its timeout, logs
    every attempt with a stack, and waits forever for an answer from a stranger on the port.
    """
    import torch.distributed as dist

    if place.world_size == 1:
        return dist.HashStore()
    _resolve(place)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(iter(dist.rendezvous("env://", place.rank, place.world_size)))
        return store
    limit = number(os.environ, (RENDEZVOUS_VARIABLE,), RENDEZVOUS_SECONDS)
    deadline = rendezvous_deadline(STARTED, time.monotonic(), limit)
    store = _serve(place) if place.rank == 0 else _visit(place, deadline)
    store.set(f"launch/{place.rank}", "here")
    if place.rank == 0:
        _await_all(place, store, deadline)
        store.set("launch/complete", "yes")
    elif not _arrives(store, ["launch/complete"], deadline + 1):
        raise LaunchError(_no_answer(place, "met rank 0, but not all ranks arrived"))
    return store


def refuse_shared_gpu(place: Place, store: Any, gpu: str, patience: float = 60) -> None:
    """Raise LaunchError on all ranks if two of them share a GPU, before NCCL fails with a message that is harder to read.

    `gpu`: a unique id of this rank's GPU. Also raises if a rank has not named its own within `patience` seconds.
    """
    keys = [f"launch/gpu/{rank}" for rank in range(place.world_size)]
    store.set(keys[place.rank], gpu)
    if not _arrives(store, keys, time.monotonic() + patience):
        raise LaunchError(Problem("WORLD_SIZE", place.world_size, "not every rank has found its GPU; did one end?"))
    first: dict[bytes, int] = {}
    for rank, found in enumerate(store.multi_get(keys)):
        if first.setdefault(found, rank) != rank:
            remedy = f"ranks {first[found]} and {rank} have the same GPU; start one rank per GPU, or show each a GPU of its own"
            raise LaunchError(Problem("WORLD_SIZE", place.world_size, remedy))


def rendezvous_deadline(started: float, now: float, limit: float) -> float:
    """When a rank stops waiting for the others: `limit` seconds after its start, which ranks share, not after its imports.

    A rank whose imports took that long still waits a little.
    """
    return max(started + limit, now + min(limit, LEAST_RENDEZVOUS_SECONDS))


def _resolve(place: Place) -> None:
    try:
        socket.getaddrinfo(place.master_addr, place.master_port)
    except OSError as error:
        remedy = f"this name cannot be resolved here ({error.strerror}); set it to an address of rank 0's host"
        raise LaunchError(Problem("MASTER_ADDR", place.master_addr, remedy)) from None


def _serve(place: Place) -> Any:
    from torch.distributed import DistError, TCPStore

    try:
        return TCPStore("127.0.0.1", place.master_port, place.world_size, is_master=True, wait_for_workers=False)
    except (DistError, RuntimeError) as error:
        taken = "EADDRINUSE" in str(error) or "in use" in str(error)
        why = "is in use" if taken else f"cannot be listened on ({str(error).splitlines()[0][:100]})"
        remedy = (
            f"{why} on {socket.gethostname()}; name a free one (deepspeed --master_port N, torchrun --master-port N)"
        )
        raise LaunchError(Problem("MASTER_PORT", place.master_port, remedy)) from None


def _visit(place: Place, deadline: float) -> Any:
    """Connect to rank 0's store: retry until something listens; whatever does not speak the protocol is given up at `deadline`."""
    from torch.distributed import TCPStore

    address = (place.master_addr, place.master_port)
    while True:
        try:
            socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic())).close()
            break
        except OSError as error:
            if time.monotonic() + 0.2 > deadline:
                reason = f"had no answer from rank 0 ({error.strerror or error})"
                raise LaunchError(_no_answer(place, reason)) from None
            time.sleep(0.2)
    found: list[Any] = []
    connect = threading.Thread(target=lambda: found.append(TCPStore(*address, place.world_size)), daemon=True)
    connect.start()
    connect.join(max(1.0, deadline - time.monotonic()))
    if not found:
        raise LaunchError(_no_answer(place, "found something other than rank 0"))
    return found[0]


def _await_all(place: Place, store: Any, deadline: float) -> None:
    late = [r for r in range(place.world_size) if not _arrives(store, [f"launch/{r}"], deadline)]
    if late:
        shown = ", ".join(map(str, late[:8])) + (", ..." if len(late) > 8 else "")
        where = f"{place.master_addr}:{place.master_port}"
        remedy = f"ranks {shown} did not reach {where}; did they start? {_SLOW}"
        raise LaunchError(Problem("WORLD_SIZE", place.world_size, remedy))


def _arrives(store: Any, keys: list[str], deadline: float) -> bool:
    while not store.check(keys):  # store.wait would log stacks at its timeout
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


_SLOW = f"Where ranks start slowly, raise {RENDEZVOUS_VARIABLE}."


def _no_answer(place: Place, what: str) -> Problem:
    remedy = (
        f"rank {place.rank} {what} at port {place.master_port}; is this rank 0's host, reachable from here? {_SLOW}"
    )
    return Problem("MASTER_ADDR", place.master_addr, remedy)
