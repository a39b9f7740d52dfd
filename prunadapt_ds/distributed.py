"""Join the process group under any launcher, and the few collectives that decisions need.

Every collective in this module is a no-op if there is no process group, so that the library also works in a single process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from prunadapt_ds import launchers
from prunadapt_ds.errors import LaunchError, PrunadaptError, RanksDisagree, UserError

T = TypeVar("T")

TIMEOUT_MINUTES = 60  # of a collective
OPERATORS = ("deepspeed_shm_comm", "cpu_adam", "async_io")  # DeepSpeed operators that a run may have to compile


def init() -> None:
    """Join the process group of whatever launcher started this process; a plain `python` becomes a group of one.

    Raises LaunchError if the ranks cannot find each other, or would have to share a GPU.
    """
    from deepspeed.accelerator import get_accelerator

    if dist.is_initialized():
        return
    launchers.check_settings(os.environ)
    place = launchers.find(os.environ)
    os.environ.update(place.variables())
    store = launchers.rendezvous(place)
    backend, gpu = get_accelerator().communication_backend_name(), None
    if torch.cuda.is_available():
        gpu = device()
        torch.cuda.set_device(gpu)
        launchers.refuse_shared_gpu(place, store, str(torch.cuda.get_device_properties(gpu).uuid))
        show_deepspeed(gpu)
    use_local_threads(place.local_size)
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world_size, timeout=_timeout(), device_id=gpu
    )


def show_deepspeed(gpu: torch.device) -> None:
    """Set LOCAL_RANK to the index of this rank's GPU, as DeepSpeed expects. They differ if each rank sees only its own GPU."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed requires the two to be equal
        if name in os.environ:
            os.environ[name] = str(gpu.index)


def _timeout() -> datetime.timedelta:
    return datetime.timedelta(minutes=launchers.number(os.environ, (launchers.TIMEOUT_VARIABLE,), TIMEOUT_MINUTES))


def start_deepspeed() -> None:
    """Let DeepSpeed use the process group.

    Call it before a model is loaded, but after every check that needs no model: on a CPU DeepSpeed first compiles an operator,
    which takes a minute if that has not been done yet.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups

    for operator in OPERATORS:
        free_compiler_lock(compiler_lock(operator))
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(dist_backend=backend, timeout=_timeout(), verbose=False)
    # DeepSpeed would copy the group for its first engine; during that copy a dead rank is noticed only after half an hour.
    # Using the group itself avoids this, and saves a communicator on GPUs.
    groups._WORLD_GROUP = dist.group.WORLD


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone (gloo has no exception type for that)."""
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or "/gloo/" in str(error)


def why_lost(error: RuntimeError) -> str:
    """The transport's own message, without its source location and its generic advice."""
    return re.sub(r"^\[[^]]*/gloo/[^]]*\]\s*", "", str(error).strip()).partition(". This is typically")[0]


def compiler_lock(operator: str) -> Path:
    """The lock file that torch holds while it builds a DeepSpeed operator."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(operator, False)) / "lock"


def free_compiler_lock(lock: Path, patience: float = 120) -> None:
    """Wait until nobody compiles under `lock`; remove the lock of a dead owner, for which everybody would wait forever.

    torch's lock is a file that its owner keeps open. Owners on other hosts that share the folder cannot be seen, so a lock is
    removed only once it is older than `patience` seconds.
    """
    while True:
        try:
            status = lock.stat()
        except OSError:
            return
        if time.time() - status.st_mtime > patience and not _is_open_here(status):
            lock.unlink(missing_ok=True)
            return
        time.sleep(0.5)


def _is_open_here(status: os.stat_result) -> bool:
    """Whether a process of this host holds the file open, as far as this user may see."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samestat(link.stat(), status):
                return True
    return False


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_if_it_would_wait(error: BaseException | None = None) -> None:
    """End this process with exit code 1 and the traceback of `error` if leaving the group could wait forever.

    Under NCCL, leaving waits for ranks that in turn wait for this one; gloo tells them that a connection is gone. So this does
    nothing on a CPU, or with one rank.
    """
    if dist.is_initialized() and world_size() > 1 and device().type == "cuda":
        if error is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def together(work: Callable[[], T]) -> T:
    """Run `work` on every rank; if it raises UserError on any of them, all ranks raise that error, and none waits for another.

    `work` must not need the other ranks before the point where it can fail.
    """
    try:
        result, problems = work(), ()
    except UserError as error:
        result, problems = None, error.problems  # type: ignore[assignment]
    for found in all_gather_objects(problems):
        if found:
            raise UserError(found)
    return result  # type: ignore[return-value]


def on_rank_0(what: str, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 while the others wait; every rank returns its result (small, picklable) or raises its failure.

    `what` begins the message of a failure that is not a PrunadaptError: "writing the report".
    """
    result, failure = broadcast_object(_outcome(what, work) if rank() == 0 else None)
    if failure is not None:
        raise failure
    return result


def on_rank_0_for_long(
    what: str, work: Callable[[], T], goes_on: Callable[[], None], *, every: float = 60.0, most: float = 24 * 3600.0
) -> T:
    """Like `on_rank_0`, for work that may outlast a collective's timeout. It runs in a thread and must not need other ranks.

    While it runs, rank 0 reports to the others every `every` seconds, and all ranks call `goes_on`. After `most` seconds they
    no longer do, because stuck work must not look alive forever.
    """
    until = time.monotonic() + most
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        mine = pool.submit(_outcome, what, work) if rank() == 0 else None
        while not broadcast_object(mine is not None and bool(concurrent.futures.wait([mine], every).done)):
            if time.monotonic() < until:
                goes_on()
        result, failure = broadcast_object(None if mine is None else mine.result())
    if failure is not None:
        raise failure
    return result


def same_on_all_hosts(what: str, work: Callable[[], T]) -> T:
    """Run `work` on one rank of each host; every rank returns the result. Raises RanksDisagree on all if results differ."""
    hosts = all_gather_objects(socket.gethostname())
    is_first = hosts.index(hosts[rank()]) == rank()
    found = all_gather_objects(_outcome(f"reading {what}", work) if is_first else None)
    if failure := next((outcome[1] for outcome in found if outcome and outcome[1]), None):
        raise failure
    odd = sorted({host for host, outcome in zip(hosts, found, strict=True) if outcome and outcome != found[0]})
    if odd:
        raise RanksDisagree(f"{what} on {', '.join(odd)} differ from those on {hosts[0]}; give all hosts the same")
    return found[0][0]


def _outcome(what: str, work: Callable[[], Any]) -> tuple[Any, PrunadaptError | None]:
    """Run `work`; returns its result, and the error it failed with or None."""
    from safetensors import SafetensorError

    try:
        return work(), None
    except PrunadaptError as error:
        return None, error
    except (OSError, SafetensorError) as error:
        return None, PrunadaptError(f"{what} failed: {error}")
    except Exception as error:
        traceback.print_exc()
        return None, PrunadaptError(f"{what} failed: {type(error).__name__}: {error}")


def all_gather_objects(value: Any) -> list[Any]:
    """Gather a small object from every rank, in rank order."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def true_on_all_ranks(holds: bool) -> bool:
    """Whether `holds` is true on every rank. Collective."""
    return all(all_gather_objects(holds))


def rank() -> int:
    """This process's rank; before `init`, as the launcher's variables state it."""
    return dist.get_rank() if dist.is_initialized() else launchers.number(os.environ, launchers.RANK_VARIABLES)


def speaks_of(error: BaseException) -> bool:
    """Whether this rank prints `error`: rank 0, if all ranks know of it.

    Before the group exists, one process per host does: its error may be about a file that only this host has.
    """
    if isinstance(error, LaunchError) or not dist.is_initialized():
        return launchers.number(os.environ, launchers.LOCAL_RANK_VARIABLES) == 0
    return rank() == 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def launcher() -> str | None:
    """The program that started these ranks; None if that is unknown."""
    name = os.environ.get(launchers.LAUNCHER_VARIABLE)
    return None if name == launchers.UNKNOWN else name


def nodes() -> int:
    """The number of hosts, derived from the ranks per host; 1 if the launcher does not state those."""
    of_one = launchers.number(os.environ, launchers.LOCAL_SIZE_VARIABLES, world_size())
    return -(-world_size() // max(1, of_one))


def cores() -> frozenset[int]:
    """The cores of this machine that this process may run on."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def use_local_threads(ranks: int) -> None:
    """Divide this machine's cores evenly among its `ranks`, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(cores()) // max(1, ranks)))


def device() -> torch.device:
    """The device this rank computes on."""
    if torch.cuda.is_available():
        # SLURM may show each rank only its own GPU, which then has index 0.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def dist_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor`, of any shape, over all ranks, on every rank. In place if there is more than one rank."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def dist_max(value: float) -> float:
    """The largest `value` of any rank, on every rank."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate equally shaped [N, ...] tensors of all ranks, in rank order: [ranks * N, ...]."""
    if world_size() == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def broadcast_object(value: Any) -> Any:
    """Broadcast rank 0's value, a small picklable object, to every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensors(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Broadcast rank 0's named tensors to the CPU of every rank; the others pass None."""
    if world_size() == 1:
        return dict(tensors or {})
    shapes = broadcast_object({n: (t.shape, t.dtype) for n, t in tensors.items()} if tensors is not None else None)
    received = {}
    for name, (shape, dtype) in shapes.items():
        tensor = torch.empty(shape, dtype=dtype, device=device())
        if tensors is not None:
            tensor.copy_(tensors[name])
        dist.broadcast(tensor, src=0)
        received[name] = tensor.cpu()
    return received


def same_on_all_ranks(name: str, digest: str) -> None:
    """Raise RanksDisagree on every rank unless all ranks hold the same `digest` (a hexadecimal hash)."""
    mine = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8).to(device())
    everyone = all_gather_rows(mine[None])
    odd = [r for r, row in enumerate(everyone) if not torch.equal(row, everyone[0])]
    if odd:
        raise RanksDisagree(f"{name} differs between ranks: ranks {odd} do not agree with rank 0")
