"""Fault injection: places in a run where a test can kill a rank, stall it or ask it to stop."""

import os
import signal
import time

FAULT = "PRUNADAPT_FAULT"  # variable: KIND@PLACE@RANK, e.g. SIGKILL@decide-6@1; KIND may be "stall", RANK "all"


def fault_point(place: str) -> None:
    """Stall this process or send it a signal if the environment names this place and rank; otherwise do nothing."""
    fault = os.environ.get(FAULT)
    if fault is None:
        return
    kind, where, rank = fault.split("@")
    if where == place and rank in ("all", os.environ.get("RANK", "0")):
        if kind == "stall":
            time.sleep(10_000)
        os.kill(os.getpid(), getattr(signal, kind))
