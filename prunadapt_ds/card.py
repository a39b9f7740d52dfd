"""The model card of an exported folder, in the hub's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunadapt_ds.report import markdown

_TASKS_OF_GLUE = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}


def render(report: dict[str, Any], base_model: str, label_names: tuple[str, ...], kind: str) -> str:
    """README.md of an export: a metadata block that the hub reads, how to load it, the run's figures."""
    from huggingface_hub import EvalResult, ModelCardData

    glue = report["task"] in _TASKS_OF_GLUE
    task = "text-generation" if report["task"] == "causal_lm" else "text-classification"
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="nyu-mll/glue",
            dataset_name="GLUE",
            dataset_config=report["task"],
            metric_type=name.split("/")[-1],
            metric_name=name,
            metric_value=value,
        )
        for name, value in (report["metric"]["exported"] or {}).items()
        if glue and name != "score"
    ]
    # A folder of the machine it was trained on means nothing to a reader, and its name may be private.
    report = {**report, "model": base_model if not Path(base_model).exists() else "a local checkpoint"}
    on_hub = not Path(base_model).exists() and base_model != "sample"
    name = f"{report['task']}-{report['method']}"
    data = ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag=task,
        tags=["pruning", "lora", "prunadapt-ds"],
        base_model=base_model if on_hub else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    remote = report["exports"][kind]["needs_remote_code"]
    argument = ", trust_remote_code=True" if remote else ""
    why = (
        "\n\nLayers differ in their numbers of heads and neurons, which the stock configuration cannot say, so the folder "
        "carries its own small modelling file (it needs transformers only)."
        if remote
        else "\n\nNothing was cut, so the stock class loads it."
    )
    labels = ", ".join(label_names) if label_names else "one number (regression)"
    what, use, auto_class = (
        ("A language model", 'run("once upon a time")', "AutoModelForCausalLM")
        if task == "text-generation"
        else (
            f"A text classifier ({labels})",
            'run({"text": "first sentence", "text_pair": "second sentence"})',
            "AutoModelForSequenceClassification",
        )
    )
    body = f"""# {name}

{what} trained with prunadapt_ds: the backbone stays frozen, LoRA adapts it, and what the task does not need is removed.
LoRA and gates are merged into the weights.

```python
from transformers import pipeline

run = pipeline("{task}", model="PATH"{argument})
{use}
```

or `{auto_class}.from_pretrained("PATH"{argument})`.{why}

Limits: it does this one task, on inputs like those it was trained on, and it inherits the biases of its base model.

"""
    return f"---\n{data.to_yaml()}\n---\n\n{body}#{markdown(report)}"
