"""Run a function on several real ranks of this machine: gloo, a `file://` rendezvous, a hard timeout.

Ranks come from a fork server that has imported the stack once, so that starting one is cheap.
"""

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed._preload"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on `world_size` ranks: their results, rank by rank.

    Fails with rank and traceback if a rank raises, ends without an answer, or is not done after `timeout` seconds.
    A skip inside a rank skips the test.
    """
    answers = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _context.Process(target=_rank, args=(function, args, rank, world_size, folder, answers), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
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
