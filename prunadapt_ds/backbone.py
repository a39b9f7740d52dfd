"""Loads the pretrained backbone frozen and, under ZeRO-3, sharded from the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunadapt_ds import attention, distributed, model_folder
from prunadapt_ds.config import EXPORT_DTYPES
from prunadapt_ds.errors import Problem, PrunadaptError, UserError
from prunadapt_ds.models.auto_classes import auto_class
from prunadapt_ds.models.families import Family
from prunadapt_ds.models.layouts import family_of, layout_of, most_tokens
from prunadapt_ds.models.modeling_prunadapt import Layout
from prunadapt_ds.models.structure import Structure, is_sharded, structure_of
from prunadapt_ds.streaming import streaming


@dataclass
class Backbone:
    """A loaded model with its family record.

    `task_head_names`: parameters that are new or belong to the task head; these are trained.
    `notes`: messages about how it was loaded, one line each.
    `known_classes`: the class names of the checkpoint's own head; () if the head is new.
    `stored_dtype`: dtype of the checkpoint's weights according to its configuration.
    """

    model: Any
    tokenizer: Any
    family: Family
    layout: Layout
    structure: Structure
    task_head_names: frozenset[str]
    notes: list[str] = field(default_factory=list)
    known_classes: tuple[str, ...] = ()
    stored_dtype: str = "float32"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings about new and unsharded weights: new ones are trained, and ZeRO-3 shards all."""
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
    """Load a sequence classifier or a causal language model, frozen except for its task head and newly initialised parameters.

    While an `HfDeepSpeedConfig` of stage 3 is alive, every rank reads and keeps only its shard (see `streaming`). Collective.
    Raises UserError on every rank for an unsupported family, a missing, damaged or pickled checkpoint, or a failed download.
    """
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
    with refusals(model_name_or_path), quiet(), streaming(model_name_or_path) as notes:
        model, info = auto_class(is_language).from_pretrained(
            str(model_folder.folder_of(model_name_or_path)),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention.register(),
        )
    model.name_or_path = config.name_or_path = model_folder.locate(model_name_or_path)  # not this host's cache
    if (most := most_tokens(model)) is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    if not is_sharded(next(model.parameters())):
        model.to(device)
    layout = layout_of(family, config, model.base_model_prefix)
    refuse_no_layers(model_name_or_path, layout)
    mismatched = {key[0] for key in info["mismatched_keys"]}
    new = set(info["missing_keys"]) | mismatched
    head = frozenset(n for n, _ in model.named_parameters() if n in new or n.startswith(_prefixes(family.task_head)))
    _refuse_damaged(model_name_or_path, layout, new, () if is_language else _prefixes(family.task_head))
    freeze(model, head)
    structure = structure_of(model, layout, seq_length)
    known = () if is_language or new & head else opened.classes
    return Backbone(model, tokenizer, family, layout, structure, head, notes, known, opened.dtype)


@dataclass(frozen=True)
class _Opened:
    """A checkpoint whose small files have been read and whose weights are on this host; no model has been built.

    `classes`: class names in its own configuration. `dtype`: dtype of its weights.
    """

    family: Family
    config: Any
    tokenizer: Any
    classes: tuple[str, ...]
    dtype: str


def _open(name: str, answers: Mapping[str, Any], trust_remote_code: bool, is_language: bool) -> _Opened:
    """Do every part of loading that can fail on one host alone. `answers`: configuration fields that the task determines."""
    from transformers import AutoConfig, AutoTokenizer

    model_folder.check(name)
    if trust_remote_code:
        model_folder.say_remote_code(name)
    with refusals(name):
        folder = str(model_folder.folder_of(name))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **answers)
        stock = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config.name_or_path = model_folder.locate(name)
        family = family_of(config)
        if is_language and not family.is_decoder:
            remedy = f"{config.model_type} is not a decoder and cannot generate text; leave --task_type out"
            raise UserError(Problem("task_type", "causal_lm", remedy))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if family.is_decoder or tokenizer.pad_token_id is None:
            agree_on_padding(name, config, tokenizer)
        if family.is_decoder:
            config.use_cache = False  # training does not generate; the export switches it on again
    return _Opened(family, config, tokenizer, class_names(stock), stored_dtype(stock))


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Turn errors of loading a model into UserErrors, except those of a lost rank and of memory, which no folder causes."""
    try:
        yield
    except (PrunadaptError, MemoryError, torch.OutOfMemoryError):  # no fault of the folder, and of one rank alone
        raise
    except Exception as error:  # transformers raises many types of errors for a faulty folder
        if isinstance(error, RuntimeError) and distributed.is_lost_rank(error):
            raise
        reason = f"cannot be loaded: {' '.join(str(error).split())[:300] or type(error).__name__}"
        if "trust_remote_code" in str(error):
            reason = "needs code that comes with it; read that code, and pass --trust_remote_code to run it"
        raise UserError(Problem("model_name_or_path", name, reason)) from error


def refuse_no_layers(name: str, layout: Layout) -> None:
    if layout.num_layers < 1:
        raise UserError(Problem("model_name_or_path", name, "its config.json says that it has no layers"))


def class_names(config: Any) -> tuple[str, ...]:
    """The class names in a model's configuration, in the order of its outputs."""
    return tuple(str(config.id2label[i]) for i in sorted(config.id2label))


def stored_dtype(config: Any) -> str:
    """The dtype of a checkpoint's weights according to its configuration; float32 if it gives none that exports support."""
    found = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return found if found in EXPORT_DTYPES else "float32"


def agree_on_padding(name: str, config: Any, tokenizer: Any) -> None:
    """Make the tokenizer and the model use the same padding token, and pad on the right.

    A decoder's classifier reads the last token that is not padding: if model and tokenizer disagreed about the padding token,
    it would silently read a padded position. With padding on the right, positions count from the first real token, and causal
    attention never sees the padding. A tokenizer without a padding token gets the configuration's, or else an existing special
    token, so no embedding is added. Raises UserError if there is none, or if the model has no embedding for it.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        of_config = config.pad_token_id
        known = None if of_config is None or of_config < 0 else tokenizer.convert_ids_to_tokens(of_config)
        found = known or tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if found is None:
            remedy = "its tokenizer has no padding token, nor one to use instead; set one in tokenizer_config.json"
            raise UserError(Problem("model_name_or_path", name, remedy))
        tokenizer.pad_token = found
    known_tokens = config.get_text_config().vocab_size
    if not 0 <= tokenizer.pad_token_id < known_tokens:
        remedy = (
            f"its padding token has the ID {tokenizer.pad_token_id}, but the model has only {known_tokens} embeddings"
        )
        raise UserError(Problem("model_name_or_path", name, remedy))
    config.pad_token_id = tokenizer.pad_token_id


def _prefixes(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{module}." for module in modules)


def _refuse_damaged(name: str, layout: Layout, new: set[str], head: tuple[str, ...]) -> None:
    """Raise UserError if the checkpoint lacks more than its head: those parts of the backbone would stay random."""
    lost = sorted(key for key in new if not key.startswith(head))
    inside = [key for key in lost if key.startswith(layout.layers)]
    if lost:
        what = f"{len(inside)} weights of its blocks" if inside else f"{len(lost)} weights outside its blocks"
        remedy = f"{what} are missing or have a different shape than in config.json, e.g. {(inside or lost)[0]}"
        raise UserError(Problem("model_name_or_path", name, remedy))


def freeze(model: nn.Module, trainable: frozenset[str]) -> None:
    """Freeze all parameters except those named in `trainable`, in place."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def check_recomputation(model: Any) -> None:
    """Raise UserError if transformers cannot recompute the model's blocks, as gradient checkpointing requires."""
    if not model.supports_gradient_checkpointing:
        remedy = f"transformers cannot recompute the blocks of {model.config.model_type}; leave it out"
        raise UserError(Problem("gradient_checkpointing", True, remedy))


def no_dropout(model: nn.Module) -> None:
    """Switch off the backbone's dropout, in place: frozen weights need no regulariser, and per-sample gradients become exact."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "layerdrop"):  # probabilities of functional dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
