"""The model card of an exported folder: metadata for the hub, how to load and serve the model, its limits and results."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from prunadapt_ds import hub, model_folder
from prunadapt_ds.data import GLUE, HUB_DATASET, Task
from prunadapt_ds.models import auto_classes
from prunadapt_ds.report import markdown

SAMPLE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # the model whose weights the sample extra contains
STATED = ("license", "license_name", "license_link", "language", "base_model")
TAGS = {"prunadapt": ["pruning", "lora"], "tmp": ["pruning", "lora"], "lora": ["lora"], "full": []}
HUB_METRICS = {"macro_f1": "f1"}  # our name -> the hub's, where they differ


def stated(model_name_or_path: str) -> dict[str, Any]:
    """The `STATED` fields of the base model's card, from its folder, the hub cache or the hub.

    Returns {} if there is no readable card. Takes at most the time of one request to the hub (hub.py).
    """
    from huggingface_hub import constants, try_to_load_from_cache

    source = model_folder.locate(model_name_or_path)
    if Path(source).is_dir():
        path: Any = Path(source) / "README.md"
    else:
        repository, revision = hub.split(source)
        path = try_to_load_from_cache(repository, "README.md", revision=revision)
    values: dict[str, Any] = {}
    if isinstance(path, str | Path) and Path(path).is_file():
        values = model_folder.card_metadata(Path(path))
    elif not Path(source).is_dir() and not constants.HF_HUB_OFFLINE:
        found: list[Any] = []
        hub.unreachable(
            lambda api, timeout: found.append(api.model_info(repository, revision=revision, timeout=timeout).card_data)
        )
        values = found[0].to_dict() if found and found[0] is not None else {}
    return {name: values[name] for name in STATED if _is_text(values.get(name))}


def _is_text(value: Any) -> bool:
    """Whether `value` is a non-blank string or a list of them, as the hub requires for all of `STATED`."""
    items = value if isinstance(value, list) and value else [value]
    return all(isinstance(item, str) and item.strip() for item in items)


def metadata(report: dict[str, Any], model: str, task: Task, base: dict[str, Any]) -> Any:
    """The card's `ModelCardData`, without any path of this machine. `base`: what the base model's card states."""
    from huggingface_hub import EvalResult, ModelCardData

    is_glue = task.name in GLUE
    is_local = Path(model).exists()
    exported = {name: value for name, value in (report["metric"]["exported"] or {}).items() if name != "score"}
    splits = {split.key: split.hub for split in task.validation_splits}
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=HUB_DATASET,
            dataset_name="GLUE",
            dataset_config=task.name,
            dataset_split=splits[name.rpartition("/")[0] or "validation"],
            metric_type=name.rpartition("/")[2],
            metric_name=name,
            metric_value=value,
        )
        for name, value in exported.items()
        if is_glue and value is not None
    ]
    name = f"{task.name}-{report['method']}"
    own = SAMPLE_MODEL if model == "sample" else None if is_local else hub.split(model)[0]
    inputs: dict[str, Any] = (
        {} if task.is_language else {model_folder.INPUTS: "text_pair" if task.sentence2 else "text"}
    )
    licence = {key: base[key] for key in ("license", "license_name", "license_link") if key in base}
    return ModelCardData(
        language="en" if is_glue or task.name == "sample" else base.get("language"),
        library_name="transformers",
        pipeline_tag=pipeline_of(report),
        tags=[*TAGS[report["method"]], "prunadapt-ds"],
        base_model=own or base.get("base_model"),
        datasets=[HUB_DATASET] if is_glue else None,
        metrics=list(dict.fromkeys(HUB_METRICS.get(m, m) for m in task.metrics)),
        model_name=name if results else None,
        eval_results=results or None,
        **licence,
        **inputs,
    )


def pipeline_of(report: dict[str, Any]) -> str:
    return "text-generation" if report["task"] == "causal_lm" else "text-classification"


def render(report: dict[str, Any], model: str, task: Task, kind: str, base: dict[str, Any] | None = None) -> str:
    """The README.md for the export `kind` of a run. `model`: the option that named it; `base`: what `stated` returned."""
    base = base or {}
    data = metadata(report, model, task, base)
    if kind == "adapter":
        data.library_name, data.base_model_relation = "peft", "adapter"
    # A path on the training machine means nothing to a reader and may be private.
    public = {**report, "model": data.base_model if model == "sample" else model, "command": None}
    if Path(model).exists():
        public["model"] = "a local checkpoint"
    text = _adapter_text(public, task, data.base_model, base) if kind == "adapter" else _text(public, task, kind, base)
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n#{markdown(public)}"


def remade(compact: str, kind: str) -> str:
    """Turn a compact folder's card into that of the export `kind` made from it. Leaves cards that are not ours as they are."""
    before, heading, rest = compact.partition(_LOAD)
    section, limits, after = rest.partition(_LIMITS)
    if not limits:  # somebody else's card
        return compact
    if kind in _GRAPHS:
        library, example = _GRAPHS[kind]
        texts = '["first sentence"], ["second sentence"]' if "text_pair" in section else '["a sentence"]'
        before = before.replace("library_name: transformers", f"library_name: {library}", 1)
        section = f"{example.replace('TEXTS', texts)}\n{_WHY[kind]}\n"
    else:
        section = section.replace(", trust_remote_code=True", "")
        for why in (_WHY["compact"], _WHY["whole"]):
            section = section.replace(why, _WHY[kind])
    return before + heading + section + limits + after


def _text(report: dict[str, Any], task: Task, kind: str, base: dict[str, Any]) -> str:
    remote = report["exports"][kind]["needs_remote_code"]
    argument = ", trust_remote_code=True" if remote else ""
    pipeline = pipeline_of(report)
    labels = ", ".join(task.label_names) if task.label_names else "one number (regression)"
    pair = '{"text": "first sentence", "text_pair": "second sentence"}'
    is_language = pipeline == "text-generation"
    what, example = (
        ("A language model", '"once upon a time"')
        if is_language
        else (f"A text classifier ({labels})", pair if task.sentence2 else '"a sentence"')
    )
    return f"""# {task.name}-{report["method"]}

{what} trained with prunadapt_ds: {_how(report)}
{_LOAD}
```python
from transformers import pipeline

run = pipeline("{pipeline}", model="PATH"{argument})
run({example})
run([{example}] * 100, batch_size=32)  # many inputs in batches
```

or `{auto_classes.name_of(is_language)}.from_pretrained("PATH"{argument})`. {_WHY[kind if remote or kind != "compact" else "whole"]}
{_SHELL if pipeline == "text-classification" else ""}{_limits(report, base)}"""


def _adapter_text(report: dict[str, Any], task: Task, base_model: Any, base: dict[str, Any]) -> str:
    """The text of the card of an adapter, whose folder contains no base model."""
    is_language = pipeline_of(report) == "text-generation"
    auto_class = auto_classes.name_of(is_language)
    name = base_model if isinstance(base_model, str) else "BASE"
    _, revision = hub.split(report["model"])
    arguments = [f'"{name}"', *([f'revision="{revision}"'] if revision else [])]
    if not is_language:
        classes = ", ".join(f"{i}: {json.dumps(label, ensure_ascii=False)}" for i, label in enumerate(task.label_names))
        arguments += [f"id2label={{{classes}}}" if classes else "num_labels=1", "pad_token_id=tokenizer.pad_token_id"]
    where = "" if isinstance(base_model, str) else " BASE is the model it was trained on."
    merged = "The results below were measured after `model.merge_and_unload()`, which gives the same answers faster."
    head = f" and classifier ({', '.join(task.label_names)})" if task.label_names else ""
    shell = _SHELL.replace("--input_file", f"--label_names {shlex.join(task.label_names)} --input_file")
    return f"""# {task.name}-{report["method"]}

A LoRA adapter{head} trained with prunadapt_ds. The base model, {report["model"]}, stayed frozen and is not part
of this folder.
{_LOAD}
```python
from peft import PeftModel
from transformers import AutoTokenizer, {auto_class}

tokenizer = AutoTokenizer.from_pretrained("PATH")
base = {auto_class}.from_pretrained({", ".join(arguments)})
model = PeftModel.from_pretrained(base, "PATH").eval()
```

PATH is this folder.{where} {merged}
{shell if task.label_names else ""}{_limits(report, base)}"""


def _limits(report: dict[str, Any], base: dict[str, Any]) -> str:
    return f"""{_LIMITS}
- The model is made for this one task and for inputs like its training data. It inherits the biases of its base model.
{_length(report)}- The results below are from one run, on the development set; no test set was used.
- {_licence(base)}
"""


def _how(report: dict[str, Any]) -> str:
    model = report["model"]
    if report["method"] == "full":
        return f"all weights of {model} were trained, and none was removed."
    if report["method"] == "lora":
        return f"{model} stayed frozen and was adapted with LoRA, which is merged into its weights; none was removed."
    return (
        f"{model} stayed frozen and was adapted with LoRA, while heads and neurons that the task does not need were removed. "
        "LoRA and gates are merged into the weights."
    )


_LOAD, _LIMITS = "\n## Load and serve\n", "\n## Limits\n"
_WHY = {
    "compact": "Layers differ in their numbers of heads and neurons, which the stock configuration cannot represent, so the folder "
    "carries its own small modelling file, which depends only on torch and transformers. Read it before you trust it. Servers and "
    "converters with their own implementation of this architecture do not support such layers.",
    "whole": "Nothing was cut, so the stock class loads it.",
    "uniform": "All remaining layers have the same numbers of heads and neurons, so the stock class loads it, as does any other "
    "software that supports the architecture.",
    "padded": "The weights of removed heads and neurons are zeros in matrices of the original shape. The stock class loads it, and "
    "it is neither smaller nor faster than the base model.",
    "onnx": "The graph takes any batch size and sequence length, in float32; pad inputs on the right. For a language model it "
    "returns the logits of all tokens and uses no cache.",
    "torch_export": "The graph takes any batch size and sequence length, in float32; pad inputs on the right. For a language model "
    "it returns the logits of all tokens and uses no cache. `torch.export.load` unpickles a part of the file: load it only if you "
    "trust its author.",
}
_TOKENS = """
```python
{imports}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer(TEXTS, padding=True, return_tensors="{tensors}")
{run}
```
"""
# (library name on the hub, example code)
_GRAPHS = {
    "onnx": (
        "onnx",
        _TOKENS.format(
            imports="import onnxruntime",
            tensors="np",
            run="""session = onnxruntime.InferenceSession("PATH/model.onnx")
given = {i.name: inputs[i.name].astype("int64") for i in session.get_inputs()}
logits = session.run(["logits"], given)[0]""",
        ),
    ),
    "torch_export": (
        "pytorch",
        _TOKENS.format(
            imports="import torch",
            tensors="pt",
            run="""run = torch.export.load("PATH/model.pt2").module()
logits = run(**inputs)""",
        ),
    ),
}
_SHELL = """
To classify a file of texts, with prunadapt_ds installed: `prunadapt predict --model_name_or_path PATH --input_file new.csv
--output_file answers.csv`.
"""


def _length(report: dict[str, Any]) -> str:
    longest = report["macs"]["seq_length"]
    return "" if longest is None else f"- It was trained on inputs of at most {longest} tokens.\n"


def _licence(base: dict[str, Any]) -> str:
    if "license" not in base:
        return (
            "No licence is stated, because no card of the base model was available. Check its licence before you "
            "share this model."
        )
    words = base["license"] if isinstance(base["license"], str) else ", ".join(base["license"])
    return f"The licence ({base.get('license_name', words)}) is the base model's; it does not cover the training data."
