"""The usual alternative: PEFT LoRA (or full fine-tuning) with HF Trainer on DeepSpeed ZeRO-3.

compare.py launches it with `deepspeed`. It takes our trainer's options, so that data, epochs, batch size, rank and learning
rate are the same by construction, and writes result.json to --output_dir. Dropout is off, as in our trainer. Attention is the
fastest implementation in transformers: "eager" for bf16 on a CPU, where torch's fused kernel takes half as long again, "sdpa"
elsewhere. Training time begins with the first step, as in our trainer: loading and DeepSpeed's initialisation are not part of it.
With --eval_steps it records the development score during training; the time for this is not training time either. In bf16
HF Trainer rounds the labels of a regression; scores are computed with the labels of the data set.
"""

import json
import math
import sys
import time
from pathlib import Path

from compare_table import BF16_ROUNDING

from prunadapt_ds.environment import prepare_environment

prepare_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, TaskType, get_peft_model  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from prunadapt_ds import adapters, backbone, distributed, memory, model_folder, state  # noqa: E402
from prunadapt_ds.batches import PAD_TO_MULTIPLE_OF  # noqa: E402
from prunadapt_ds.config import parse  # noqa: E402
from prunadapt_ds.data import compute_metrics, load_metric, load_task, tokenize  # noqa: E402
from prunadapt_ds.ds_config import resolve_ds_config  # noqa: E402
from prunadapt_ds.models.layouts import family_of, layout_of  # noqa: E402
from prunadapt_ds.schedule import default_learning_rate  # noqa: E402

WARM_UP = 4  # steps


class Watched(Trainer):
    """Counts the live bytes of the step with the longest samples, records scores, and times training without evaluations."""

    live_bytes = 0
    longest = 0
    start = cpu_start = 0.0  # of the first step
    away = cpu_away = 0.0  # seconds spent on evaluation
    curve: list  # [step, training seconds so far, score]
    starts: list  # training seconds at the start of each step
    peak: memory.PeakMemory
    first_peak = 0  # bytes until the end of the first step

    def seconds(self):
        """(wall, CPU) seconds of training so far on this rank."""
        return time.perf_counter() - self.start - self.away, time.process_time() - self.cpu_start - self.cpu_away

    def evaluate(self, *args, **kwargs):
        before = self.seconds()
        found = super().evaluate(*args, **kwargs)
        after = self.seconds()
        self.away += after[0] - before[0]
        self.cpu_away += after[1] - before[1]
        self.curve.append([self.state.global_step, before[0], found["eval_score"]])
        return found

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)  # grouped by length, predictions would be in another order than labels

    def steady_step(self):
        """Median seconds from the start of one step to the next, without the first: the clock does not wait for the device."""
        return float(np.median(np.diff(self.starts[WARM_UP:]))) if len(self.starts) > WARM_UP + 1 else None

    def training_step(self, *args, **kwargs):
        if not self.starts:
            self.start, self.cpu_start = time.perf_counter(), time.process_time()
        self.starts.append(self.seconds()[0])
        if len(self.starts) == 2:
            self.first_peak = self.peak.bytes()
            self.peak.reset()
        length = args[1]["input_ids"].shape[1]
        if length <= self.longest:
            return super().training_step(*args, **kwargs)
        self.longest = length
        saved = memory.SavedActivations()
        with saved.watch():
            loss = super().training_step(*args, **kwargs)
        engine = self.model_wrapped
        self.live_bytes = memory.parameter_bytes(self.model) + state.optimizer_bytes(engine) + saved.bytes
        return loss


def ds_config(config, ds):
    return {
        "train_micro_batch_size_per_gpu": config.train.per_device_train_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": ds.dtype == "bf16"},
        "zero_optimization": ds.values["zero_optimization"],  # with its sizes: by default a bucket takes a GB
        "zero_allow_untested_optimizer": True,
    }


def main(argv):
    config = parse(argv)
    full = config.prune.method == "full"
    distributed.init()
    distributed.start_deepspeed()
    data = load_task(config.data, config.train.seed)
    output = Path(config.output.output_dir)
    ds = resolve_ds_config(config, distributed.world_size())
    cuda, bf16 = torch.cuda.is_available(), ds.dtype == "bf16"
    name = model_folder.locate(config.model.model_name_or_path)
    model_config = AutoConfig.from_pretrained(
        name,
        num_labels=data.task.num_labels,
        problem_type="regression" if data.task.is_regression else "single_label_classification",
    )
    arguments = TrainingArguments(
        output_dir=str(output),
        deepspeed=ds_config(config, ds),
        bf16=bf16,
        use_cpu=not cuda,
        per_device_train_batch_size=config.train.per_device_train_batch_size,
        per_device_eval_batch_size=config.eval_batch_size(),
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        num_train_epochs=config.train.num_train_epochs,
        learning_rate=config.train.learning_rate or default_learning_rate(model_config.hidden_size, is_full=full),
        weight_decay=config.train.weight_decay,
        warmup_steps=0,
        lr_scheduler_type="linear",
        max_grad_norm=config.train.max_grad_norm,
        seed=config.train.seed,
        gradient_checkpointing=config.train.gradient_checkpointing,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        eval_strategy="steps" if config.train.eval_steps else "no",
        eval_steps=config.train.eval_steps,
        logging_steps=50,
        disable_tqdm=True,
        remove_unused_columns=True,
    )
    torch.manual_seed(config.train.seed)
    load_metric(data.task.name)  # before memory is measured, as in our trainer
    peak = memory.PeakMemory(distributed.device())
    attention = "sdpa" if cuda or not bf16 else "eager"
    model = AutoModelForSequenceClassification.from_pretrained(
        name, config=model_config, dtype=ds.torch_dtype, attn_implementation=attention
    )
    backbone.no_dropout(model)
    if not full:
        family = family_of(model_config)
        layout = layout_of(family, model_config, model.base_model_prefix)
        lora = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=config.lora.r,
            lora_alpha=config.lora.lora_alpha,
            lora_dropout=config.lora.lora_dropout,
            target_modules=adapters.target_modules(layout),
            modules_to_save=[module.split(".")[-1] for module in family.task_head],
        )
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    tokenizer = AutoTokenizer.from_pretrained(name)

    def rows(split):
        tokens = tokenize(split, tokenizer, config.data.max_seq_length)
        keep = {"input_ids", "attention_mask", "token_type_ids", "labels"}
        return tokens.remove_columns([c for c in tokens.column_names if c not in keep])

    train = rows(data.train)
    validation = {split: rows(dataset) for split, dataset in data.validation.items()}
    kind = np.float32 if data.task.is_regression else np.int64
    labels = {split: np.array(dataset["labels"], kind) for split, dataset in validation.items()}
    watched = next(iter(validation))  # the split that is scored during training
    steps_per_epoch = -(-len(train) // (config.train.per_device_train_batch_size * distributed.world_size()))
    arguments.warmup_steps = math.ceil(config.train.warmup_ratio * steps_per_epoch * config.train.num_train_epochs)
    trainer = Watched(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation[watched],
        compute_metrics=lambda found: {
            "score": compute_metrics(data.task, found.predictions, labels[watched])["score"]
        },
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=PAD_TO_MULTIPLE_OF),
    )
    # The models' losses are plain means. Without this, Trainer multiplies them by the number of ranks, and clips accordingly.
    trainer.model_accepts_loss_kwargs = False
    trainer.curve, trainer.starts, trainer.peak = [], [], peak
    called = time.perf_counter()
    trainer.train()
    train_s, train_cpu_s = trainer.seconds()
    steady_peak = int(distributed.dist_max(peak.bytes()))
    first_peak = int(distributed.dist_max(trainer.first_peak))
    live = int(distributed.dist_max(trainer.live_bytes))
    metrics, predictions = {}, {}
    for split, dataset in validation.items():
        found = trainer.predict(dataset)
        assert np.allclose(found.label_ids, labels[split], rtol=BF16_ROUNDING), "predictions are in another order"
        prefix = f"{split}/" if len(data.validation) > 1 else ""
        measures = compute_metrics(data.task, found.predictions, labels[split])
        metrics |= {prefix + k: float(v) for k, v in measures.items() if k != "score"}
        values = found.predictions[:, 0] if data.task.is_regression else found.predictions.argmax(-1)
        predictions[split] = [values.tolist(), labels[split].tolist()]
    metrics["score"] = sum(metrics.values()) / len(metrics)
    if distributed.rank() == 0:
        result = {
            "metric": metrics,
            "train_s": train_s,
            "train_cpu_s": None if cuda else train_cpu_s,
            "initialisation_s": trainer.start - called,  # older results do not have it: their train_s contains it
            "steady_step_s": trainer.steady_step(),
            "device": distributed.device_name(distributed.device()),
            "attention": attention,
            "scores": trainer.curve,
            "steps": trainer.state.global_step,
            "live_bytes": live,
            "peak_bytes": max(first_peak, steady_peak),
            "steady_peak_bytes": steady_peak,  # after the first step
            "predictions": predictions,
        }
        output.mkdir(parents=True, exist_ok=True)
        (output / "result.json").write_text(json.dumps(result))
    distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
