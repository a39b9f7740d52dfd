"""Pruning in your own training loop: gates, scores, a global decision and an export.

deepspeed examples/own_loop.py [MODEL [OUTPUT]]      (two CPU ranks: deepspeed --num_accelerators 2 examples/own_loop.py)
"""

import sys
from pathlib import Path

from prunadapt_ds.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402

from prunadapt_ds import adapters, backbone, distributed, engine, export, gates, importance  # noqa: E402
from prunadapt_ds.batches import Rows, Sampler  # noqa: E402
from prunadapt_ds.budget import decide  # noqa: E402
from prunadapt_ds.objective import task_loss  # noqa: E402

ARGUMENTS = [word for word in sys.argv[1:] if not word.startswith("-")]  # the launcher adds --local_rank
MODEL = ARGUMENTS[0] if ARGUMENTS else "sample"
OUTPUT = Path(ARGUMENTS[1] if len(ARGUMENTS) > 1 else "outputs/own_loop")
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100_000},
}
RATES = {"learning_rate": 1e-3, "gate_learning_rate": 1e-2}

distributed.init()
distributed.start_deepspeed()
torch.manual_seed(0)
sharding = engine.shard_while_loading(DS_CONFIG)  # keep a reference: transformers shards only while it is alive
b = backbone.load(MODEL, num_labels=2)
texts = [("it rains a lot here", 0), ("the sun shines today", 1)] * 32
data = Dataset.from_list([{**b.tokenizer(text), "labels": label} for text, label in texts])

# ---- the 20 lines ----
rows = Rows(data, b.tokenizer)
sampler = Sampler(len(rows), 8, 1, distributed.rank(), distributed.world_size(), seed=0)
adapters.add_lora(b.model, b.layout, adapters.target_modules(b.layout), r=8, lora_alpha=16)
recorder = importance.Recorder(b.structure.num_units, activations=False, device=distributed.device())
gates.attach(b.model, b.layout, b.structure, recorder)
groups = engine.parameter_groups(b.model, b.task_head_names, **RATES, weight_decay=0.01)
ds = engine.build(b.model, groups, DS_CONFIG, adam={})
for step in range(8):
    for samples, weight in sampler.micro_batches(step):
        batch = rows.batch(samples, weight).to(distributed.device())
        recorder.begin(batch.weights, batch.inputs["attention_mask"])
        losses = task_loss(ds(**batch.inputs).logits, batch.labels, is_regression=False)
        ds.backward((losses * batch.weights).sum())
        recorder.end()
        ds.step()
    if step == 3:  # one all-reduce, then one decision over all layers, identical on every rank
        plan = decide(importance.fisher(recorder.all_reduce()), b.structure, sparsity=0.5)
        distributed.same_on_all_ranks("the plan", plan.hash)
        gates.apply_mask(b.model, plan.mask())
export.export(b.model, b.layout, plan, b.tokenizer, OUTPUT)
# ----------------------

if distributed.rank() == 0:
    print(f"kept {plan.cost('params'):,} of {b.structure.dense_cost('params'):,} parameters; wrote {OUTPUT}")
    print(plan.counts())
distributed.shutdown()
