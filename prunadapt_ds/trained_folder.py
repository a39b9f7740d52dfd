"""Load a trained folder to score it or to predict with it: one of ours (compact, padded, uniform, adapter) or a stock model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from prunadapt_ds import backbone, distributed, files, model_folder
from prunadapt_ds import labels as labels_of
from prunadapt_ds.adapters import PREFIX
from prunadapt_ds.config import DataOptions
from prunadapt_ds.data import Task
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.models import auto_classes, modeling_prunadapt
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.models.layouts import most_tokens
from prunadapt_ds.weight_files import shapes

LANGUAGE_MODEL = "is a language model, but a classifier is needed; `evaluate` scores it with --task_type causal_lm"


def load_folder(name: str, trust: bool, *, task: Task | None = None, is_language: bool = False) -> tuple[Any, Any]:
    """Load a model and its tokenizer. A folder of ours needs no `--trust_remote_code`: its class is the package's own.

    task: the task whose classes the model must have; None: any. Raises UserError if the folder is not such a model.
    """
    from transformers import AutoTokenizer

    num_labels = None if task is None else task.num_labels
    model_folder.check(name, to_train=False, or_adapter=True)
    if trust:
        model_folder.say_remote_code(name)
    folder = model_folder.folder_of(name)
    with backbone.refusals(name):
        if (folder / "adapter_config.json").is_file():
            model, with_tokenizer = _load_adapter(name, folder, num_labels, is_language=is_language)
        else:
            model, with_tokenizer = _load_model(name, folder, trust, is_language=is_language), folder
        tokenizer = AutoTokenizer.from_pretrained(str(with_tokenizer), trust_remote_code=trust)
    if (most := most_tokens(model)) is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    if task is not None and model.config.num_labels != num_labels:
        raise _refuse(name, f"has {model.config.num_labels} outputs, the task {task.name} needs {num_labels}")
    doubt = "" if task is None else labels_of.doubt(backbone.class_names(model.config), task.label_names)
    if doubt and distributed.rank() == 0:
        print(f"{name}: {doubt}", file=sys.stderr)
    family = FAMILIES.get(model.config.model_type)
    is_decoder = is_language if family is None else family.is_decoder
    if is_decoder or tokenizer.pad_token_id is None:
        backbone.agree_on_padding(name, model.config, tokenizer)
    return model, tokenizer


def _refuse(name: str, remedy: str) -> UserError:
    return UserError(Problem("model_name_or_path", name, remedy))


def _load_model(name: str, folder: Path, trust: bool, *, is_language: bool) -> Any:
    """Load a pruned folder of ours with the package's own class, any other with its auto class."""
    pruned = _pruned_class(folder)
    if pruned is None:
        loader, options = auto_classes.auto_class(is_language), {"trust_remote_code": trust}
    elif auto_classes.name_for(pruned.__name__) != auto_classes.name_of(is_language):
        if not is_language:
            raise _refuse(name, LANGUAGE_MODEL)
        raise _refuse(name, "is a classifier, but a language model is needed; name a folder of that kind")
    else:
        loader, options = pruned, {}
        # `save_pretrained` then writes its code as well.
        pruned.register_for_auto_class(auto_classes.name_of(is_language))
    with backbone.quiet():
        model, info = loader.from_pretrained(
            str(folder),
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    if info["mismatched_keys"]:
        key = min(str(key[0]) for key in info["mismatched_keys"])
        raise _refuse(name, f"its weights have other shapes than config.json says, e.g. {key}")
    _refuse_untrained(name, model, set(info["missing_keys"]), is_language=is_language)
    return model


def _refuse_untrained(name: str, model: Any, new: set[str], *, is_language: bool) -> None:
    """Raise UserError if the model has parameters, `new`, that no file gave: they are random."""
    if not new:
        return
    is_a = ", ".join(model.config.architectures or ["model of no named class"])
    if not is_language and auto_classes.name_for(is_a) == auto_classes.LANGUAGE_MODEL:
        raise _refuse(name, LANGUAGE_MODEL)
    lacks = ", ".join(sorted(new)[:3])
    raise _refuse(name, f"is not trained for this: a {is_a} by its config.json, it has no {lacks}")


def _pruned_class(folder: Path) -> Any:
    """Our own class for a compact folder, None for any other."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    if "pruned_structure" not in values:
        return None
    name = str(values["architectures"][0])
    return getattr(modeling_prunadapt, f"Pruned{name.removeprefix('Pruned')}")


def _load_adapter(name: str, folder: Path, num_labels: int | None, *, is_language: bool) -> tuple[Any, Path]:
    """Load a base model with the adapter in `folder`; returns it and the folder of its tokenizer.

    `num_labels`: None for as many as the adapter's head has.
    """
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        remedy = "the adapter has no adapter_model.safetensors; pickled ones are never loaded, save it again with PEFT"
        raise _refuse(name, remedy)
    config = files.read_object(folder / "adapter_config.json", lambda remedy: _refuse(name, remedy))
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise _refuse(name, "its adapter_config.json names no model; set base_model_name_or_path to the adapter's base")
    if config.get("revision") and not Path(base).is_dir():
        base = f"{base}@{config['revision']}"
    try:
        model_folder.check(base, to_train=False)
    except UserError as error:
        remedy = f"its base model {base}: {error.problems[0].remedy}; base_model_name_or_path in adapter_config.json names it"
        raise _refuse(name, remedy) from error
    count = adapter_outputs(folder) if num_labels is None and not is_language else num_labels
    with backbone.quiet():
        model, info = auto_classes.auto_class(is_language).from_pretrained(
            str(model_folder.folder_of(base)),
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **({} if count is None else {"num_labels": count}),
        )
        new = {*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])}
        _refuse_untrained(name, model, new - saved_whole(folder), is_language=is_language)
        model = PeftModel.from_pretrained(model, str(folder))
    if not is_language:
        labels_of.read(model.config, folder)
    return model, folder if model_folder.has_tokenizer(folder) else model_folder.folder_of(base)  # PEFT saves none


def adapter_outputs(folder: Path) -> int | None:
    """The number of outputs of the head in an adapter's folder, which PEFT's configuration does not state; None without a head."""
    names = {family.task_head[-1] for family in FAMILIES.values()}
    heads = tuple(f".{name}{inner}.weight" for name in names for inner in ("", ".out_proj"))
    return next((shape[0] for name, shape in _stored(folder).items() if f".{name}".endswith(heads)), None)


def saved_whole(folder: Path) -> set[str]:
    """The model's names of what an adapter's folder holds: of parameters that were saved whole, such as a head's."""
    return set(_stored(folder))


def _stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in an adapter's folder, by the model's names. Raises ValueError if the file is damaged."""
    from safetensors import SafetensorError

    try:
        return {key.removeprefix(PREFIX): shape for key, shape in shapes(folder / "adapter_model.safetensors").items()}
    except SafetensorError as error:
        raise ValueError(f"adapter_model.safetensors is damaged or cut short: {error}") from error


def scored_length(name: str) -> int:
    """The maximum number of tokens per input if none is given: that of the run that exported `name`, or training's default.

    Rank 0 looks, and prints which. Collective.
    """

    def look() -> int:
        found = run_length(Path(name))
        why = "as in its run" if found else "nothing says what it was trained with; set it with --max_seq_length"
        print(f"{name}: at most {found or DataOptions.max_seq_length} tokens of an input ({why})", file=sys.stderr)
        return found or DataOptions.max_seq_length

    return distributed.on_rank_0(f"looking for the run of {name}", look)


def run_length(folder: Path) -> int | None:
    """`--max_seq_length` of the run that wrote RUN/exports/FORMAT; None if the folder is not inside a run's."""
    folder = folder.resolve()
    if folder.parent.name != "exports":
        return None
    for file, keys in (("run.json", ["max_seq_length"]), ("report.json", ["macs", "seq_length"])):
        try:
            found = json.loads((folder.parent.parent / file).read_text(encoding="utf-8"))
            for key in keys:
                found = found[key]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if type(found) is int and found > 0:
            return found
    return None


OTHER_INPUTS = {
    "text": "was trained on single texts, but these rows have a sentence2; drop that column, or name a model of pairs",
    "text_pair": "was trained on pairs of texts, but these rows have no sentence2; add it, or name a model of single texts",
}


def refuse_other_inputs(name: str, has_pairs: bool) -> None:
    """Raise UserError if the model was trained on pairs of texts and the rows have single ones, or the reverse. Collective."""

    def stated() -> str:
        return str(model_folder.card_metadata(model_folder.folder_of(name) / "README.md").get(model_folder.INPUTS))

    inputs = distributed.on_rank_0(f"reading the card of {name}", stated)  # "None" in somebody else's
    if inputs in OTHER_INPUTS and inputs != ("text_pair" if has_pairs else "text"):
        raise _refuse(name, OTHER_INPUTS[inputs])
