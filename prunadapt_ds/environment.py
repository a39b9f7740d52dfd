"""Prepare the environment before torch and deepspeed are imported, and end a process that has them. Imports neither."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
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


def prepare_program() -> None:
    """`prepare_environment` and `end_on_interrupt`, for programs: a notebook keeps its own handler of Ctrl-C."""
    prepare_environment()
    end_on_interrupt()


def end_on_interrupt() -> None:
    """Let Ctrl-C end this process by the signal: in imports, Python would print a traceback of wherever it was.

    `interruptible` brings back the exception, which lets work clean up. A job in the background goes on ignoring the signal.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C here, also after `end_on_interrupt`."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
