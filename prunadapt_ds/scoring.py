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
from prunadapt_ds.config import Config, parse
from prunadapt_ds.data import (
    TaskData,
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

OPTIONS = {
    *("model_name_or_path", "trust_remote_code", "task_type", "task_name", "data_dir", "train_file", "validation_file"),
    *("max_seq_length", "max_eval_samples", "per_device_eval_batch_size", "output_dir"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Score what `argv` names; rank 0 prints the measures as one line of JSON. Returns the exit code."""
    return guarded(lambda: run(parse(argv)))


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
    model, tokenizer = distributed.together(lambda: load_folder(config.model.model_name_or_path, config, data))
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
            found = compute_metrics(data, in_order(logits, model.config.id2label, data).numpy(), rows.labels.numpy())
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


def load_folder(name: str, config: Config, data: TaskData) -> tuple[Any, Any]:
    """The model and its tokenizer; a folder of ours needs no `--trust_remote_code`, its class is the package's own."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    auto_class: Any = AutoModelForCausalLM if data.is_language else AutoModelForSequenceClassification
    source = backbone.locate(name)
    adapter = Path(source) / "adapter_config.json"
    trust = config.model.trust_remote_code
    try:
        if adapter.is_file():
            base = json.loads(adapter.read_text())["base_model_name_or_path"]
            model = _with_adapter(auto_class, base, source, {} if data.is_language else {"num_labels": data.num_labels})
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
    if not data.is_language and model.config.num_labels != data.num_labels:
        remedy = f"answers with {model.config.num_labels} numbers, the task {data.task.name} has {data.num_labels}"
        raise UserError(Problem("model_name_or_path", name, remedy))
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.is_decoder:
        backbone.agree_on_padding(name, model.config, tokenizer)
    return model, tokenizer


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


def in_order(logits: Tensor, id2label: dict[int, str], data: TaskData) -> Tensor:
    """Columns in the order of the task's labels, where the model names the same labels in another: [N, C] -> [N, C]."""
    theirs = {label: int(i) for i, label in id2label.items()}
    if data.is_regression or set(theirs) != set(data.label_names):
        return logits
    return logits[:, [theirs[label] for label in data.label_names]]
