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
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.codes", "*.jinja", "*.py", "vocab.*", "README.md")
"""Of a model: its configuration, tokenizer, code and card."""


class UnavailableError(Exception):
    """A model that neither the hub nor its cache on this host gives; says why, and what helps."""


def could_be_id(name: str) -> bool:
    """Whether `name` can be a model of the hub, as `model` or `owner/model`; what cannot is meant as a path."""
    return not name.startswith((".", "/", "~")) and not name.endswith("/") and name.count("/") < 2


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

    Of weights those that transformers or PEFT would look for, in safetensors. Whatever keeps the hub from giving them, a
    copy in the cache will do. Raises UnavailableError where there is none.
    """
    reason = why_offline(name)
    if reason is None:
        try:
            return _fetch(name)
        except Exception as error:  # a dozen types: not yours to read, no room, a cache of others, a damaged index
            reason = first_line(error)[:200]
    if (folder := _cached(name)) is not None:
        return folder
    raise UnavailableError(
        f"could not be loaded from the hub ({reason}), nor is it in the local cache; "
        "offline, name a folder with a copy of it, or set HF_HOME to a cache that holds it"
    )


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str, revision: str | None = None) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns="*/*"))

    folder = fetch(*SMALL_FILES)
    revision = folder.name  # the commit, whatever is pushed meanwhile
    kind = "adapter_model" if (folder / "adapter_config.json").is_file() else "model"
    weights, index = f"{kind}.safetensors", folder / f"{kind}.safetensors.index.json"
    fetch(weights, revision=revision)
    if index.is_file() and not (folder / weights).is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        fetch(*sorted(set(shards)), revision=revision)
    return folder


def _cached(name: str) -> Path | None:
    """Where the cache has a model with weights, whoever fetched it; whether it is complete is not known."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json"))
    folders = (Path(path).parent for path in found if isinstance(path, str))
    return next((folder for folder in folders if any(folder.glob("*.safetensors"))), None)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
