"""Describes the installation and the ranks, and finds problems that a run would otherwise meet late.

Takes the options of a training run and checks those that depend on the machine: --ds_config and --output_dir.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from prunadapt_ds import distributed, launchers
from prunadapt_ds.config import Config, parse
from prunadapt_ds.ds_config import fast_bf16, resolve_ds_config
from prunadapt_ds.entry import guarded
from prunadapt_ds.errors import PrunadaptError, UserError
from prunadapt_ds.options import Usage
from prunadapt_ds.report import PACKAGES

USAGE = Usage(
    "Describe this installation and its ranks, and report problems with them. All options of a run are accepted; those that "
    "depend on the machine are listed.",
    "prunadapt doctor --ds_config ds_configs/zero3.json --output_dir outputs",
    frozenset({"ds_config", "output_dir"}),
)
NAMED = {"model_name_or_path", "adapter_name_or_path", "task_name", "data_dir", "train_file", "validation_file"}
"""Options of a run whose models and data are not opened here."""
ALL_REDUCE_BYTES = (1024, 16 * 2**20)


@dataclass(frozen=True)
class Rank:
    """One rank, as it describes itself."""

    rank: int
    local_rank: int
    host: str
    device: str
    cores: frozenset[int]  # indices of the host's cores that this rank may use
    threads: int
    versions: dict[str, str]
    problems: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings on rank 0. Returns, on every rank, 0 if there are no problems, otherwise 2."""
    wrong: list[str] = []
    code = guarded(lambda: wrong.extend(run(parse(argv, USAGE))))
    return code or (UserError.exit_code if wrong else 0)


def run(config: Config) -> list[str]:
    """Find the problems of all ranks; rank 0 prints them with a description of the ranks. Collective."""
    distributed.init()
    ranks = distributed.all_gather_objects(examine(config))
    times = {size: all_reduce_seconds(size) for size in ALL_REDUCE_BYTES}
    wrong = problems(ranks)
    if distributed.rank() == 0:
        print("\n".join(describe(ranks, times, wrong, sorted(config.given & NAMED))), flush=True)
    return wrong


def examine(config: Config) -> Rank:
    """Describe this rank, with the problems that it can see on its own."""
    found = [*compiler_problems(), *gpu_problems(), *folder_problems(Path(config.output.output_dir))]
    try:
        resolve_ds_config(config, distributed.world_size())
    except UserError as error:
        found += [f"--ds_config: {problem}" for problem in error.problems]
    return Rank(
        rank=distributed.rank(),
        local_rank=launchers.number(os.environ, launchers.LOCAL_RANK_VARIABLES),
        host=socket.gethostname(),
        device=device_name(),
        cores=distributed.cores(),
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in PACKAGES},
        problems=found,
    )


def device_name() -> str:
    device = distributed.device()
    if device.type != "cuda":
        return "cpu"
    memory = torch.cuda.get_device_properties(device).total_memory
    return f"{device} {torch.cuda.get_device_name(device)} {memory / 2**30:.0f} GiB"


def compiler_problems() -> list[str]:
    """Missing build tools: DeepSpeed compiles operators for CPU ranks and for offloading on first use."""
    found = []
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        found.append(
            f"no C++ compiler ({compiler}): DeepSpeed compiles operators on first use; install one, e.g. apt-get install g++"
        )
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        found.append(
            "Python's headers are missing: DeepSpeed's operators include Python.h; install them, e.g. apt-get install python3-dev"
        )
    if shutil.which("ninja") is None:
        found.append("ninja is not on the PATH: run `pip install ninja`, and start python from its environment")
    return found


def gpu_problems() -> list[str]:
    """GPUs that the host has but torch does not see: a run would silently use the CPU."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []  # the user asked for no GPU; DS_ACCELERATOR=cpu does so too
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in said.splitlines())
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
    remedy = "install a build of torch that fits the driver, or set DS_ACCELERATOR=cpu"
    return (
        [f"the host has {count} GPU(s) that torch {torch.__version__}, {built}, does not see: {remedy}"]
        if count
        else []
    )


def folder_problems(folder: Path) -> list[str]:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(there):
        return [f"--output_dir {folder}: {there} is a file"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"--output_dir {folder}: {there} cannot be written to by this user"]
    free = shutil.disk_usage(there).free
    return [f"--output_dir {folder}: {free / 2**20:.0f} MiB left on the disk"] if free < 2**30 else []


def all_reduce_seconds(size: int, repeats: int = 5) -> float:
    """Median seconds of an all-reduce of `size` bytes, after two warm-ups. Collective.

    Raises PrunadaptError if it returns a wrong sum.
    """
    values = torch.ones(size // 4, dtype=torch.float32, device=distributed.device())
    seconds = []
    for _ in range(2 + repeats):
        distributed.barrier()
        start = time.perf_counter()
        distributed.dist_sum(values.fill_(1.0))
        if values.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if float(values.sum()) != distributed.world_size() * values.numel():
        raise PrunadaptError(f"an all-reduce of ones over {distributed.world_size()} ranks returned a wrong sum")
    return statistics.median(seconds[2:])


def problems(ranks: Sequence[Rank]) -> list[str]:
    """The problems of single ranks, each listed once, and those between ranks."""
    by_text: dict[str, list[int]] = {}
    for r in ranks:
        for text in r.problems:
            by_text.setdefault(text, []).append(r.rank)
    found = [text if len(who) == len(ranks) else f"{text} (ranks {who})" for text, who in by_text.items()]
    for name in PACKAGES:
        if len(kinds := {r.versions[name] for r in ranks}) > 1:
            found.append(f"{name} differs between ranks: {', '.join(sorted(kinds))}")
    without = sum(r.device == "cpu" for r in ranks)
    if 0 < without < len(ranks):
        found.append(f"{without} of {len(ranks)} ranks have no GPU")
    for host in dict.fromkeys(r.host for r in ranks):
        here = [r for r in ranks if r.host == host]
        threads, cores = sum(r.threads for r in here), len(frozenset().union(*(r.cores for r in here)))
        if threads > cores and len(here) > 1:
            found.append(f"{host}: {threads} threads of {len(here)} ranks on {cores} cores; set OMP_NUM_THREADS")
    return found


def describe(
    ranks: Sequence[Rank], times: dict[int, float], wrong: Sequence[str], unopened: Sequence[str] = ()
) -> list[str]:
    """The lines that rank 0 prints. `unopened`: options that were given and whose models or data were not looked at."""
    hosts = list(dict.fromkeys(r.host for r in ranks))
    versions = ", ".join(f"{name} {number}" for name, number in ranks[0].versions.items())
    lines = [
        f"launcher   {os.environ[launchers.LAUNCHER_VARIABLE]}: {len(ranks)} rank(s) on {len(hosts)} host(s)",
        f"versions   Python {platform.python_version()}, {versions}, CUDA {torch.version.cuda or 'none'}",
        f"compiler   {compiler_version()}",
    ]
    for r in ranks:
        lines.append(
            f"rank {r.rank:<5} {r.host}, local rank {r.local_rank}, {r.device}, {len(r.cores)} cores, {r.threads} threads"
        )
    lines.append(f"backend    {backend()}")
    for size, seconds in times.items():
        speed = f", {size / seconds / 2**30:.2f} GiB/s" if size > 2**20 else ""
        lines.append(f"all-reduce {size // 1024} KiB in {seconds * 1000:.2f} ms{speed}")
    lines.append(f"bf16       {'fast here' if fast_bf16() else 'slow here: runs use fp32'}")
    if unopened:
        lines.append(
            f"not opened {', '.join(f'--{name}' for name in unopened)}: a run checks what they name as it starts"
        )
    lines += ["", *(f"problem: {text}" for text in wrong)] if wrong else ["no problems found"]
    return lines


def backend() -> str:
    import torch.distributed as dist

    return str(dist.get_backend())


def compiler_version() -> str:
    compiler = os.environ.get("CXX", "g++")
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return f"{compiler} --version failed"
    return said[0] if said else compiler
