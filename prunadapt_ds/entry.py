"""What every program of the package wraps around its work: an exit code instead of a traceback, one message, no hang."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from prunadapt_ds import distributed, files
from prunadapt_ds.environment import interruptible
from prunadapt_ds.errors import PrunadaptError, message

INTERRUPTED = 130  # by Ctrl-C, as shells count it


def guarded(work: Callable[[], object]) -> int:
    """Run `work`; returns the process's exit code (see errors.py). `distributed.speaks_of` chooses who prints an error."""
    code = 0
    try:
        with interruptible(), files.owner_writes_alone():
            work()
    except KeyboardInterrupt:  # all ranks of a terminal get it, and what was half done is cleaned up by now
        distributed.end_if_it_would_wait()
        code = INTERRUPTED
    except PrunadaptError as error:
        if distributed.speaks_of(error):
            print(message(error), file=sys.stderr)
        code = error.exit_code
    except BaseException as error:  # on this rank alone: the others may be waiting for it
        if isinstance(error, RuntimeError) and distributed.is_lost_rank(error):
            mine, reason = distributed.rank(), distributed.why_lost(error)
            print(f"error: rank {mine} has lost another rank, which died or is stuck: {reason}", file=sys.stderr)
            distributed.end_if_it_would_wait()
            code = 1
        else:
            distributed.end_if_it_would_wait(error)
            distributed.shutdown()
            raise
    distributed.shutdown()
    return code


@contextlib.contextmanager
def owned_folder(folder: Path) -> Iterator[None]:
    """Lock `folder`, on rank 0, within the block. Collective. Raises UserError on all ranks if another live run has it."""
    lock = distributed.together(lambda: files.OwnedFolder(folder) if distributed.rank() == 0 else None)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
