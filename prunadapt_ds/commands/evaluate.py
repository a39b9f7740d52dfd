"""Score a folder on a task: one of ours (compact, padded, uniform, adapter) or any stock model.

The ranks share the rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from prunadapt_ds import backbone, distributed, files
from prunadapt_ds import labels as labels_of
from prunadapt_ds.batches import Rows, refuse_unknown_tokens
from prunadapt_ds.config import Config, parse
from prunadapt_ds.data import (
    Task,
    load_validation,
    measures_of,
    tokenize,
    tokenize_language,
)
from prunadapt_ds.entry import guarded
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.logits import predict
from prunadapt_ds.options import Usage
from prunadapt_ds.trained_folder import load_folder, refuse_other_inputs, scored_length

OPTIONS = frozenset(
    {
        *("model_name_or_path", "trust_remote_code", "task_type", "task_name", "data_dir", "train_file"),
        *(
            "validation_file",
            "problem_type",
            "max_seq_length",
            "max_eval_samples",
            "per_device_eval_batch_size",
            "output_dir",
        ),
    }
)
USAGE = Usage(
    "Score an exported folder, or any stock model, on a task's development set or on a file with labels. Prints one line of JSON.",
    "prunadapt evaluate --model_name_or_path outputs/exports/compact --task_name mrpc --data_dir glue_data",
    OPTIONS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Score what `argv` names; rank 0 prints the measures as one line of JSON. Returns the exit code."""
    return guarded(lambda: run(parse(argv, USAGE, trains=False)))


def run(config: Config) -> dict[str, float]:
    """The task's measures and "score", on every rank. With `--output_dir` rank 0 also writes scores.json there.

    Raises UserError, on all ranks alike, for options that have no meaning here and for a folder that does not fit the task.
    """
    if foreign := sorted(config.given - OPTIONS):
        remedy = f"has no meaning when a folder is scored; accepted are {', '.join(sorted(OPTIONS))}"
        raise UserError([Problem(name, "given", remedy) for name in foreign])
    distributed.init()
    if config.uses_sample and distributed.rank() == 0:
        print(
            "no task was named, so these are scores on the built-in sample; see --task_name, --validation_file",
            file=sys.stderr,
        )
    is_language = config.is_language
    by_model = bool(config.data.validation_file) and not config.data.train_file and not is_language
    task: Task | None = None
    if not by_model:
        task, sets = distributed.together(lambda: load_validation(config.data, None))
    model, tokenizer = distributed.together(
        lambda: load_folder(
            config.model.model_name_or_path,
            config.model.trust_remote_code,
            task=None if is_language else task,
            is_language=is_language,
        )
    )
    if task is None:  # the model's outputs say which classes the file's labels name
        task, sets = distributed.together(lambda: load_validation(config.data, labels_of.of_outputs(model.config)))
    if not is_language:
        refuse_other_inputs(config.model.model_name_or_path, has_pairs=task.sentence2 is not None)
    model.to(distributed.device()).eval()
    is_given = "max_seq_length" in config.given
    longest = config.data.max_seq_length if is_given else scored_length(config.model.model_name_or_path)
    logits, labels = {}, {}
    for name, split in sets.items():
        tokens = tokenize_language(split, tokenizer, longest) if is_language else tokenize(split, tokenizer, longest)
        rows = Rows(tokens, tokenizer)
        refuse_unknown_tokens(config.model.model_name_or_path, model, rows)
        found = predict(model, rows, config.eval_batch_size(), distributed.device())
        if not is_language:
            found = labels_of.in_order(found, backbone.class_names(model.config), task.label_names)
        logits[name] = found.numpy()
        labels[name] = rows.labels.numpy()
    measures = distributed.on_rank_0("measuring", lambda: measures_of(task, logits, labels))
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
