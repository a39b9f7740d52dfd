"""The hub: whether it answers, asked once and quickly before its client tries for half a minute, and a model as a folder."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUB_TIMEOUT = 3.0
"""Seconds the hub has to answer before a run is told that it is unreachable (the client retries for 23)."""
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "vocab.*", "README.md")
"""Of a model: its configuration, tokenizer, code and card."""


class UnavailableError(Exception):
    """A model that neither the hub nor its cache on this host gives; says why, and what helps."""


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


def why_offline(name: str) -> str | None:
    """Why the hub does not give the model `name`; None when it does."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return unreachable(lambda api, timeout: api.model_info(name, timeout=timeout))


@functools.cache
def snapshot(name: str) -> Path:
    """The folder of this host's cache with all that loading the model (or adapter) `name` takes, fetched where the hub answers.

    Of weights those that transformers or PEFT would look for, in safetensors. Raises UnavailableError.
    """
    from huggingface_hub import snapshot_download

    offline = why_offline(name)

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                name, allow_patterns=list(patterns), ignore_patterns="*/*", local_files_only=bool(offline)
            )
        )

    try:
        folder = fetch(*SMALL_FILES)
        kind = "adapter_model" if (folder / "adapter_config.json").is_file() else "model"
        weights, index = f"{kind}.safetensors", folder / f"{kind}.safetensors.index.json"
        fetch(weights)
        if index.is_file() and not (folder / weights).is_file():
            fetch(*sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
        if offline and not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(weights)
    except Exception as error:  # a dozen types: no such repository, not yours to read, nobody answers, a damaged index
        raise UnavailableError(
            f"could not be loaded from the hub ({offline or first_line(error)[:200]}), nor is it in the local cache; "
            "offline, name a folder with a copy of it, or set HF_HOME to a cache that holds it"
        ) from error
    return folder


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
