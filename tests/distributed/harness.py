"""Run a function on several real ranks of this machine: gloo, a `file://` rendezvous, a hard timeout.

Ranks come from a fork server that has imported the stack once, so that starting one is cheap.
"""

import datetime
import functools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import stranger

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed._preload"])


def _processes(ranks: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """One for each (target, arguments), started."""
    _stranger()
    processes = [_context.Process(target=target, args=args, daemon=True) for target, args in ranks]
    for process in processes:
        process.start()
    return processes


@functools.cache
def _stranger() -> Any:
    """Before the fork server starts, whose ranks are to know of it."""
    folder = tempfile.TemporaryDirectory()
    return folder, stranger.start(folder.name)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on `world_size` ranks: their results, rank by rank.

    Fails with rank and traceback if a rank raises, ends without an answer, or is not done after `timeout` seconds.
    A skip inside a rank skips the test.
    """
    answers = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = _processes([(_rank, (function, args, rank, world_size, folder, answers)) for rank in range(world_size)])
        try:
            results = _collect(answers, ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()
    return [results[rank] for rank in range(world_size)]


def _collect(answers: Any, ranks: list[Any], deadline: float) -> dict[int, Any]:
    import queue

    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        try:
            rank, kind, value = answers.get(timeout=0.2)
        except queue.Empty:
            gone = [r for r, p in enumerate(ranks) if not p.is_alive() and r not in results]
            if gone and answers.empty():
                pytest.fail(f"rank {gone[0]} ended with exit code {ranks[gone[0]].exitcode} and no answer")
            if time.monotonic() > deadline:
                pytest.fail(f"ranks {sorted(set(range(len(ranks))) - set(results))} are not done in time")
            continue
        if kind == "error":
            pytest.fail(f"rank {rank} raised\n{value}")
        if kind == "skip":
            pytest.skip(value)
        results[rank] = value
    return results


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, folder: str, answers: Any
) -> None:
    try:
        import torch
        import torch.distributed as dist

        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        os.environ.update(LOCAL_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=120),
        )
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        value = function(*args)
        answers.put((rank, "result", value))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except pytest.skip.Exception as skip:
        answers.put((rank, "skip", str(skip)))
    except BaseException:
        answers.put((rank, "error", traceback.format_exc()))


@dataclass(frozen=True)
class Ended:
    """How a rank's process ended: exit code (negative: by that signal), and all it wrote."""

    code: int
    text: str


class Ranks:
    """Ranks that may die, be killed or be signalled, each running the real program; `wait` says how each ended.

    `argv`: the command line of every rank, or a list of one for each.
    """

    def __init__(self, argv: list[Any], world_size: int, environment: Mapping[str, str] | None = None):
        each = argv if isinstance(argv[0], list) else [argv] * world_size
        self._folder = tempfile.TemporaryDirectory()
        self.files = [f"{self._folder.name}/{rank}.txt" for rank in range(world_size)]
        own = dict(environment or {})
        self.processes = _processes(
            [(_program, (each[r], r, world_size, self._folder.name, self.files[r], own)) for r in range(world_size)]
        )

    def wait(self, timeout: float = 240) -> list[Ended]:
        """Kills and fails when one is not done after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        texts = [Path(file).read_text(errors="replace") if Path(file).exists() else "" for file in self.files]
        self._folder.cleanup()
        if late:
            pytest.fail(f"ranks {late} are not done in {timeout} s\n" + "\n".join(t[-1500:] for t in texts))
        return [Ended(p.exitcode, text) for p, text in zip(self.processes, texts, strict=True)]

    def wait_for(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline or not any(p.is_alive() for p in self.processes):
                pytest.fail("\n".join(ended.text[-1500:] for ended in self.wait(5)))
            time.sleep(0.01)


def _program(
    argv: list[str], rank: int, world_size: int, folder: str, output: str, environment: dict[str, str]
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(LOCAL_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Who is killed before it has come is not waited for as long as for an answer.
    store = dist.FileStore(f"{folder}/rendezvous", world_size)
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world_size)], datetime.timedelta(seconds=60))
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=300),
    )
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    from prunadapt_ds import latency, train
    from prunadapt_ds.commands import reexport

    latency.SETTING.update(batch_size=2, seq_length=16, repeats=1)  # timing is not what these runs are for
    sys.exit((reexport if "--run_dir" in argv else train).main(argv))
