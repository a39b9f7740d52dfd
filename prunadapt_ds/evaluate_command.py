"""Score a folder on a task: one of ours (compact, padded, uniform, adapter) or any stock sequence classifier.

All ranks share the rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunadapt_ds import backbone, distributed, files, formats, model_folder
from prunadapt_ds import labels as labels_of
from prunadapt_ds.batches import Rows, refuse_unknown_tokens
from prunadapt_ds.config import Config, DataOptions, parse
from prunadapt_ds.data import (
    Task,
    load_language,
    load_task,
    measures_of,
    tokenize,
    tokenize_language,
)
from prunadapt_ds.entry import guarded
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.logits import predict
from prunadapt_ds.models import modeling_prunadapt
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.models.layouts import most_tokens
from prunadapt_ds.options import Usage

OPTIONS = frozenset(
    {
        *("model_name_or_path", "trust_remote_code", "task_type", "task_name", "data_dir", "train_file"),
        *("validation_file", "max_seq_length", "max_eval_samples", "per_device_eval_batch_size", "output_dir"),
    }
)
USAGE = Usage(
    "Score a folder on a task's development set: one that a run has exported, or any stock model. One line of JSON.",
    "prunadapt evaluate --model_name_or_path outputs/exports/compact --task_name mrpc --data_dir glue_data",
    OPTIONS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Score what `argv` names; rank 0 prints the measures as one line of JSON. Returns the exit code."""
    return guarded(lambda: run(parse(argv, USAGE)))


def run(config: Config) -> dict[str, float]:
    """The task's measures and "score", on every rank. With `--output_dir` rank 0 also writes scores.json there.

    Raises UserError, on all ranks alike, for options that have no meaning here and for a folder that does not fit the task.
    """
    if foreign := sorted(config.given - OPTIONS):
        remedy = f"has no meaning when a folder is scored; taken are {', '.join(sorted(OPTIONS))}"
        raise UserError([Problem(name, "given", remedy) for name in foreign])
    distributed.init()
    if config.uses_sample and distributed.rank() == 0:
        print(
            "no task was named, so these are scores on the built-in sample; see --task_name, --train_file",
            file=sys.stderr,
        )
    is_language = config.is_language
    data = distributed.together(lambda: load_language(config.data) if is_language else load_task(config.data, 0))
    model, tokenizer = distributed.together(
        lambda: load_folder(
            config.model.model_name_or_path,
            config.model.trust_remote_code,
            task=None if is_language else data.task,
            is_language=is_language,
        )
    )
    model.to(distributed.device()).eval()
    is_given = "max_seq_length" in config.given
    longest = config.data.max_seq_length if is_given else scored_length(config.model.model_name_or_path)
    logits, labels = {}, {}
    for name, split in data.validation.items():
        tokens = (
            tokenize_language(split, tokenizer, longest)
            if is_language
            else tokenize(split, tokenizer, data.task, longest)
        )
        rows = Rows(tokens, tokenizer)
        refuse_unknown_tokens(config.model.model_name_or_path, model, rows)
        found = predict(model, rows, config.train.per_device_eval_batch_size, distributed.device())
        if not is_language:
            found = labels_of.in_order(found, backbone.class_names(model.config), data.label_names)
        logits[name] = found.numpy()
        labels[name] = rows.labels.numpy()
    measures = distributed.on_rank_0("measuring", lambda: measures_of(data, logits, labels))
    if distributed.rank() == 0:
        print(json.dumps(measures))
    if "output_dir" in config.given:
        file = Path(config.output.output_dir) / "scores.json"
        text = json.dumps(measures, indent=2) + "\n"
        distributed.on_rank_0(f"writing {file}", lambda: _write(file, text))
    return measures


def _write(file: Path, text: str) -> None:
    try:
        files.replace(file, text)
    except OSError as error:
        remedy = f"scores.json cannot be written there ({error.strerror})"
        raise UserError(Problem("output_dir", str(file.parent), remedy)) from error


def scored_length(name: str) -> int:
    """Tokens of an input where nobody says how many: as in the run whose export `name` is, of other models the default of
    training. Rank 0 looks, and says which. Collective."""

    def look() -> int:
        found = run_length(Path(name))
        why = "as in its run" if found else "nothing says what it was trained with; set it with --max_seq_length"
        print(f"{name}: at most {found or DataOptions.max_seq_length} tokens of an input ({why})", file=sys.stderr)
        return found or DataOptions.max_seq_length

    return distributed.on_rank_0(f"looking for the run of {name}", look)


def run_length(folder: Path) -> int | None:
    """`--max_seq_length` of the run that wrote RUN/exports/FORMAT; None where no run is around the folder."""
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


def load_folder(name: str, trust: bool, *, task: Task | None = None, is_language: bool = False) -> tuple[Any, Any]:
    """The model and its tokenizer; a folder of ours needs no `--trust_remote_code`, its class is the package's own.

    task: whose classes the model must answer with; None: whatever it does. Raises UserError for what is no model of that kind.
    """
    from transformers import AutoTokenizer

    num_labels = None if task is None else len(task.label_names) or 1
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
        raise _refuse(name, f"answers with {model.config.num_labels} numbers, the task {task.name} has {num_labels}")
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


def _auto_class(is_language: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if is_language else AutoModelForSequenceClassification


def _load_model(name: str, folder: Path, trust: bool, *, is_language: bool) -> Any:
    """A folder of ours by the package's own class, any other by its auto class."""
    auto_class, pruned = _auto_class(is_language), _pruned_class(folder)
    if pruned is None:
        loader, options = auto_class, {"trust_remote_code": trust}
    elif formats.auto_class_for(pruned.__name__) != auto_class.__name__:
        kinds = ("a classifier", "a language model")
        raise _refuse(
            name, f"is {kinds[not is_language]}, and {kinds[is_language]} is asked for; name a folder of that kind"
        )
    else:
        loader, options = pruned, {}
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
    if info["missing_keys"]:
        is_a = ", ".join(model.config.architectures or ["model of no named class"])
        lacks = ", ".join(sorted(info["missing_keys"])[:3])
        raise _refuse(name, f"is not trained for this: a {is_a} by its config.json, it has no {lacks}")
    return model


def _pruned_class(folder: Path) -> Any:
    """Our own class for a compact folder, None for any other."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    if "pruned_structure" not in values:
        return None
    name = str(values["architectures"][0])
    return getattr(modeling_prunadapt, f"Pruned{name.removeprefix('Pruned')}")


def _load_adapter(name: str, folder: Path, num_labels: int | None, *, is_language: bool) -> tuple[Any, Path]:
    """A base model with the adapter of `folder`, and where its tokenizer is. `num_labels`: None for as many as it has."""
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        remedy = "the adapter has no adapter_model.safetensors; pickled ones are never loaded, save it again with PEFT"
        raise _refuse(name, remedy)
    config = files.read_object(folder / "adapter_config.json", lambda remedy: _refuse(name, remedy))
    base = config["base_model_name_or_path"]
    model_folder.check(base, to_train=False)
    count = adapter_outputs(folder) if num_labels is None and not is_language else num_labels
    with backbone.quiet():
        model = _auto_class(is_language).from_pretrained(
            str(model_folder.folder_of(base)),
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **({} if count is None else {"num_labels": count}),
        )
        model = PeftModel.from_pretrained(model, str(folder))
    if not is_language:
        labels_of.read(model.config, folder)
    return model, folder if model_folder.has_tokenizer(folder) else model_folder.folder_of(base)  # PEFT saves none


def adapter_outputs(folder: Path) -> int | None:
    """How many numbers the head that an adapter's folder holds answers with: PEFT's configuration does not say."""
    from safetensors import SafetensorError, safe_open

    heads = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            head = next((name for name in file.keys() if name.endswith(heads)), None)  # noqa: SIM118
            return None if head is None else int(file.get_slice(head).get_shape()[0])
    except SafetensorError as error:
        raise ValueError(f"adapter_model.safetensors is damaged or cut short: {error}") from error
