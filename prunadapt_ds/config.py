"""The options of a run, their contradictions, and defaults that depend on other options. options.py reads them.

Names are Hugging Face's where Hugging Face has one. `parse` imports neither torch nor DeepSpeed, so that `--help` and
mistakes are answered at once.
"""

from __future__ import annotations

import dataclasses
import functools
import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunadapt_ds.data.tasks import GLUE, TASKS
from prunadapt_ds.errors import Problem, UserError
from prunadapt_ds.options import Usage, option, options_of, read

METHODS = ("prunadapt", "tmp", "lora", "full")
BUDGETS = ("params", "macs", "latency")
CRITERION_NAMES = ("fisher", "taylor", "outlier", "activation_norm", "magnitude", "random")
TASK_TYPES = ("sequence_classification", "causal_lm")
PROBLEM_TYPES = ("single_label_classification", "regression")
TASK_NAMES = tuple(TASKS)
EXPORT_FORMATS = ("compact", "padded", "uniform", "adapter")
EXPORT_DTYPES = ("float32", "bfloat16", "float16")
SHRINKING = ("auto", "always", "never")
LR_SCHEDULES = ("linear", "warmup_stable_decay")
DEFAULT_SPARSITY = 0.5
EVAL_BATCH_SIZE, LANGUAGE_EVAL_BATCH_SIZE = 64, 8

when_deciding = functools.partial(option, needs={"method": ("prunadapt",)})  # the method that decides while it trains
with_lora = functools.partial(option, needs={"method": ("prunadapt", "tmp", "lora")})


@dataclass
class ModelOptions:
    """Backbone."""

    model_name_or_path: str = option(
        "sample",
        "hub id (`id@revision`: a commit, branch or tag of it), folder, or `sample`, the encoder of the `sample` extra",
    )
    trust_remote_code: bool = option(False, "run modelling code that comes with the model")


@dataclass
class DataOptions:
    """Task and data."""

    task_type: str = option(
        "sequence_classification",
        "predict labels, or train a language model on a .txt file, columns prompt and response, messages, or text",
        choices=TASK_TYPES,
    )
    task_name: str | None = option(None, "GLUE task, or the built-in `sample`", choices=TASK_NAMES)
    data_dir: str | None = option(
        None, "folder of the official GLUE TSVs, one subfolder per task (loaded from the hub)"
    )
    train_file: str | None = option(
        None, "your own training data: csv, tsv, jsonl, json or parquet with columns sentence1[, sentence2], label"
    )
    validation_file: str | None = option(None, "your own development data, with the same columns")
    problem_type: str | None = option(
        None,
        "how to read the labels of --train_file (regression if they have decimal points, else classification)",
        choices=PROBLEM_TYPES,
        needs={"task_type": ("sequence_classification",)},
        hints={"classification": "is called single_label_classification"},
    )
    test_file: str | None = option(None, "refused: predict a test set afterwards, with `prunadapt predict`")
    max_seq_length: int = option(
        128,
        "tokens per input; longer inputs are truncated (to score an exported folder: that of its run)",
        least=4,
        most=2**20,
    )
    max_train_samples: int | None = option(
        None, "train on N examples only, drawn at random by --seed (causal_lm: the first N)", least=1
    )
    max_eval_samples: int | None = option(None, "evaluate on the first N examples of each set", least=1)


@dataclass
class PruningOptions:
    """Method and pruning."""

    method: str = option("prunadapt", "what to train and cut", choices=METHODS)
    target_sparsity: float | None = when_deciding(
        None, "share of the blocks' cost to cut; see --budget (0.5)", least=0, below=1
    )
    target_speedup: float | None = when_deciding(
        None, "make the blocks X times as fast: the same as --target_sparsity 1 - 1/X with --budget latency", least=1
    )
    budget: str = when_deciding(
        "params",
        "the cost that sparsity refers to; latency is measured at the start of the run, on its device and dtype",
        choices=BUDGETS,
    )
    criterion: str = when_deciding("fisher", "how to score importance", choices=CRITERION_NAMES)
    prune_start: float = when_deciding(0.25, "start of pruning, as a fraction of all steps", least=0, below=1)
    prune_end: float = when_deciding(0.6, "end of pruning, as a fraction of all steps", above=0, most=1)
    num_decisions: int = when_deciding(8, "pruning decisions between start and end", least=1)
    shrink: str = when_deciding(
        "auto",
        "when to physically shrink the model: where a rebuild pays off, at every decision, or only at export",
        choices=SHRINKING,
    )
    score_ema: float = when_deciding(
        0.5, "decay of the moving average of scores over decisions; 0: newest scores only", least=0, below=1
    )
    gate_learning_rate: float = when_deciding(1e-2, "peak learning rate of the gates", above=0)
    distill_weight: float = when_deciding(
        0.0,
        "weight of distillation from the run's own dense model; 0: off; try 0.5, the default with --distill_top_k",
        least=0,
        most=1,
    )
    teacher_window: float = when_deciding(
        0.6,
        "average the teacher's weights over this last share of the steps up to the first decision; 0: do not average",
        least=0,
        most=1,
    )
    distill_min_r2: float = when_deciding(
        0.1,
        "use the teacher only if it explains at least this share of the training labels (McFadden's R2; R2 for regression); "
        "always used with causal_lm",
    )
    distill_top_k: int = option(
        0,
        "causal_lm: how many of its most likely tokens the teacher stores per target token, on disk; 0: no teacher",
        least=0,
        needs={"method": ("prunadapt",), "task_type": ("causal_lm",)},
    )
    distill_fades: bool = when_deciding(
        True, "lower the teacher's weight linearly, from the first decision to 0 at the end"
    )
    neuron_multiple: int = when_deciding(
        8, "cut feed-forward neurons in groups of N, so that a multiple of N remains", least=1
    )
    head_multiple: int = when_deciding(
        1,
        "with --uniform: layers keep a multiple of N heads or groups, as servers that split them over N GPUs need",
        least=1,
    )
    uniform: bool = when_deciding(
        False, "give all layers the same numbers of units, or remove them whole, so that stock classes load the result"
    )
    keep_in_outer_layers: float = when_deciding(
        0.0, "share of the heads and of the neurons that the first and the last layer keep", least=0, most=1
    )
    tmp_scoring_examples: int = option(
        64, "training examples by which --method tmp ranks heads", least=1, needs={"method": ("tmp",)}
    )
    save_scores: bool = when_deciding(False, "write the raw statistics of every decision to scores/")
    score_only: bool = when_deciding(False, "write the statistics at the initial weights, and stop")


@dataclass
class LoraOptions:
    """Adapters."""

    adapter_name_or_path: str | None = option(
        None,
        "start from this PEFT LoRA adapter (folder or hub id), with its rank, alpha and projections",
        needs={"method": ("prunadapt", "lora")},
    )
    r: int = option(8, "LoRA rank", least=1, needs={"method": ("prunadapt", "lora")})  # tmp sets its own ranks
    lora_alpha: float = with_lora(16, "LoRA scale; updates are multiplied by lora_alpha / r", above=0)
    lora_dropout: float = with_lora(0.0, "dropout probability at the input of LoRA", least=0, below=1)
    train_norms: bool | None = with_lora(None, "also train the norms (with --method prunadapt and tmp)")
    target_modules: list[str] | None = with_lora(None, "names of the projections that get LoRA (all)")


@dataclass
class TrainOptions:
    """Training."""

    ds_config: str = option("ds_configs/zero3.json", "DeepSpeed configuration (JSON)")
    per_device_train_batch_size: int = option(32, "samples per rank and micro-batch", least=1, most=2**20)
    per_device_eval_batch_size: int | None = option(
        None,
        f"samples per rank in evaluation ({EVAL_BATCH_SIZE}; of language models, whose logits are large, as many as in training, "
        f"at most {LANGUAGE_EVAL_BATCH_SIZE})",
        least=1,
    )
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer step", least=1)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass; saves memory")
    learning_rate: float | None = option(
        None,
        "peak learning rate of adapters and head (0.384 / hidden size, at most 1e-3; a tenth with --method full)",
        above=0,
    )
    weight_decay: float = option(0.01, "weight decay of AdamW, except for biases, norms and gates", least=0)
    warmup_ratio: float = option(0.06, "warm-up of the learning rate, as a fraction of all steps", least=0, below=1)
    lr_scheduler_type: str = when_deciding(
        "linear",
        "decay linearly after the warm-up, or (warmup_stable_decay) only once pruning has ended",
        choices=LR_SCHEDULES,
        hints={"cosine": "is not available; linear decays over as many steps"},
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: off", least=0)
    num_train_epochs: float = option(3.0, "passes over the training data", above=0, most=1e6)
    max_steps: int = option(-1, "number of optimizer steps, instead of --num_train_epochs; -1: by epochs", least=-1)
    eval_steps: int | None = option(None, "also evaluate every N steps", least=1)
    logging_steps: int = option(10, "steps between two lines of metrics", least=1)
    group_by_length: bool = option(True, "put samples of similar length into the same step; saves padding")
    dropout: bool = option(False, "keep the dropout that the backbone was pretrained with")
    seed: int = option(0, "random seed of initialisation, sample order and dropout", least=0)


@dataclass
class OutputOptions:
    """Output."""

    output_dir: str = option("outputs", "folder for everything that the run writes")
    export_formats: list[str] | None = option(
        None,
        "folders to write beside `compact`: padded (stock shapes with zeros), uniform (a stock configuration; always written "
        "with --uniform), adapter (for PEFT; needs --method lora)",
        choices=EXPORT_FORMATS,
        hints={
            kind: f"is made from a finished run: prunadapt export --run_dir DIR --export_formats {kind}"
            for kind in ("onnx", "torch_export")
        },
    )
    latency_batch_size: int | None = option(
        None, "batch size of latency measurements, for the report and --budget latency (32)", least=1
    )
    latency_seq_length: int | None = option(None, "tokens per sequence in latency measurements (128)", least=4)
    export_dtype: str | None = option(
        None, "dtype of the exported weights (that of the loaded checkpoint)", choices=EXPORT_DTYPES
    )
    checkpoint_steps: int | None = option(
        None,
        "steps between two checkpoints (as often as saving takes at most 1 % of the time, once a minute at most)",
        least=1,
    )
    save_total_limit: int = option(2, "how many of the newest checkpoints to keep", least=1)
    resume: str = option(
        "auto", "auto: continue from the newest intact checkpoint; never: start over; or a checkpoint's folder"
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
    """All options of a run. `given`: the names of those that the user set."""

    model: ModelOptions
    data: DataOptions
    prune: PruningOptions
    lora: LoraOptions
    train: TrainOptions
    output: OutputOptions
    given: frozenset[str] = frozenset()

    @property
    def uses_sample(self) -> bool:
        """Whether the task is the built-in one because nothing else was named."""
        return not self.given & {"task_name", "train_file", "validation_file"}

    @property
    def is_language(self) -> bool:
        """Whether the task is language modelling, as opposed to classification or regression."""
        return self.data.task_type == "causal_lm"

    def eval_batch_size(self, micro_batch_size: int = LANGUAGE_EVAL_BATCH_SIZE) -> int:
        """Samples per rank in evaluation. `micro_batch_size`: those in training, whose memory language models should not exceed."""
        usual = min(micro_batch_size, LANGUAGE_EVAL_BATCH_SIZE) if self.is_language else EVAL_BATCH_SIZE
        return self.train.per_device_eval_batch_size or usual

    def to_dict(self) -> dict[str, Any]:
        """All options by section."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}

    def by_name(self) -> dict[str, Any]:
        """All options by name, whatever their section."""
        return {name: value for section in self.to_dict().values() for name, value in section.items()}


OPTIONS = options_of(SECTIONS)
# Options of --method prunadapt that still have an effect where nothing is cut.
WITHOUT_CUTS = frozenset({"target_sparsity", "target_speedup", "budget", "gate_learning_rate", "uniform", "score_only"})

NOT_SCORING = frozenset(  # options without an effect with --score_only
    {
        *("num_decisions", "prune_start", "prune_end", "shrink", "num_train_epochs", "max_steps", "learning_rate"),
        *("eval_steps", "export_formats", "export_dtype", "checkpoint_steps", "save_total_limit", "save_scores"),
        *("score_ema", "gate_learning_rate", "weight_decay", "warmup_ratio", "max_grad_norm", "lr_scheduler_type"),
        *("distill_weight", "teacher_window", "distill_min_r2", "distill_top_k", "distill_fades", "logging_steps"),
        *("target_sparsity", "target_speedup", "budget", "neuron_multiple", "head_multiple", "uniform"),
        "keep_in_outer_layers",
    }
)


TRAIN = Usage(
    "Adapt a frozen backbone to a task while pruning what the task does not need. Every option has a default: without any, the "
    "built-in sample runs.",
    "prunadapt train --ds_config ds_configs/zero3.json --model_name_or_path bert-base-uncased --task_name mrpc",
)


def parse(argv: Sequence[str] | None = None, usage: Usage = TRAIN, *, trains: bool = True) -> Config:
    """Read the options of a run: those in `argv` (default: the process's) override `--config`, which overrides the defaults.

    trains: whether the command trains; if not, it needs no --train_file.
    Raises UserError with every problem: unknown options, wrong types, ranges, contradictions. Exits on --help.
    """
    return parse_beside({}, argv, usage, trains=trains)[0]


def parse_beside(
    own: Mapping[str, type], argv: Sequence[str] | None, usage: Usage, *, reads_data: bool = True, trains: bool = True
) -> tuple[Config, dict[str, Any]]:
    """Like `parse`, for a command with option sections of its own, which are returned filled in, by name.

    reads_data: whether the command reads data, whose files a language task must then name.
    """
    filled, given, problems = read(argv, {**own, **SECTIONS}, usage)
    config = Config(**{name: filled.pop(name) for name in SECTIONS}, given=given)
    problems += _contradictions(config, trains)
    needed = "train_file" if trains else "validation_file"
    if reads_data and config.is_language and not getattr(config.data, needed):
        files = "--train_file and --validation_file" if trains else "--validation_file"
        problems.append(Problem(needed, None, f"--task_type causal_lm needs {files}"))
    if problems:
        raise UserError(problems)
    _resolve(config)
    return config, filled


def _contradictions(config: Config, trains: bool) -> list[Problem]:
    """Contradictions that no option's own limits and needs can express."""
    prune, train, output = config.prune, config.train, config.output
    found = _target_problems(config) + _teacher_problems(config) + _data_problems(config.data, trains)
    if config.is_language:
        found += _language_problems(config)
    formats = output.export_formats or []
    if prune.keep_in_outer_layers and prune.uniform:
        remedy = "layers are all alike with --uniform; leave it out"
        found.append(Problem("keep_in_outer_layers", prune.keep_in_outer_layers, remedy))
    if prune.head_multiple > 1 and not prune.uniform:
        remedy = "says how many heads all layers keep with --uniform; add that, or leave it out"
        found.append(Problem("head_multiple", prune.head_multiple, remedy))
    if "uniform" in formats and not prune.uniform:
        remedy = "layers that differ fit no stock configuration; add --uniform"
        found.append(Problem("export_formats", "uniform", remedy))
    if "adapter" in formats and prune.method != "lora":
        found.append(Problem("export_formats", "adapter", "an adapter fits the unpruned model only: use --method lora"))
    if prune.prune_start >= prune.prune_end:
        found.append(Problem("prune_start", prune.prune_start, f"must be less than prune_end ({prune.prune_end})"))
    if prune.score_only:
        remedy = "has no effect with --score_only, which neither trains nor exports; leave it out"
        idle = sorted(config.given & NOT_SCORING)
        stated = config.by_name()
        found += [Problem(name, stated[name], remedy) for name in idle]
        if output.resume not in ("auto", "never"):
            found.append(Problem("resume", output.resume, "scores are those of the initial weights; leave it out"))
    if train.max_steps == 0:
        found.append(Problem("max_steps", 0, "must be at least 1, or -1 to train by epochs"))
    if os.path.exists(output.output_dir) and not os.path.isdir(output.output_dir):
        found.append(Problem("output_dir", output.output_dir, "is a file; name a folder"))
    if output.resume not in ("auto", "never") and not os.path.isdir(output.resume):
        found.append(Problem("resume", output.resume, "must be auto, never, or the folder of a checkpoint"))
    return found


def _target_problems(config: Config) -> list[Problem]:
    """--target_speedup excludes another target or budget; options about decisions have no effect where nothing is cut."""
    prune = config.prune
    found: list[Problem] = []
    cuts_nothing = prune.target_sparsity == 0 or prune.target_speedup == 1
    if prune.method == "prunadapt" and cuts_nothing and not prune.score_only:
        remedy = "has no effect where nothing is cut (--target_sparsity 0, --target_speedup 1); leave it out"
        idle = [
            o
            for o in OPTIONS.values()
            if o.limits["needs"].get("method") == ("prunadapt",) and o.name not in WITHOUT_CUTS
        ]
        stated = config.by_name()
        found += [Problem(o.name, stated[o.name], remedy) for o in idle if stated[o.name] != o.default]
    if prune.target_speedup is None:
        return found
    if "target_sparsity" in config.given:
        remedy = f"--target_sparsity {prune.target_sparsity} is a target already; give one of the two"
        found.append(Problem("target_speedup", prune.target_speedup, remedy))
    if "budget" in config.given and prune.budget != "latency":
        remedy = f"is a target for latency, not for --budget {prune.budget}; leave --budget out"
        found.append(Problem("target_speedup", prune.target_speedup, remedy))
    return found


def _teacher_problems(config: Config) -> list[Problem]:
    """Options about the teacher have no effect without one."""
    prune = config.prune
    has_teacher = prune.distill_weight or (prune.distill_top_k and "distill_weight" not in config.given)
    if has_teacher or prune.method != "prunadapt":
        return []
    remedy = "has no effect without a teacher; add --distill_weight 0.5, or leave it out"
    names = ("teacher_window", "distill_min_r2", "distill_top_k", "distill_fades")
    values = [(name, getattr(prune, name)) for name in names]
    return [Problem(name, value, remedy) for name, value in values if value != OPTIONS[name].default]


def _data_problems(data: DataOptions, trains: bool) -> list[Problem]:
    """Either a task by name, optionally from --data_dir, or the user's own files."""
    found = []
    own = data.train_file or data.validation_file
    if data.test_file is not None:
        remedy = "a run does not use a test set; predict it afterwards with prunadapt predict"
        found.append(Problem("test_file", data.test_file, remedy))
    if data.problem_type is not None and not own:
        remedy = "says what the labels of --train_file are; a named task knows that itself: leave it out"
        found.append(Problem("problem_type", data.problem_type, remedy))
    if trains and data.validation_file and not data.train_file:
        found.append(Problem("train_file", None, "--validation_file needs one"))
    if own:
        if not data.validation_file:
            found.append(Problem("validation_file", None, "--train_file needs one"))
        if data.task_name:
            found.append(Problem("task_name", data.task_name, "name either a task or files, not both"))
        if data.data_dir:
            found.append(Problem("data_dir", data.data_dir, "not together with files of your own; drop one of them"))
    elif data.data_dir:
        if not data.task_name:
            found.append(Problem("task_name", None, "--data_dir needs the name of a GLUE task"))
        if data.task_name == "sample":
            remedy = f"the sample is not read from a folder; name a task: {', '.join(GLUE)}"
            found.append(Problem("data_dir", data.data_dir, remedy))
        elif not os.path.isdir(data.data_dir):
            found.append(
                Problem("data_dir", data.data_dir, "there is no such folder; name the one that holds CoLA, SST-2, ...")
            )
    return found


def _language_problems(config: Config) -> list[Problem]:
    """What cannot be combined with --task_type causal_lm."""
    prune, found = config.prune, []
    if prune.method == "tmp":
        found.append(Problem("method", "tmp", "works for classifiers only; use prunadapt, lora or full"))
    if "distill_weight" in config.given and prune.distill_weight > 0 and not prune.distill_top_k:
        remedy = "all logits of a language model are too many to keep; limit them, e.g. --distill_top_k 16"
        found.append(Problem("distill_weight", prune.distill_weight, remedy))
    return found


def _resolve(config: Config) -> None:
    """Fill in the defaults that depend on other options."""
    if config.prune.distill_top_k and "distill_weight" not in config.given:  # --distill_top_k implies a teacher
        config.prune.distill_weight = 0.5
    if config.prune.target_speedup is not None:
        config.prune.target_sparsity, config.prune.budget = 1 - 1 / config.prune.target_speedup, "latency"
    if config.prune.method == "prunadapt" and config.prune.target_sparsity is None:
        config.prune.target_sparsity = DEFAULT_SPARSITY
    if config.lora.train_norms is None:
        config.lora.train_norms = config.prune.method in ("prunadapt", "tmp")
    if config.data.task_name is None and config.data.train_file is None and config.data.validation_file is None:
        config.data.task_name = "sample"
    wanted = {"compact", *(config.output.export_formats or ()), *(["uniform"] if config.prune.uniform else ())}
    config.output.export_formats = [kind for kind in EXPORT_FORMATS if kind in wanted]
