"""Options: dataclasses, a yaml file, the command line; every problem reported at once.

Names are Hugging Face's where Hugging Face has one. `parse` imports neither torch nor DeepSpeed, so that `--help` and
mistakes answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os.path
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunadapt_ds.errors import Problem, UserError

METHODS = ("prunadapt", "tmp", "lora", "full")
BUDGETS = ("params", "macs")
CRITERION_NAMES = ("fisher", "taylor", "outlier", "activation_norm", "magnitude", "random")
TASK_TYPES = ("sequence_classification", "causal_lm")
TASK_NAMES = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "sample")
EXPORT_FORMATS = ("compact", "padded", "uniform", "adapter")
EXPORT_DTYPES = ("float32", "bfloat16", "float16")
SHRINKING = ("auto", "always", "never")
LR_SCHEDULES = ("linear", "warmup_stable_decay")
DEFAULT_SPARSITY = 0.5
MOST = 2**31 - 1  # of whole numbers without a limit of their own: torch and DeepSpeed count in fixed widths


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field with its help text and the values it takes: [least, most], (above, below), or `choices`."""
    limits = {"least": least, "most": most, "above": above, "below": below, "choices": tuple(choices)}
    return field(default=default, metadata={"help": text, **limits})


@dataclass
class ModelOptions:
    """Backbone."""

    model_name_or_path: str = option("sample", "hub id, local folder, or `sample`: the encoder of the sample extra")
    trust_remote_code: bool = option(False, "run modelling code that comes with the model")


@dataclass
class DataOptions:
    """Task and data."""

    task_type: str = option(
        "sequence_classification",
        "what is learnt: labels, or text (causal_lm: a .txt file, or columns prompt and response, or text)",
        choices=TASK_TYPES,
    )
    task_name: str | None = option(None, "GLUE task, or the built-in `sample`", choices=TASK_NAMES)
    data_dir: str | None = option(None, "official GLUE TSVs, one folder per task, instead of the hub")
    train_file: str | None = option(None, "own training data: csv, tsv, jsonl, parquet; sentence1[, sentence2], label")
    validation_file: str | None = option(None, "own development data, same columns")
    test_file: str | None = option(None, "not available yet")
    max_seq_length: int = option(128, "tokens; longer inputs are truncated", least=4)
    max_train_samples: int | None = option(None, "train on that many examples only, chosen by the seed", least=1)
    max_eval_samples: int | None = option(None, "evaluate on the first that many examples of each set", least=1)


@dataclass
class PruningOptions:
    """Method and pruning."""

    method: str = option("prunadapt", "what is trained and cut", choices=METHODS)
    target_sparsity: float | None = option(None, "share of the blocks to cut (0.5)", least=0, below=1)
    budget: str = option("params", "what sparsity counts", choices=BUDGETS)
    criterion: str = option("fisher", "how importance is scored", choices=CRITERION_NAMES)
    prune_start: float = option(0.25, "pruning begins; fraction of all steps", least=0, below=1)
    prune_end: float = option(0.6, "pruning ends; fraction of all steps", above=0, most=1)
    num_decisions: int = option(8, "decisions between start and end", least=1)
    shrink: str = option(
        "auto",
        "when the model physically shrinks: where a rebuild pays, at every decision, at the end",
        choices=SHRINKING,
    )
    score_ema: float = option(
        0.5, "decay of the moving average of scores over decisions; 0: newest only", least=0, below=1
    )
    gate_learning_rate: float = option(1e-2, "peak learning rate of the gates", above=0)
    distill_weight: float = option(0.5, "weight of the run's own dense model as teacher; 0: off", least=0, most=1)
    teacher_window: float = option(
        0.6, "the teacher's weights are a mean over that share of the steps before it; 0: as they are", least=0, most=1
    )
    distill_fades: bool = option(True, "the teacher counts less and less after the first decision, nothing at the end")
    neuron_multiple: int = option(8, "feed-forward neurons are cut in groups, kept counts are multiples", least=1)
    uniform: bool = option(False, "all layers keep the same counts, so that stock classes load what is left")
    keep_in_outer_layers: float = option(
        0.0, "share of the heads and of the neurons that stay in the first and the last layer", least=0, most=1
    )
    tmp_scoring_examples: int = option(64, "examples that rank heads with --method tmp", least=1)
    save_scores: bool = option(False, "write raw statistics of every decision to scores/")
    score_only: bool = option(False, "write the statistics at the initial weights and stop")


@dataclass
class LoraOptions:
    """Adapters."""

    r: int = option(8, "LoRA rank", least=1)
    lora_alpha: float = option(16, "LoRA scale; updates are multiplied by lora_alpha / r", above=0)
    lora_dropout: float = option(0.0, "dropout before LoRA; probability", least=0, below=1)
    train_norms: bool | None = option(None, "train the norms as well (with the methods that cut)")
    target_modules: list[str] | None = option(None, "names of the projections that get LoRA (all of them)")


@dataclass
class TrainOptions:
    """Training."""

    ds_config: str = option("ds_configs/zero3.json", "DeepSpeed configuration (JSON)")
    per_device_train_batch_size: int = option(32, "samples per rank and micro-batch", least=1)
    per_device_eval_batch_size: int = option(64, "samples per rank in evaluation", least=1)
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer step", least=1)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass; saves memory")
    learning_rate: float | None = option(
        None,
        "peak learning rate of adapters and head (0.77 / hidden size, at most 2e-3; --method full a tenth)",
        above=0,
    )
    weight_decay: float = option(0.01, "AdamW's; not on biases, norms, gates", least=0)
    warmup_ratio: float = option(0.06, "fraction of all steps with rising learning rate", least=0, below=1)
    lr_scheduler_type: str = option(
        "linear",
        "linear decay after the warm-up, or (warmup_stable_decay) only once pruning has ended",
        choices=LR_SCHEDULES,
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: off", least=0)
    num_train_epochs: float = option(3.0, "passes over the training data", above=0)
    max_steps: int = option(-1, "optimizer steps instead of epochs; -1: by epochs", least=-1)
    eval_steps: int | None = option(None, "also evaluate every that many steps", least=1)
    logging_steps: int = option(10, "steps between two lines of metrics", least=1)
    group_by_length: bool = option(True, "samples of like length share a step; saves padding")
    dropout: bool = option(False, "keep the dropout that the backbone was pretrained with")
    seed: int = option(0, "of initialisation, order and dropout", least=0)


@dataclass
class OutputOptions:
    """Output."""

    output_dir: str = option("outputs", "folder for everything the run leaves behind")
    export_formats: list[str] | None = option(
        None,
        "folders to write beside `compact`: stock shapes with zeros, a stock configuration (with --uniform: always), "
        "a PEFT adapter (with --method lora)",
        choices=EXPORT_FORMATS,
    )
    export_dtype: str = option("float32", "dtype of the exported weights", choices=EXPORT_DTYPES)
    checkpoint_steps: int | None = option(
        None, "steps between two checkpoints; default: by the clock, at a hundredth of the run's time", least=1
    )
    save_total_limit: int = option(2, "checkpoints that are kept, the newest ones", least=1)
    resume: str = option(
        "auto", "auto: go on from the newest intact checkpoint; never: start over; or a checkpoint's folder"
    )


SECTIONS = {
    "model": ModelOptions,
    "data": DataOptions,
    "prune": PruningOptions,
    "lora": LoraOptions,
    "train": TrainOptions,
    "output": OutputOptions,
}


@dataclass
class Config:
    """Everything a run was asked for. `given` names the options that were set by the user."""

    model: ModelOptions
    data: DataOptions
    prune: PruningOptions
    lora: LoraOptions
    train: TrainOptions
    output: OutputOptions
    given: frozenset[str] = frozenset()

    @property
    def uses_sample(self) -> bool:
        """Whether model or task are the built-in ones because nothing else was named."""
        return not self.given & {"model_name_or_path", "task_name", "train_file"}

    def to_dict(self) -> dict[str, Any]:
        """All options by section."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}


@dataclass(frozen=True)
class _Option:
    section: str
    name: str
    kind: type  # of one value: str, int, float or bool
    is_list: bool
    optional: bool
    default: Any
    limits: Mapping[str, Any]


def _options(sections: Mapping[str, type]) -> dict[str, _Option]:
    found = {}
    for section, cls in sections.items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            hint, optional = hints[f.name], False
            if isinstance(hint, types.UnionType):
                optional = True
                hint = next(h for h in typing.get_args(hint) if h is not type(None))
            is_list = typing.get_origin(hint) is list
            kind = typing.get_args(hint)[0] if is_list else hint
            found[f.name] = _Option(section, f.name, kind, is_list, optional, f.default, f.metadata)
    return found


OPTIONS = _options(SECTIONS)


@dataclass(frozen=True)
class Usage:
    """What `--help` of a command says: what it does, one example, and which options it lists (None: all)."""

    description: str
    example: str
    takes: frozenset[str] | None = None


TRAIN = Usage(
    "Adapt a frozen backbone to a task while pruning what the task does not need. Every option has a default: alone, it runs "
    "the built-in sample.",
    "deepspeed launcher/train.py --ds_config ds_configs/zero3.json --task_name mrpc",
)


def parse(argv: Sequence[str] | None = None, usage: Usage = TRAIN) -> Config:
    """Options from `argv` (default: the process's), over those of `--config`, over the defaults.

    Raises UserError with every problem: unknown options and types, ranges, contradictions. Exits on --help.
    """
    sections, given, problems = read(argv, SECTIONS, usage)
    config = Config(**sections, given=given)
    problems += _contradictions(config)
    if problems:
        raise UserError(problems)
    _resolve(config)
    return config


def read(
    argv: Sequence[str] | None, sections: Mapping[str, type], usage: Usage
) -> tuple[dict[str, Any], frozenset[str], list[Problem]]:
    """The dataclasses of `sections` filled in, the names of the options that were given, and all that is wrong with them.

    Every field of a section is an `option`. Exits on --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    problems: list[Problem] = []
    options = _options(sections)
    raw = _command_line(argv, problems, sections, usage)
    config_file = raw.pop("config", None)
    if config_file is not None:
        raw = {**_read_yaml(str(config_file), problems, options), **raw}
    values = {name: _convert(options[name], value, problems) for name, value in raw.items()}
    filled = {
        section: cls(**{n: v for n, v in values.items() if options[n].section == section and v is not _BAD})
        for section, cls in sections.items()
    }
    for o in options.values():
        value = getattr(filled[o.section], o.name)
        if values.get(o.name) is not _BAD and value is not None and (remedy := _out_of_limits(o, value)):
            problems.append(Problem(o.name, value, remedy))
    return filled, frozenset(values), problems


_BAD = object()  # a value that could not be read; its problem is already noted


def suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


class _Silent(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)


def _parser(sections: Mapping[str, type], usage: Usage) -> argparse.ArgumentParser:
    parser = _Silent(
        usage="%(prog)s [option ...]",
        description=usage.description,
        epilog=f"example: {usage.example}",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="yaml file with any of these options; the command line wins")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    options = _options(sections)
    for section, cls in sections.items():
        group = parser.add_argument_group((cls.__doc__ or section).rstrip("."))
        for o in (o for o in options.values() if o.section == section):
            text = o.limits["help"].replace("%", "%%")
            if o.limits["choices"]:
                text += f": {', '.join(o.limits['choices'])}"
            if o.default not in (None, False):
                text += f" [{o.default}]"
            shape: dict[str, Any] = {"metavar": o.kind.__name__.upper(), "default": argparse.SUPPRESS, "help": text}
            if o.kind is bool:
                shape |= {"nargs": "?", "const": True}
            elif o.is_list:
                shape |= {"nargs": "+"}
            if usage.takes is not None and o.name not in usage.takes:
                shape["help"] = argparse.SUPPRESS  # read all the same, so that it can be refused with a reason
            group.add_argument(f"--{o.name}", **shape)
    return parser


def _command_line(
    argv: list[str], problems: list[Problem], sections: Mapping[str, type], usage: Usage
) -> dict[str, Any]:
    try:
        values, unknown = _parser(sections, usage).parse_known_args(argv)
    except ValueError as error:
        problems.append(Problem("command line", " ".join(argv), str(error)))
        return {}
    options = _options(sections)
    names = ["config", *options]
    for word in unknown:
        name = word.lstrip("-").split("=")[0]
        if word.startswith("--"):
            problems.append(Problem(name, word, f"there is no such option; {_did_you_mean(name, names)}"))
        elif not any(p.field in options for p in problems) and not any(u.startswith("--") for u in unknown):
            problems.append(Problem("command line", word, "stands alone; options are written --name value"))
    found = vars(values)
    found.pop("local_rank", None)
    return {name: value for name, value in found.items() if value is not None}


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean --{close[0]}?" if close else "see --help"


def _read_yaml(path: str, problems: list[Problem], options: Mapping[str, _Option]) -> dict[str, Any]:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append(Problem("config", path, "there is no such file"))
        return {}
    except (OSError, ValueError) as error:
        problems.append(Problem("config", path, f"cannot be read: {error}"))
        return {}
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    # A dozen types of errors: a date in a 13th month, a nest of brackets, a tag on the wrong value.
    except Exception as error:
        problems.append(Problem("config", path, f"is not yaml: {error or type(error).__name__}"))
        return {}
    if values is None:
        return {}
    if not isinstance(values, dict):
        problems.append(Problem("config", path, "must be a mapping of option: value"))
        return {}
    assert node is not None
    stated = [key.value for key, _ in node.value]
    for name in sorted({str(name) for name in stated if stated.count(name) > 1}):
        problems.append(Problem("config", path, f"states {name} twice; leave one"))
    known = {}
    for name, value in values.items():
        if name not in options:
            problems.append(
                Problem(str(name), value, f"{path} has no such option; {_did_you_mean(str(name), [*options])}")
            )
        elif value is not None:
            known[str(name)] = value
    return known


def _convert(o: _Option, value: Any, problems: list[Problem]) -> Any:
    """One raw value (text, or what yaml made of it) as the option's type; `_BAD` and a problem where it is none."""
    if o.is_list:
        items = value if isinstance(value, list) else [value]
        if items and not any(isinstance(item, (list, dict)) or item is None or "\0" in str(item) for item in items):
            return [str(item) for item in items]
        problems.append(Problem(o.name, value, "must be one text or a list of texts"))
        return _BAD
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[o.kind]
    try:
        if o.kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if o.kind is str:
            if isinstance(value, (list, dict)) or not str(value) or "\0" in str(value):
                raise ValueError
            return str(value)
        if isinstance(value, bool):
            raise ValueError
        if o.kind is int:
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            return int(value)
        return float(value)
    except (KeyError, ValueError, TypeError, OverflowError):
        problems.append(Problem(o.name, value, f"must be {wanted}"))
        return _BAD


def _out_of_limits(o: _Option, value: Any) -> str:
    wrong = [v for v in (value if o.is_list else [value]) if o.limits["choices"] and v not in o.limits["choices"]]
    if wrong:
        return suggestion(str(wrong[0]), o.limits["choices"])
    if o.kind not in (int, float) or o.is_list:
        return ""
    words = {"least": "at least", "most": "at most", "above": "more than", "below": "less than"}
    holds = {
        "least": lambda v, b: v >= b,
        "most": lambda v, b: v <= b,
        "above": lambda v, b: v > b,
        "below": lambda v, b: v < b,
    }
    bounds = {k: o.limits[k] for k in words if o.limits[k] is not None}
    if o.kind is int:
        bounds.setdefault("most", MOST)
    if math.isfinite(value) and all(holds[k](value, b) for k, b in bounds.items()):
        return ""
    return "must be a finite number, " + " and ".join(f"{words[k]} {b}" for k, b in bounds.items())


def _contradictions(config: Config) -> list[Problem]:
    data, prune, train, output = config.data, config.prune, config.train, config.output
    found = []
    if prune.method in METHODS and prune.method != "prunadapt" and prune.target_sparsity is not None:
        why = "cuts its own share of heads" if prune.method == "tmp" else "cuts nothing"
        found.append(Problem("target_sparsity", prune.target_sparsity, f"--method {prune.method} {why}; leave it out"))
    if prune.method != "prunadapt" and prune.score_only:
        found.append(Problem("score_only", True, "scores come from the gates of --method prunadapt"))
    formats = output.export_formats or []
    if prune.method != "prunadapt" and prune.uniform:
        found.append(Problem("uniform", True, f"there is no decision to constrain with --method {prune.method}"))
    if prune.keep_in_outer_layers and (prune.uniform or prune.method != "prunadapt"):
        why = "layers are all alike with --uniform" if prune.uniform else "there is no decision with this --method"
        found.append(Problem("keep_in_outer_layers", prune.keep_in_outer_layers, f"{why}; leave it out"))
    if "uniform" in formats and not prune.uniform:
        found.append(
            Problem("export_formats", "uniform", "layers that differ fit no stock configuration; add --uniform")
        )
    if "adapter" in formats and prune.method != "lora":
        found.append(Problem("export_formats", "adapter", "an adapter fits the unpruned model only: use --method lora"))
    if prune.method != "prunadapt" and prune.save_scores:
        found.append(Problem("save_scores", True, "there are no decisions but those of --method prunadapt"))
    if data.task_type == "causal_lm":
        found += _language_problems(config)
    if data.test_file is not None:
        found.append(Problem("test_file", data.test_file, "test sets are not used yet; leave it out"))
    if prune.prune_start >= prune.prune_end:
        found.append(Problem("prune_start", prune.prune_start, f"must be less than prune_end ({prune.prune_end})"))
    if train.max_steps == 0:
        found.append(Problem("max_steps", 0, "must be at least 1, or -1 to train by epochs"))
    if data.train_file and data.task_name:
        found.append(Problem("task_name", data.task_name, "name either a task or --train_file, not both"))
    if data.train_file and not data.validation_file:
        found.append(Problem("validation_file", None, "--train_file needs one"))
    if data.validation_file and not data.train_file:
        found.append(Problem("train_file", None, "--validation_file needs one"))
    if data.data_dir and not os.path.isdir(data.data_dir):
        found.append(Problem("data_dir", data.data_dir, "there is no such folder"))
    if data.data_dir and not data.task_name and not data.train_file:
        found.append(Problem("task_name", None, "--data_dir needs the name of a GLUE task"))
    if os.path.exists(output.output_dir) and not os.path.isdir(output.output_dir):
        found.append(Problem("output_dir", output.output_dir, "is a file; name a folder"))
    if output.resume not in ("auto", "never") and not os.path.isdir(output.resume):
        found.append(Problem("resume", output.resume, "must be auto, never, or the folder of a checkpoint"))
    return found


def _language_problems(config: Config) -> list[Problem]:
    """What --task_type causal_lm does not go with."""
    data, prune, found = config.data, config.prune, []
    if not data.train_file:
        found.append(Problem("train_file", None, "--task_type causal_lm needs --train_file and --validation_file"))
    if prune.method == "tmp":
        found.append(Problem("method", "tmp", "its rule is one for classifiers; use prunadapt, lora or full"))
    if "distill_weight" in config.given and prune.distill_weight > 0:
        remedy = "a teacher's logits of every token and word are not kept; leave it out, or write 0"
        found.append(Problem("distill_weight", prune.distill_weight, remedy))
    return found


def _resolve(config: Config) -> None:
    """Fill in the defaults that depend on other options."""
    if config.data.task_type == "causal_lm":
        config.prune.distill_weight = 0.0
    if config.prune.method == "prunadapt" and config.prune.target_sparsity is None:
        config.prune.target_sparsity = DEFAULT_SPARSITY
    if config.lora.train_norms is None:
        config.lora.train_norms = config.prune.method in ("prunadapt", "tmp")
    if config.data.task_name is None and config.data.train_file is None:
        config.data.task_name = "sample"
    wanted = {"compact", *(config.output.export_formats or ()), *(["uniform"] if config.prune.uniform else ())}
    config.output.export_formats = [kind for kind in EXPORT_FORMATS if kind in wanted]
