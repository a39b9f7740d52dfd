"""Options from dataclasses: the command line, a yaml file, `--help`, ranges; every problem is reported at once.

transformers' HfArgumentParser will not do: it stops at the first problem, has no ranges, and importing it imports
transformers, while `--help` and mistakes should be answered at once. config.py defines the options of a run; any command can
have sections of its own.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunadapt_ds.errors import Problem, UserError

MOST = 2**31 - 1  # the limit of whole numbers that have none of their own: torch and DeepSpeed use fixed-width integers


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    hints: Mapping[str, str] = types.MappingProxyType({}),
    needs: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
    reads: Callable[[str], Any] | None = None,
) -> Any:
    """Declare a dataclass field with its help text and the values it takes: [least, most], (above, below), or `choices`.

    hints: answers to values that are not among the choices but are likely to be tried.
    needs: another option, and those of its choices with which this one has an effect; with the others only its default is
    accepted.  reads: parses a text; for one that it cannot read it raises ValueError with a message that says what it expects.
    """
    limits = {"least": least, "most": most, "above": above, "below": below, "choices": tuple(choices), "needs": needs}
    return field(default=default, metadata={"help": text, "hints": hints, "reads": reads, **limits})


def as_called(example: str) -> str:
    """Turn the example `prunadapt NAME ...` into a call of launcher/NAME.py if the program was started by that file."""
    program = Path(sys.argv[0])
    if program.parent.name != "launcher" or program.suffix != ".py":
        return example
    starter = "deepspeed" if program.stem == "train" else "python"
    _, _, *rest = example.split(" ")
    return " ".join([starter, f"launcher/{program.name}", *rest])


class Help(argparse.HelpFormatter):
    """Keeps an example on one line, however long: one that is broken at a hyphen cannot be pasted."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example: ") else super()._fill_text(text, width, indent)


@dataclass(frozen=True)
class Usage:
    """What a command's `--help` shows: a description, one example that begins with `prunadapt`, and the options (None: all)."""

    description: str
    example: str
    takes: frozenset[str] | None = None


@dataclass(frozen=True)
class Option:
    """What a field of a section takes, read from its annotation and its `option`."""

    section: str
    name: str
    kind: type  # of one value: str, int, float or bool
    is_list: bool
    default: Any
    limits: Mapping[str, Any]


def options_of(sections: Mapping[str, type]) -> dict[str, Option]:
    """Return the options of all sections, by name. `sections`: a dataclass by section name."""
    found = {}
    for section, cls in sections.items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            hint = hints[f.name]
            if isinstance(hint, types.UnionType):
                hint = next(h for h in typing.get_args(hint) if h is not type(None))
            is_list = typing.get_origin(hint) is list
            kind = typing.get_args(hint)[0] if is_list else hint
            found[f.name] = Option(section, f.name, kind, is_list, f.default, f.metadata)
    return found


def read(
    argv: Sequence[str] | None, sections: Mapping[str, type], usage: Usage
) -> tuple[dict[str, Any], frozenset[str], list[Problem]]:
    """Return the dataclasses of `sections` filled in, the names of the options that were given, and every problem.

    Every field of a section must be an `option`. Exits on --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    problems: list[Problem] = []
    options = options_of(sections)
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
        if values.get(o.name) is _BAD or value is None:
            continue
        remedy = _out_of_limits(o, value) or _without_effect(o, value, options, filled)
        if remedy:
            problems.append(Problem(o.name, value, remedy))
    return filled, frozenset(values), problems


# Options of other programs: the name of ours, or what to answer if there is none.
ELSEWHERE = {
    **dict.fromkeys(("lora_r", "lora_rank", "rank", "lora_dim"), "r"),
    **dict.fromkeys(("lr", "lora_lr"), "learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
    **dict.fromkeys(("sparsity", "pruning_ratio", "prune_ratio"), "target_sparsity"),
    **dict.fromkeys(("save_steps", "save_strategy", "checkpointing_steps"), "checkpoint_steps"),
    **dict.fromkeys(("deepspeed", "deepspeed_config"), "ds_config"),
    **dict.fromkeys(("max_length", "max_source_length", "block_size", "cutoff_len"), "max_seq_length"),
    **dict.fromkeys(("batch_size", "train_batch_size", "micro_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("model", "base_model", "model_id"), "model_name_or_path"),
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_clipping": "max_grad_norm",
    "iterative_steps": "num_decisions",
    **dict.fromkeys(("pruner_type", "importance"), "criterion"),
    "round_to": "neuron_multiple",
    "dev_file": "validation_file",
    "overwrite_output_dir": "to start over in a folder that has a run, pass --resume never",
    **dict.fromkeys(("do_eval", "eval_only"), "an exported folder is scored by `prunadapt evaluate`"),
    "zero_stage": "name the file of that stage as --ds_config, e.g. ds_configs/zero2.json",
    "cache_dir": "set the environment variable HF_HOME",
    **dict.fromkeys(("token", "hf_token", "use_auth_token"), "run `hf auth login`, or set HF_TOKEN"),
    **dict.fromkeys(
        ("num_gpus", "num_processes"), "the launcher takes it: deepspeed --num_gpus N launcher/train.py ..."
    ),
    "lora_target_modules": "target_modules",
    "resume_from_checkpoint": "resume",
    **dict.fromkeys(
        ("dataset_name", "dataset_config_name", "dataset"),
        "of the hub's data sets only GLUE's tasks are known by name (--task_name); write another one's splits with "
        "to_parquet() and give them as --train_file and --validation_file",
    ),
    **dict.fromkeys(
        ("text_column_name", "text_column_names", "text_column", "label_column_name", "label_column"),
        "columns go by their names: sentence1[, sentence2], label; rename yours",
    ),
    **dict.fromkeys(
        ("revision", "model_revision"),
        "append it to the name: --model_name_or_path owner/model@REVISION",
    ),
    "torch_dtype": "export_dtype",
    **dict.fromkeys(
        ("bf16", "fp16", "mixed_precision", "dtype"), "set bf16.enabled in the file of --ds_config; there is no fp16"
    ),
    **dict.fromkeys(
        ("report_to", "wandb_project", "logging_dir"),
        "metrics go to TensorBoard and metrics.jsonl; DeepSpeed's own monitors are blocks of the file of --ds_config",
    ),
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience"),
        "the model of the last step is exported",
    ),
    "push_to_hub": "upload a folder of exports/ afterwards, as the run's last lines say",
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "quantization"), "a quantised backbone cannot be cut"),
}
_BAD = object()  # a value that could not be read; its problem is already noted


def suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its errors, for commands whose few options are no dataclass."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)

    def parsed(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Like `parse_args`, but raises UserError."""
        words = list(sys.argv[1:] if argv is None else argv)
        try:
            return self.parse_args(words)
        except ValueError as error:
            raise UserError(Problem("command line", " ".join(words), f"{error}; see --help")) from None


def _parser(sections: Mapping[str, type], usage: Usage) -> argparse.ArgumentParser:
    parser = Parser(
        usage="%(prog)s [option ...]",
        description=usage.description,
        epilog=f"example: {as_called(usage.example)}",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="yaml file with any of these options; the command line wins")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    options = options_of(sections)
    for section, cls in sections.items():
        group = parser.add_argument_group((cls.__doc__ or section).rstrip("."))
        for o in (o for o in options.values() if o.section == section):
            text = o.limits["help"].replace("%", "%%")
            if o.limits["choices"]:
                text += f": {', '.join(o.limits['choices'])}"
            if o.default is not None and o.default is not False:  # 0 equals False, but is a default to show
                text += f" [{o.default}]"
            shape: dict[str, Any] = {"metavar": o.kind.__name__.upper(), "default": argparse.SUPPRESS, "help": text}
            if o.kind is bool:
                shape |= {"nargs": "?", "const": True}
            elif o.is_list:
                shape |= {"nargs": "+"}
            if usage.takes is not None and o.name not in usage.takes:
                shape["help"] = argparse.SUPPRESS  # still parsed, so that it can be refused with a reason
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
    options = options_of(sections)
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
    if hint := ELSEWHERE.get(name):
        return f"use --{hint}" if hint in names else hint
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean --{close[0]}?" if close else "see --help"


def _read_yaml(path: str, problems: list[Problem], options: Mapping[str, Option]) -> dict[str, Any]:
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


def _convert(o: Option, value: Any, problems: list[Problem]) -> Any:
    """Convert a raw value (text, or what yaml made of it) to the option's type; `_BAD` and a problem if that fails."""
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
            return os.path.expanduser(str(value))  # of yaml, and of --name=~/..., which shells leave alone
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


def _out_of_limits(o: Option, value: Any) -> str:
    wrong = [v for v in (value if o.is_list else [value]) if o.limits["choices"] and v not in o.limits["choices"]]
    if wrong:
        return o.limits["hints"].get(wrong[0]) or suggestion(str(wrong[0]), o.limits["choices"])
    if o.limits["reads"]:
        try:
            o.limits["reads"](value)
        except ValueError as error:
            return str(error)
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
    if (o.kind is int or math.isfinite(value)) and all(holds[k](value, b) for k, b in bounds.items()):
        return ""
    limits = " and ".join(f"{words[k]} {b}" for k, b in bounds.items())
    return f"must be a finite number{', ' * bool(limits)}{limits}"


def _without_effect(o: Option, value: Any, options: Mapping[str, Option], filled: Mapping[str, Any]) -> str:
    """Why a value other than the default has no effect with the other options as they are; "" if it has one."""
    if value == o.default:
        return ""
    for other, taken in o.limits["needs"].items():
        theirs = getattr(filled[options[other].section], other)
        if theirs in options[other].limits["choices"] and theirs not in taken:
            return f"has no effect with --{other} {theirs}, only with {' or '.join(taken)}; leave it out"
    return ""
