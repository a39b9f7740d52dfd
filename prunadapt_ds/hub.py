"""Whether the hub answers: asked once and quickly, before its client tries for half a minute."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

HUB_TIMEOUT = 3.0
"""Seconds the hub has to answer before a run is told that it is unreachable (the client retries for 23)."""


def unreachable(ask: Callable[[Any, float], Any]) -> str | None:
    """Why the hub does not answer `ask(api, timeout)`, or None when it does.

    One request, in a thread because looking up a host name obeys no timeout.
    """
    from huggingface_hub import HfApi, constants

    answer = [f"no answer from {constants.ENDPOINT} in {HUB_TIMEOUT:g} s"]

    def attempt() -> None:
        try:
            ask(HfApi(endpoint=constants.ENDPOINT), HUB_TIMEOUT)
            answer.clear()
        except Exception as error:  # whatever it is, it is the reason to report
            answer[:] = [f"{constants.ENDPOINT}: {first_line(error)}"]

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT + 0.5)
    return answer[0] if answer else None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
