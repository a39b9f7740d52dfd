"""Prepare the environment before torch and deepspeed are imported, and end a process that has them. Imports neither."""

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

STARTED = time.monotonic()  # the program's start: the imports that follow take seconds


def prepare_environment() -> None:
    """Choose the CPU backend where there is no GPU, find the compiler tools of this environment, and keep logs short.

    Variables that are already set are kept, but DS_ACCELERATOR=cpu hides all GPUs. The script's own folder is removed from the
    import path: `launcher/evaluate.py` must not shadow the library `evaluate`.
    """
    if sys.argv[0] and sys.path[0] == str(Path(sys.argv[0]).resolve().parent):
        del sys.path[0]
    if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # torch must not see what DeepSpeed is told to ignore
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large CPU tensors on huge pages: the heap wastes less
    # torch's CPU libraries keep a kernel for every shape of a bf16 matrix product, in two caches. A model that shrinks has many
    # shapes, most of which never recur. This limits one of the caches; the other still finds those that do.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    warnings.filterwarnings("ignore", category=FutureWarning)


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit` would, but without the exit handlers of C++ libraries.

    Now and then one of torch's threads is still running, and these handlers would abort a rank whose work is done ("terminate
    called without an active exception").
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader is gone
            stream.flush()
    os._exit(code)
