"""What a run is made of: its data, backbone and adapter, and what the tokenizer makes of the data.

They are read here, and known again by their content, wherever they lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from prunadapt_ds import distributed, initial_adapter, model_folder
from prunadapt_ds.batches import Rows
from prunadapt_ds.config import Config
from prunadapt_ds.data import TaskData, load_language, load_task
from prunadapt_ds.errors import Problem, UserError


def read_inputs(config: Config) -> TaskData:
    """Read the task's examples and check the model's folder. Collective. Raises UserError with the problems of both."""

    def check_model() -> None:
        distributed.together(lambda: model_folder.check(config.model.model_name_or_path))

    try:
        data = read_data(config)
    except UserError as error:
        raise error.beside(check_model) from error
    check_model()
    return data


def read_data(config: Config) -> TaskData:
    """Read the task's examples. Raises UserError on every rank if one of them cannot read them."""
    if distributed.rank() != 0:
        datasets.disable_progress_bars()
    return distributed.together(lambda: _load_data(config))


def _load_data(config: Config) -> TaskData:
    return load_language(config.data) if config.is_language else load_task(config.data, config.train.seed)


def agreed_data(data: TaskData) -> str:
    """Check that every rank holds the same examples, and return their sha256. Raises RanksDisagree.

    A rank that fell back to an old cache would train on something else.
    """
    digest = _data_identity(data)
    distributed.same_on_all_ranks("the data", digest)
    return digest


def _data_identity(data: TaskData) -> str:
    digest = hashlib.sha256()
    for split in (data.train, *data.validation.values()):
        digest.update(json.dumps(split.to_dict(), sort_keys=True).encode())
    return digest.hexdigest()


def content_of(config: Config) -> dict[str, str]:
    """sha256 of the data, backbone and adapter that the options name now. For one rank. Raises UserError for what is not there."""
    name = config.lora.adapter_name_or_path
    model_folder.check(config.model.model_name_or_path)
    adapter = initial_adapter.read(name) if name is not None else None
    return {"data": _data_identity(_load_data(config)), **model_identity(config, adapter)}


def agreed_tokens(config: Config, rows: Sequence[Rows], saved: Mapping[str, Any] | None) -> str:
    """Check that every rank reads the same tokens as the others and as the checkpoint `saved`, and return their sha256.

    The files of a tokenizer may differ although those of the model agree. Raises RanksDisagree, and UserError if the checkpoint
    was made with other tokens. Collective.
    """
    digest = hashlib.sha256("".join(r.digest() for r in rows).encode()).hexdigest()
    distributed.same_on_all_ranks("what the tokenizer makes of the data", digest)
    before = (saved or {}).get("identity", {}).get("tokens", digest)  # older checkpoints do not say
    if before != digest:
        remedy = (
            "its tokenizer makes other tokens of the data than when the checkpoint was written; bring that one back"
        )
        raise UserError(Problem("model_name_or_path", config.model.model_name_or_path, remedy))
    return digest


def model_identity(config: Config, adapter: initial_adapter.InitialAdapter | None) -> dict[str, str]:
    """sha256 of the backbone and, if there is one, of the adapter that the run starts from."""
    found = {"backbone": model_folder.identity(config.model.model_name_or_path)}
    return found | ({"adapter": adapter.identity()} if adapter is not None else {})


def refuse_changed(config: Config, identity: dict[str, str], saved: Mapping[str, Any] | None) -> None:
    """A run is the same only with the backbone, data and adapter it began with, wherever they are stored now. Raises UserError.

    `identity`: theirs now, see `content_of`. `saved`: what the run has left; it says what they were.
    """
    names = {
        "backbone": ("model_name_or_path", config.model.model_name_or_path),
        "data": _data_option(config),
        "adapter": ("adapter_name_or_path", config.lora.adapter_name_or_path),
    }
    before = saved["identity"] if saved else identity
    changed = [named for kind, named in names.items() if before.get(kind) != identity.get(kind)]
    if changed:
        remedy = (
            "its content is not what the run began with; bring that back, name another --output_dir, or start over with "
            "--resume never"
        )
        raise UserError([Problem(name, value, remedy) for name, value in changed])


def _data_option(config: Config) -> tuple[str, Any]:
    names = ("train_file", "data_dir", "task_name")
    return next((name, getattr(config.data, name)) for name in names if getattr(config.data, name) or name == names[-1])
