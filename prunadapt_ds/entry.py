"""What every program of the package does around its work: an exit code instead of a traceback, one message, no hang."""

from __future__ import annotations

import sys
from collections.abc import Callable

from prunadapt_ds import distributed, files
from prunadapt_ds.errors import PrunadaptError, message


def guarded(work: Callable[[], object]) -> int:
    """Run `work`; returns the process's exit code (see errors.py). Rank 0 says what went wrong."""
    try:
        with files.owner_writes_alone():
            work()
    except PrunadaptError as error:
        if distributed.speaks_of(error):
            print(message(error), file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        if not distributed.is_lost_rank(error):
            raise
        mine = distributed.rank()
        reason = distributed.why_lost(error)
        print(f"error: rank {mine} has lost another rank, which died or is stuck: {reason}", file=sys.stderr)
        return 1
    finally:
        distributed.shutdown()
    return 0
