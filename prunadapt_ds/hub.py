"""The hub: a quick check that it answers, before its client retries for half a minute, and a model as a local folder."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUB_TIMEOUT = 3.0
"""Seconds that the hub has to answer before it counts as unreachable (its client retries for 23)."""
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.codes", "*.jinja", "*.py", "vocab.*", "README.md")
"""A model's configuration, tokenizer, code and card."""

NO_ACCESS = "it is gated: accept its licence on its page, then run `hf auth login` or set HF_TOKEN"


class UnavailableError(Exception):
    """Neither the hub nor its cache on this host has the model; says why, and what helps."""


def split(name: str) -> tuple[str, str | None]:
    """Split `owner/model@revision` into the repository and its commit, branch or tag; without one: None, the main branch."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def could_be_id(name: str) -> bool:
    """Whether `name` can be a hub id, `model` or `owner/model`, also with `@revision`; anything else is taken for a path."""
    repository, _ = split(name)
    return not name.startswith((".", "/", "~")) and not name.endswith(("/", "@")) and repository.count("/") < 2


def unreachable(ask: Callable[[Any, float], Any]) -> str | None:
    """Why the hub does not answer `ask(api, timeout)`; None if it does.

    One request, in a thread because a host name lookup obeys no timeout.
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
    """Why the hub does not provide the model `name`; None if it does."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    repository, revision = split(name)
    return unreachable(lambda api, timeout: api.model_info(repository, revision=revision, timeout=timeout))


@functools.cache
def snapshot(name: str) -> Path:
    """The cache folder with all that is needed to load the model (or adapter) `name`, downloaded if the hub answers.

    Of the weights, only the safetensors that transformers or PEFT would look for. If the download fails for whatever reason, a
    cached copy will do. Raises UnavailableError if there is none.
    """
    reason = why_offline(name)
    if reason is None:
        try:
            return _fetch(name)
        except Exception as error:  # a dozen types: no access, a full disk, another user's cache, a damaged index
            reason = NO_ACCESS if type(error).__name__ == "GatedRepoError" else first_line(error)[:200]
    if (folder := _cached(name)) is not None:
        return folder
    raise UnavailableError(
        f"could not be loaded from the hub ({reason}), nor is it in the local cache; "
        "offline, name a folder with a copy of it, or set HF_HOME to a cache that holds it"
    )


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, revision = split(name)

    def fetch(revision: str | None, *patterns: str) -> Path:
        found = snapshot_download(repository, revision=revision, allow_patterns=list(patterns), ignore_patterns="*/*")
        return Path(found)

    folder = fetch(revision, *SMALL_FILES)
    commit = folder.name  # whatever is pushed meanwhile
    kind = "adapter_model" if (folder / "adapter_config.json").is_file() else "model"
    weights, index = f"{kind}.safetensors", folder / f"{kind}.safetensors.index.json"
    fetch(commit, weights)
    if index.is_file() and not (folder / weights).is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        fetch(commit, *sorted(set(shards)))
    return folder


def _cached(name: str) -> Path | None:
    """The cached folder of a model with weights, whoever fetched it; it may be incomplete."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision = split(name)
    files = ("config.json", "adapter_config.json")
    found = (try_to_load_from_cache(repository, file, revision=revision) for file in files)
    folders = (Path(path).parent for path in found if isinstance(path, str))
    return next((folder for folder in folders if any(folder.glob("*.safetensors"))), None)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
