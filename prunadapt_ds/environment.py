"""What has to be set before torch and deepspeed are imported, and how a process that has them ends. Imports neither."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

STARTED = time.monotonic()  # of this program: the imports that come next take seconds


def prepare_environment() -> None:
    """Choose the CPU backend where there is no GPU, find the compiler tools of this environment, and keep logs short.

    Every value can be overridden from outside. The script's own folder leaves the import path: `launcher/evaluate.py` must
    not hide the library `evaluate`.
    """
    if sys.argv[0] and sys.path[0] == str(Path(sys.argv[0]).resolve().parent):
        del sys.path[0]
    if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # torch must not see what DeepSpeed is told to leave alone
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large CPU tensors on huge pages: the heap wastes less
    # Every new shape of a bf16 product leaves a kernel in two caches of torch's CPU libraries. A model that shrinks has many, and
    # most never come again; kept in one of the two, those that do are found all the same.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    warnings.filterwarnings("ignore", category=FutureWarning)


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit` would, but for what C++ libraries do then: now and then one of torch's threads still runs, and
    a rank whose work is done is aborted ("terminate called without an active exception")."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever listened is gone
            stream.flush()
    os._exit(code)
