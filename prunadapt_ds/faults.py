"""Faults on purpose: places in a run where a test lets a rank be killed, stall, or be asked to stop."""

import os
import signal
import time

FAULT = "PRUNADAPT_FAULT"  # variable: KIND@PLACE@RANK, e.g. SIGKILL@decide-6@1; RANK may be "all"


def fault_point(place: str) -> None:
    """The run is at `place`. Does nothing but where the environment names this place and rank."""
    fault = os.environ.get(FAULT)
    if fault is None:
        return
    kind, where, rank = fault.split("@")
    if where == place and rank in ("all", os.environ.get("RANK", "0")):
        if kind == "stall":
            time.sleep(10_000)
        os.kill(os.getpid(), getattr(signal, kind))
