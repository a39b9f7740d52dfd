"""What the ranks of a test run: pieces of the real program on a tiny model. Every function is called on each rank."""

import json
import os
import re
from pathlib import Path

import torch


def _session(argv):
    from prunadapt_ds import train
    from prunadapt_ds.config import parse

    return train.setup(parse(argv))


def fit(argv, *, threshold_zero=False):
    """Train without export; returns losses by step, the plan's hash, masked metrics and what the laws ask about."""
    from prunadapt_ds import train
    from prunadapt_ds.engine import gathered
    from prunadapt_ds.gates import gates_of

    session = _session(argv)
    if threshold_zero:
        session.ds.values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    before = _frozen(session.model, set())
    if session.config.prune.method == "tmp":
        train.prune_once(session)
    train.add_trainables(session)
    trained = {n.replace(".base_layer", "") for n, p in session.model.named_parameters() if p.requires_grad}
    strangers, shrink = [], train.shrink_model

    def watched(session):
        shrink(session)
        strangers.append(_strangers(session.model))

    train.shrink_model = watched
    train.fit(session)
    share_after_training = _frozen_share(session.model)
    after = _frozen(session.model, trained)
    with gathered(p for g in gates_of(session.model) for p in g.parameters()):
        deltas = torch.cat([g.delta.detach().float() for g in gates_of(session.model)] or [torch.zeros(0)])
    shares_in_evaluation = []
    hook = session.model.register_forward_hook(lambda *_: shares_in_evaluation.append(_frozen_share(session.model)))
    metrics, logits = train.evaluate(session)
    hook.remove()
    session.tracker.close()
    return {
        "losses": [line["train/loss"] for line in _lines(session) if "train/loss" in line],
        "learning_rates": [
            {k: v for k, v in line.items() if k.startswith("learning_rate/")}
            for line in _lines(session)
            if "train/loss" in line
        ],
        "distillation": session.report["distillation"],
        "lines": _lines(session),
        "score_decay": session.scores.decay if session.scores else None,
        "plan_hash": session.plan.hash,
        "counts": session.plan.counts(),
        "mask": session.plan.mask().tolist(),
        "scores": [] if session.scores.value is None else session.scores.value.tolist(),
        "frozen_same": all(is_slice(after[n], before[n]) for n in after),
        "num_frozen": len(after),
        "frozen_shares": [share_after_training, _frozen_share(session.model)],
        "shares_in_evaluation": shares_in_evaluation,
        "strangers": strangers,
        "deltas": deltas.tolist(),
        "metrics": metrics,
        "logits": {k: v.tolist() for k, v in logits.items()},
        "trained": sorted(trained),
        "lora_ranks": {
            name.partition(".lora_A")[0]: getattr(p, "ds_shape", p.shape)[0]
            for name, p in session.model.named_parameters()
            if ".lora_A." in name
        },
        "groups": [
            {name: group[name] for name in ("name", "base_lr", "weight_decay", "betas", "eps")}
            for group in session.engine.optimizer.param_groups
        ],
    }


def decisions(argv):
    """Scores [U] and skipped layers of every decision of a run, and the layer of every unit."""
    from prunadapt_ds import train

    made, decide = [], train.decide

    def watched(scores, *args, **options):
        plan = decide(scores, *args, **options)
        made.append((scores.tolist(), sorted(plan.skipped)))
        return plan

    train.decide = watched
    session = _session(argv)
    train.add_trainables(session)
    train.fit(session)
    session.tracker.close()
    return made, [t.layer for t in session.backbone.structure.sublayers for _ in range(t.num_units)]


def _engines():
    """DeepSpeed engines in memory."""
    import gc

    gc.collect()
    return sum(type(o).__name__ == "DeepSpeedEngine" for o in gc.get_objects())


def _strangers(model):
    """Frozen, sharded parameters in memory that are not the model's."""
    import gc

    gc.collect()
    own = {id(p) for p in model.parameters()}
    others = [o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and id(o) not in own]
    return sum(hasattr(p, "ds_id") and not p.requires_grad for p in others)


def is_slice(values, whole):
    """Whether `values` are `whole`, or some of its rows (or columns) in order."""
    differs = [i for i, (a, b) in enumerate(zip(values.shape, whole.shape, strict=True)) if a != b]
    if not differs:
        return bool((values == whole).all())
    if len(differs) > 1:
        return False
    rows = iter(whole.swapaxes(0, differs[0]))
    return all(any((row == candidate).all() for candidate in rows) for row in values.swapaxes(0, differs[0]))


def _frozen_share(model):
    """Frozen bytes on this rank, of all frozen bytes."""
    from prunadapt_ds.memory import parameter_bytes

    frozen = [p for p in model.parameters() if not p.requires_grad]
    return parameter_bytes(model, only_frozen=True) / sum(
        getattr(p, "ds_numel", p.numel()) * p.element_size() for p in frozen
    )


def _lines(session):
    file = Path(session.config.output.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _frozen(model, trained):
    """Whole copies of everything not in `trained`, LoRA and gates left out."""
    from prunadapt_ds.engine import gathered

    copies = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in trained or "lora_" in name or "prune_gate" in name:
            continue
        with gathered([parameter]):
            copies[plain] = parameter.detach().clone()
    return copies


def score(argv):
    """--score_only: the sums of every statistic at the initial weights, as written by rank 0."""
    from safetensors.torch import load_file

    from prunadapt_ds import train
    from prunadapt_ds.config import NOT_SCORING, parse

    given = [i for i, word in enumerate(argv) if word.startswith("--") and word[2:] in NOT_SCORING]
    kept = [word for i, word in enumerate(argv) if i not in given and i - 1 not in given]
    config = parse([*kept, "--score_only"])
    train.run(config)
    from prunadapt_ds import distributed

    distributed.barrier()
    tensors = load_file(Path(config.output.output_dir) / "scores" / "0.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def gradients(argvs):
    """The gradient of everything that trains, after the first batch: one dict of whole tensors for each command line."""
    from deepspeed.utils import safe_get_full_grad, z3_leaf_module

    from prunadapt_ds import train
    from prunadapt_ds.step import forward_backward

    found = []
    for argv in argvs:
        session = _session(argv)
        train.add_trainables(session)
        torch.manual_seed(0)
        for parameter in session.model.parameters():  # LoRA's B begins at zero, where A has no gradient
            if parameter.requires_grad:
                with train.engines.gathered([parameter], write_from=0):
                    parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
        ((positions, weight),) = session.sampler.micro_batches(0)
        forward_backward(session, session.train_rows.batch(positions, weight), None)
        trained = [(n, p) for n, p in session.model.named_parameters() if p.requires_grad]
        whole = safe_get_full_grad if session.ds.stage else lambda p: p.grad
        found.append(
            {
                "gradients": {name: whole(p).tolist() for name, p in trained},
                "pieces": sum(z3_leaf_module(m) for m in session.model.modules()),
            }
        )
        session.tracker.close()
        session.release_engine()
    return found


def whole_run(argv):
    """The real main on every rank, under the most permissive umask: exit code."""
    from prunadapt_ds.train import main

    os.umask(0)
    return main(argv)


def first_logits(argv):
    """What the model answers to the development set before it has learnt anything."""
    from prunadapt_ds import train

    session = _session(argv)
    train.add_trainables(session)
    _, logits = train.evaluate(session)
    session.tracker.close()
    return logits["validation"].tolist()


def scored(argv):
    """The real scoring of a folder: its measures."""
    from prunadapt_ds.commands import evaluate
    from prunadapt_ds.config import parse

    return evaluate.run(parse(argv))


def predicted(argv, said=None):
    """The real predictions: exit code. `said`: rank 0's standard input."""
    import io
    import sys

    from prunadapt_ds import answers, distributed
    from prunadapt_ds.commands.predict import main

    answers.CHUNK = 50
    if said is not None:
        sys.stdin = io.StringIO(said if distributed.rank() == 0 else "not for you")
    return main(argv)


def example(path, *arguments):
    """A file of examples/ as a program: exit code, and what it printed."""
    import contextlib
    import io
    import runpy
    import sys

    sys.argv = [path, *arguments]
    printed = io.StringIO()
    code = None
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def whole_run_said(argv):
    """The real main: exit code and what it wrote to standard error."""
    import contextlib
    import io

    from prunadapt_ds.train import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(argv)
    return code, said.getvalue()


def disagree(rank_of_the_odd_one):
    """Law 6: one rank holds another plan; what each rank raises."""
    from prunadapt_ds import distributed
    from prunadapt_ds.errors import RanksDisagree

    digest = "ab" * 32 if distributed.rank() != rank_of_the_odd_one else "cd" * 32
    try:
        distributed.same_on_all_ranks("the plan", digest)
    except RanksDisagree as error:
        return str(error)
    return None


def head_of_a_classifier(argv):
    """Rows of the head that a run begins with, and what was said of it."""
    from prunadapt_ds.engine import gathered

    session = _session(argv)
    head = session.backbone.model.classifier
    with gathered([head.weight, head.bias]):
        rows = head.weight.tolist(), head.bias.tolist()
    session.tracker.close()
    return rows, session.backbone.notes


def hosts(kind):
    """Two hosts of one rank each, which hold "same", "other" or no files: what each rank gets or raises."""
    import socket

    from prunadapt_ds import distributed
    from prunadapt_ds.errors import PrunadaptError

    socket.gethostname = lambda: f"node{distributed.rank()}"

    def read():
        if distributed.rank() == 1 and kind == "none":
            raise FileNotFoundError("config.json")
        return {"backbone": "other" if distributed.rank() == 1 and kind == "other" else "same"}

    try:
        return distributed.same_on_all_hosts("the model's files", read)
    except PrunadaptError as error:
        return f"{type(error).__name__}: {error}"


def long_work(fails, most=3600.0):
    """Rank 0 works for longer than a minute has here: the result, or why it failed, and whether this rank heard that it went on."""
    import time

    from prunadapt_ds import distributed
    from prunadapt_ds.errors import PrunadaptError

    def work():
        time.sleep(0.5)
        if fails:
            raise OSError("no room")
        return 5

    heard = []
    try:
        found = distributed.on_rank_0_for_long("proving", work, lambda: heard.append(1), every=0.05, most=most)
    except PrunadaptError as error:
        found = str(error)
    return found, len(heard) > 2


def full_disk(folder):
    """Rank 0 cannot write the statistics: what each rank raises."""
    from pathlib import Path

    from prunadapt_ds import importance
    from prunadapt_ds.errors import PrunadaptError

    sums = {name: torch.ones(2) for name in importance.STATISTICS}
    try:
        importance.save_sums(importance.WindowSums(sums, 1.0), Path(folder), 3, [0])
    except PrunadaptError as error:
        return str(error)
    return None


def mistake_on_one_rank():
    """A user's mistake that only one rank can see is everybody's."""
    from prunadapt_ds import distributed
    from prunadapt_ds.errors import Problem, UserError

    def work():
        if distributed.rank() == 1:
            raise UserError(Problem("train_file", "x.csv", "there is no such file"))
        return "fine"

    try:
        return distributed.together(work)
    except UserError as error:
        return str(error)


def chance(argv):
    """The next random numbers of a run that has begun."""
    from prunadapt_ds import train

    session = _session(argv)
    train.begin(session)
    session.tracker.close()
    return torch.rand(4).tolist()


def sample_ids(num_samples, micro_batch, accumulation, steps):
    from prunadapt_ds import distributed
    from prunadapt_ds.batches import Sampler

    sampler = Sampler(num_samples, micro_batch, accumulation, distributed.rank(), distributed.world_size(), 0)
    return [sampler.micro_batches(step) for step in range(steps)]


def recover_logits(lengths, batch_size):
    """Distributed prediction with a model that returns its row's number: every row once, in order."""
    from types import SimpleNamespace

    from prunadapt_ds.logits import predict

    class Echo(torch.nn.Module):
        def forward(self, row):
            return SimpleNamespace(logits=row[:, None].float())

    class Rows(SimpleNamespace):
        def __len__(self):
            return len(lengths)

    rows = Rows(lengths=lengths, inputs=lambda positions: {"row": torch.tensor(positions)})
    return predict(Echo(), rows, batch_size, torch.device("cpu")).flatten().tolist()


def shrink_in_training(argv, hold=False):
    """Shrink at every decision; at each: the losses of one batch, the training state and the shapes, before and after.

    hold: keep each engine until its successor is there, as a loop of one's own may.
    """
    import gc
    from contextlib import contextmanager

    from prunadapt_ds import engine as engines
    from prunadapt_ds import export, state, train
    from prunadapt_ds.logits import predict
    from prunadapt_ds.models.structure import full_shape
    from prunadapt_ds.objective import task_loss

    session = _session([*argv, "--shrink", "always"])
    seen, whole = [], []

    def losses():
        logits = predict(session.engine, session.train_rows.head(6), 3, session.device)
        return task_loss(logits, session.train_rows.labels[:6], False).tolist()

    def learnt():
        found = state.capture(session.engine)
        tensors = {"masters": found.masters, **found.moments}
        return {"steps": found.steps, **{k: {n: t.numpy() for n, t in v.items()} for k, v in tensors.items()}}

    @contextmanager
    def traced(module):
        with plain(module):
            yield
            names = {
                re.split(r"\.(?:base_layer|lora_|prune_gate|weight|bias)", n)[0]
                for n, p in session.model.named_parameters()
                if ".layer" in n and p.numel()
            }
            whole.append((len(names), sum(p.numel() for p in module.parameters())))

    plain, really_shrink = engines.rewriting, train.shrink_model
    engines.rewriting = traced

    def shrink_model(session):
        before = (losses(), learnt())
        sharded = [p for p in session.model.parameters() if engines.is_sharded(p)]
        old = session.engine if hold else None
        really_shrink(session)
        del old
        gc.collect()
        held = {id(p) for p in session.model.parameters()}
        seen.append(
            {
                "losses": (before[0], losses()),
                "state": (before[1], learnt()),
                "counts": session.plan.counts(),
                "shapes": {n: full_shape(p) for n, p in session.model.named_parameters()},
                "frozen_share": _frozen_share(session.model),
                "engines": _engines(),
                "left_of_shards": [p.ds_tensor.numel() for p in sharded if id(p) not in held],
            }
        )

    train.shrink_model = shrink_model
    try:
        train.add_trainables(session)
        train.fit(session)
    finally:
        train.shrink_model, engines.rewriting = really_shrink, plain
    _, masked = train.evaluate(session)
    tensors = export.pruned_tensors(session.model, session.backbone.layout, session.plan, session.present)
    exported = {}
    for name, tensor in tensors:
        tensor.write(torch.empty(tensor.shape))
        exported[name] = tensor.shape
    session.tracker.close()
    layers = session.backbone.layout.layers
    return {
        "seen": seen,
        "whole": whole,
        "masked": masked["validation"].tolist(),
        "exported": exported,
        "frozen_share": _frozen_share(session.model),
        "plan": session.plan.to_dict(),
        "lines": _lines(session),
        "timed": vars(session.clocks.steps),
        "dense_size": session.backbone.structure.dense_cost("macs"),
        "live_bytes": session.memory.live,
        "accumulates_in": str(getattr(session.engine.optimizer, "gradient_accumulation_dtype", None)),
        "numel": max(getattr(p, "ds_numel", p.numel()) for p in session.model.get_submodule(layers).parameters()),
    }


def uncounted(argv):
    """Seconds of training that no part of the clocks has, in a run where each step, decision and line of the log takes longer."""
    import time

    from prunadapt_ds import board, train
    from prunadapt_ds.keeper import Keeper

    def slower(function):
        def slow(*args, **options):
            time.sleep(SLOWER)
            return function(*args, **options)

        return slow

    session = _session(argv)
    train.add_trainables(session)
    train.log_interval, board.decision = slower(train.log_interval), slower(board.decision)
    Keeper.step_done, train.pays_to_shrink = slower(Keeper.step_done), slower(train.pays_to_shrink)
    start = time.perf_counter()
    train.fit(session)
    spent = time.perf_counter() - start
    session.tracker.close()
    return spent - sum(session.clocks.seconds.values()), session.clocks.seconds[
        "evaluation"
    ] + session.clocks.train_seconds()


SLOWER = 0.3  # seconds


def language_run(argv, prompts, new_tokens):
    """The whole program on one rank; then what the trained, masked model says, token by token and without a cache."""
    from prunadapt_ds import train
    from prunadapt_ds.finish import finish

    session = _session(argv)
    train.add_trainables(session)
    train.fit(session)
    finish(session)
    model = session.model.eval()
    said = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(new_tokens):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        said.append(ids[0].tolist())
    return session.report, said


def lend_averages(argv):
    """Average the weights of three steps and lend them to the engine: its state before, during and after, and their mean."""
    from prunadapt_ds import state, train
    from prunadapt_ds.step import train_step
    from prunadapt_ds.weight_average import WeightAverage, averaged

    session = _session(argv)
    train.add_trainables(session)
    average, masters = WeightAverage(), []
    for step in range(3):
        train_step(session, step, record=False)
        average.add(session.engine)
        masters.append(state.capture(session.engine).masters)
    before = state.capture(session.engine)
    with averaged(session.engine, average):
        during = state.capture(session.engine).masters
    after = state.capture(session.engine)
    session.tracker.close()
    mean = {name: sum(m[name] for m in masters) / 3 for name in during}
    return {
        "moved": max(float((masters[0][n] - masters[2][n]).abs().max()) for n in during),
        "off_mean": max(float((during[n] - mean[n]).abs().max()) for n in during),
        "same_after": before.steps == after.steps
        and all(torch.equal(before.masters[n], after.masters[n]) for n in during)
        and all(torch.equal(before.moments[k][n], after.moments[k][n]) for k in before.moments for n in during),
    }


def gathered_for_a_checkpoint(argv):
    """Of each kind of tensor that a checkpoint holds of every parameter, how many this rank has got."""
    from prunadapt_ds import snapshot, state, train
    from prunadapt_ds.step import train_step

    session = _session(argv)
    train.add_trainables(session)
    train_step(session, 0, record=False)
    session.step = 1
    tensors, _ = snapshot.collect(session)
    session.tracker.close()
    return {kind: sum(name.startswith(f"{kind}/") for name in tensors) for kind in ("master", *state.MOMENTS)}


def loaded_under_zero3(folders, is_language=False, precision="float32", only_streamed=()):
    """Models loaded under ZeRO-3, streamed and as `from_pretrained` does it: whole tensors, head, and notes.

    Per folder (streamed, plain), plain being None for those in `only_streamed`. A tensor is (shape, bytes), an error its text.
    """
    import contextlib

    from prunadapt_ds import backbone, distributed, engine
    from prunadapt_ds.errors import UserError

    values = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    zero3 = engine.shard_while_loading({**values, "bf16": {"enabled": precision == "bfloat16"}})

    def load(folder):
        torch.manual_seed(3)
        try:
            found = distributed.together(
                lambda: backbone.load(folder, num_labels=3, dtype=getattr(torch, precision), is_language=is_language)
            )
        except UserError as error:
            return str(error)
        assert all(hasattr(p, "ds_id") for p in found.model.parameters())
        tensors = {}
        for name, tensor in found.model.state_dict(keep_vars=True).items():
            with engine.gathered([tensor] if isinstance(tensor, torch.nn.Parameter) else []):
                tensors[name] = (tuple(tensor.shape), tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())
        return tensors, sorted(found.task_head_names), found.notes

    pairs = []
    for folder in folders:
        streamed, streaming = load(folder), backbone.streaming
        backbone.streaming = lambda name: contextlib.nullcontext([])
        try:
            plain = None if folder in only_streamed else load(folder)
        finally:
            backbone.streaming = streaming
        pairs.append((streamed, plain))
    assert zero3 is not None
    return pairs


def exported_under_zero3(families, work):
    """Models of `work` under ZeRO-3 with LoRA and gates, exported without some of their units to `work/<family>-<way>`: small
    matrices gathered, as by default, and rows taken from where they lie, in blocks of two sizes. By family and way, the most
    elements that were gathered of one parameter."""
    from prunadapt_ds import adapters, backbone, engine, export, gates
    from prunadapt_ds.budget import PruningPlan

    zero3 = engine.shard_while_loading({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    plain, gathered = export.gathered, []

    def watched(parameters):
        parameters = list(parameters)
        gathered.extend(p.ds_numel for p in parameters if engine.is_sharded(p))
        return plain(parameters)

    found = []
    for family in families:
        torch.manual_seed(3)
        loaded = backbone.load(f"{work}/{family}", num_labels=3, dtype=torch.float32)
        model, layout, structure = loaded.model, loaded.layout, loaded.structure
        adapters.add_lora(model, layout, adapters.target_modules(layout), r=2, lora_alpha=4)
        gates.attach(model, layout, structure)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "delta" in name:
                torch.nn.init.normal_(parameter, 0, 0.1)
        mask = torch.rand(structure.num_units) > 0.4
        mask[[s.start for s in structure.sublayers]] = True
        plan = PruningPlan.from_mask(structure, mask)
        gates.apply_mask(model, plan.mask())
        export.gathered, usual, most = watched, export.ROWS_NUMEL, []
        for way, export.ROWS_NUMEL in enumerate((usual, 1000, 100)):
            gathered.clear()
            export.export(model, layout, plan, loaded.tokenizer, Path(work) / f"{family}-{way}")
            most.append(max(gathered, default=0))
        export.gathered, export.ROWS_NUMEL = plain, usual
        found.append(most)
    assert zero3 is not None
    return found


def sent_in_a_step(argv):
    """Bytes that this rank sends in a later step: by kind as DeepSpeed's own logger counts them, and as the run says."""
    import deepspeed

    from prunadapt_ds import train
    from prunadapt_ds.distributed import world_size
    from prunadapt_ds.step import train_step

    session = _session(argv)
    train.add_trainables(session)
    deepspeed.comm.configure(enabled=True, prof_all=True)
    logger = deepspeed.comm.comm.comms_logger
    for step in range(4):
        logger.comms_dict.clear()
        train_step(session, step, record=False)
    counted = {name: dict(by_size) for name, by_size in logger.comms_dict.items()}
    deepspeed.comm.configure(enabled=False)
    session.tracker.close()
    others = world_size() - 1
    shares = {"all_gather_into_tensor": others, "reduce_scatter_tensor": others / world_size()}
    shares["all_reduce"] = 2 * others / world_size()
    sent = sum(
        shares[name] * size * calls[0]
        for name, by_size in counted.items()
        for size, calls in by_size.items()
        if size > 64
    )
    whole = sum(getattr(p, "ds_numel", p.numel()) * 4 for p in session.model.parameters())
    return {"sent": sent, "said": session.sent_in_a_step(), "whole": whole}


def compact_under_zero3(folder, inputs):
    """A compact folder that DeepSpeed shards as its own code builds it: logits, tensors that are not sharded, keys that did not
    fit, and losses of a few steps of training."""
    import deepspeed
    import transformers
    from transformers.integrations import HfDeepSpeedConfig

    from prunadapt_ds import distributed

    transformers.dynamic_module_utils.HF_MODULES_CACHE = f"{folder}-code-{distributed.rank()}"
    values = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    zero3 = HfDeepSpeedConfig(values)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    whole = [name for name, p in model.named_parameters() if not hasattr(p, "ds_id")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=values)[0]
    with torch.no_grad():
        logits = engine(**inputs).logits
    losses = []
    for _ in range(6):
        losses.append(engine(**inputs, labels=torch.arange(len(logits)) % 2).loss)
        engine.backward(losses[-1])
        engine.step()
    assert zero3 is not None
    return logits.tolist(), whole, [key for keys in info.values() for key in keys], [loss.item() for loss in losses]
