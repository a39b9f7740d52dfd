"""Score a folder on a task: one of ours (compact, padded, uniform, adapter) or any stock sequence classifier.

All ranks share the rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunadapt_ds import backbone, distributed
from prunadapt_ds.batches import Rows
from prunadapt_ds.config import Config, Usage, parse
from prunadapt_ds.data import (
    compute_metrics,
    compute_perplexity,
    load_language,
    load_task,
    tokenize,
    tokenize_language,
)
from prunadapt_ds.entry import guarded
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.evaluate import predict
from prunadapt_ds.models import modeling_prunadapt
from prunadapt_ds.models.families import FAMILIES

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
    is_language = config.data.task_type == "causal_lm"
    data = distributed.together(lambda: load_language(config.data) if is_language else load_task(config.data, 0))
    model, tokenizer = distributed.together(
        lambda: load_folder(
            config.model.model_name_or_path,
            config.model.trust_remote_code,
            num_labels=None if is_language else data.num_labels,
            is_language=is_language,
            task_name=data.task.name,
        )
    )
    model.to(distributed.device()).eval()
    measures: dict[str, float] = {}
    for name, split in data.validation.items():
        longest = config.data.max_seq_length
        tokens = (
            tokenize_language(split, tokenizer, longest)
            if is_language
            else tokenize(split, tokenizer, data.task, longest)
        )
        rows = Rows(tokens, tokenizer)
        logits = predict(model, rows, config.train.per_device_eval_batch_size, distributed.device())
        if is_language:
            found = compute_perplexity(logits.numpy())
        else:
            found = compute_metrics(
                data, in_order(logits, model.config.id2label, data.label_names).numpy(), rows.labels.numpy()
            )
        prefix = f"{name}/" if len(data.validation) > 1 else ""
        measures |= {prefix + key: value for key, value in found.items() if key != "score"}
    measures["score"] = sum(measures.values()) / len(measures)
    if distributed.rank() == 0:
        print(json.dumps(measures))
        if "output_dir" in config.given:
            folder = Path(config.output.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "scores.json").write_text(json.dumps(measures, indent=2) + "\n")
    return measures


def load_folder(
    name: str, trust: bool, *, num_labels: int | None = None, is_language: bool = False, task_name: str = "this"
) -> tuple[Any, Any]:
    """The model and its tokenizer; a folder of ours needs no `--trust_remote_code`, its class is the package's own.

    num_labels: how many numbers the model must answer with; None: however many it does. Raises UserError for what is no model
    of that kind.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto_class: Any = AutoModelForCausalLM if is_language else AutoModelForSequenceClassification
    source = backbone.locate(name)
    adapter = Path(source) / "adapter_config.json"
    try:
        if adapter.is_file():
            base = json.loads(adapter.read_text())["base_model_name_or_path"]
            count = num_labels if is_language or num_labels is not None else adapter_outputs(adapter.parent)
            model = _with_adapter(auto_class, base, source, {} if count is None else {"num_labels": count})
        else:
            pruned = _pruned_class(source)
            if pruned is None:
                loader, options = auto_class, {"trust_remote_code": trust}
            else:
                loader, options = pruned, {}
            model, info = loader.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
            if info["missing_keys"]:
                some = ", ".join(sorted(info["missing_keys"])[:3])
                raise UserError(Problem("model_name_or_path", name, f"is not trained for this: it has no {some}"))
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(Problem("model_name_or_path", name, f"cannot be loaded: {reason}")) from error
    if num_labels is not None and model.config.num_labels != num_labels:
        remedy = f"answers with {model.config.num_labels} numbers, the task {task_name} has {num_labels}"
        raise UserError(Problem("model_name_or_path", name, remedy))
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.is_decoder:
        backbone.agree_on_padding(name, model.config, tokenizer)
    return model, tokenizer


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


def _pruned_class(folder: str) -> Any:
    """Our own class for a compact folder, None for any other."""
    path = Path(folder) / "config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    return getattr(modeling_prunadapt, values["architectures"][0]) if "pruned_structure" in values else None


def _with_adapter(auto_class: Any, base: str, folder: str, numbers: dict[str, int]) -> Any:
    from peft import PeftModel

    model = auto_class.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True, **numbers
    )
    return PeftModel.from_pretrained(model, folder)


def in_order(logits: Tensor, id2label: dict[int, str], label_names: Sequence[str]) -> Tensor:
    """Columns in the order of `label_names`, where the model names the same labels in another: [N, C] -> [N, C]."""
    theirs = {label: int(i) for i, label in id2label.items()}
    if not label_names or set(theirs) != set(label_names):
        return logits
    return logits[:, [theirs[label] for label in label_names]]
