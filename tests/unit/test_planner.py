"""Plans: what they count is what the trainer's own code would hold; they answer fast; mistakes are said."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from prunadapt_ds import adapters, gates, inventory, zero_costs
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.commands import plan, planner
from prunadapt_ds.config import parse
from prunadapt_ds.ds_config import resolve_ds_config
from prunadapt_ds.memory import SavedActivations
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.resize import resize
from tests.conftest import ROOT
from tests.tiny import layout_and_structure, tiny_config, tiny_model

pytestmark = pytest.mark.fast
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
# layers, hidden size, heads, key/value heads, neurons, words
LLAMAS = {
    "7B": (32, 4096, 32, 32, 11008, 32000),
    "13B": (40, 5120, 40, 40, 13824, 32000),
    "70B": (80, 8192, 64, 8, 28672, 32000),
    "405B": (126, 16384, 128, 8, 53248, 128256),
}


def llama(size, **changes):
    layers, hidden, heads, kv_heads, neurons, words = LLAMAS[size]
    values = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": neurons,
        "vocab_size": words,
    }
    return LlamaConfig(**{**values, **changes})


def planned(config, *words, files=FILES, **machine):
    return planner.plan(config, parse(list(words)), zero_costs.Machine(**machine), files)


def resolved(file, world):
    return resolve_ds_config(parse(["--ds_config", str(file)]), world, lambda: True, on_this_machine=False)


def by_file(found):
    return {c["file"]: c for c in found["configs"]}


@pytest.mark.parametrize("size", LLAMAS)
def test_shapes_from_one_gpu_to_512(size):
    """What must hold at any size: parameters as published, stage 3 divides them, more ranks never hold more, answers in seconds."""
    start = time.process_time()
    config, words = llama(size), ("--per_device_train_batch_size", "1", "--gradient_checkpointing")
    built = inventory.skeleton(config, parse(list(words)), torch.bfloat16)
    shapes = planner.phases(built, parse(list(words)), 1, 2)
    assert time.process_time() - start < 60
    dense, last = shapes[0][2], shapes[-1][2]
    assert dense.exported == pytest.approx(float(size[:-1]) * 1e9, rel=0.06)
    assert dense.frozen > last.frozen > dense.frozen / 2 and dense.macs > 1.9 * last.macs
    totals = []
    for world in (1, 8, 64, 512):
        machine = zero_costs.Machine(world_size=world)
        ds = {f.name: resolved(f, world) for f in FILES}
        held = {n: zero_costs.rank_bytes(dense, d, machine, recomputes=True)["device"] for n, d in ds.items()}
        assert held["zero3.json"]["frozen"] == pytest.approx(2 * dense.frozen / world, rel=1e-3)
        assert held["zero2.json"]["frozen"] == 2 * dense.frozen
        assert held["zero3_offload_cpu.json"]["frozen"] == 0
        totals.append(sum(held["zero3.json"].values()))
        sent = zero_costs.traffic(dense, ds["zero3.json"], machine, parse(list(words)))
        assert (sent["gather"] == 0) == (world == 1)
    assert totals == sorted(totals, reverse=True)


def test_which_fits_and_which_is_fastest():
    """3.3 GiB of weights: not on a GPU of 3, nor copied to each of eight; divided by eight they fit."""
    config, words = llama("7B", num_hidden_layers=8), ("--per_device_train_batch_size", "1", "--max_seq_length", "512")
    alone = planned(config, *words, gpu_memory=3 * 2**30)
    assert not by_file(alone)["zero3.json"]["fits"] and not by_file(alone)["zero2.json"]["fits"]
    assert by_file(alone)["zero3_offload_cpu.json"]["fits"] and "offload" in alone["fastest"]
    several = planned(config, *words, gpu_memory=3 * 2**30, world_size=8)
    assert by_file(several)["zero3.json"]["fits"] and not by_file(several)["zero0.json"]["fits"]
    assert planned(config, *words, world_size=8)["fastest"] == "zero0.json", "where all fits, nothing needs to travel"
    slow = planned(config, *words, world_size=16, network_bandwidth=1e9)
    seconds = {name: c["phases"][0]["seconds"]["total"] for name, c in by_file(slow).items()}
    assert seconds["zero3.json"] > 3 * seconds["zero2.json"]
    assert planned(config, *words, gpu_memory=2**29)["fastest"] is None
    text = plan.table(several)
    assert "zero0.json: does not fit" in text and "zero3.json: fits" in text and "fastest that fits: zero3" in text


def sizes(stock):
    return {name: (size.elements, size.trains) for name, size in stock.tensors.items()}


def really(model_type, words, cut=None):
    """The same model as the trainer makes it, with real tensors: bytes of parameters by (trains), and saved activations."""
    config, model = parse(list(words)), tiny_model(model_type).train()
    model.config.use_cache = False
    layout, structure = layout_and_structure(model, config.data.max_seq_length)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = FAMILIES[model_type].task_head
    for name, parameter in model.named_parameters():
        outside = not name.startswith(model.base_model_prefix + ".")
        parameter.requires_grad_(outside or name.startswith(tuple(f"{h}." for h in head)))
    adapters.prepare(model, layout, adapters.target_modules(layout), config, {})
    gates.attach(model, layout, structure)
    if cut is not None:
        resize(model, layout, cut)
    saved, ids = SavedActivations(), torch.ones(4, config.data.max_seq_length, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with saved.watch():
        logits = model(input_ids=ids, attention_mask=mask).logits
    del logits
    return {n: (p.numel(), p.requires_grad) for n, p in model.named_parameters()}, saved.bytes


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_skeleton_is_the_trainer_s_model(model_type):
    """Parameters by name, dense and cut, exactly; activations of a real forward pass within a tenth (attentions differ)."""
    words = ("--max_seq_length", "24", "--target_sparsity", "0.4", "--per_device_train_batch_size", "4")
    config = parse(list(words))
    built = inventory.skeleton(tiny_config(model_type), config, torch.float32)
    cut = planner.plan_for(built.structure, 0.4, "params", 8)
    assert cut.sparsity("params") == pytest.approx(0.4, abs=0.15)
    tensors, activations = really(model_type, words)
    dense = inventory.take_stock(built, config, 4, 2)
    assert sizes(dense) == tensors and dense.activations == pytest.approx(activations, rel=0.1)
    inventory.cut_down(built, cut)
    small = inventory.take_stock(built, config, 4, 2, cut)
    tensors, activations = really(model_type, words, cut)
    assert sizes(small) == tensors and small.activations == pytest.approx(activations, rel=0.1)
    assert small.exported == sum(
        n for name, (n, _) in tensors.items() if "lora_" not in name and "prune_gate" not in name
    )
    assert small.macs < dense.macs


def test_the_batch_is_that_of_the_file(tmp_path):
    sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8}
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, **sizes}))
    of_file = planned(tiny_config("bert"), files=[tmp_path / "own.json"])
    words = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "8")
    of_options = planned(tiny_config("bert"), *words)
    assert of_file["run"] == of_options["run"] and of_file["run"]["per_device_train_batch_size"] == 4
    assert of_file["macs_per_step"] == of_options["macs_per_step"]


def test_recomputation_keeps_inputs_and_one_block():
    on, off = (
        planned(tiny_config("bert"), "--max_seq_length", "16", *more)["configs"][0]["phases"][0]["device_bytes"][
            "activations"
        ]
        for more in (("--gradient_checkpointing",), ())
    )
    assert off / 3 < on < off


@pytest.mark.parametrize("method", ["lora", "tmp", "full"])
def test_methods(method):
    found, ours = (planned(tiny_config("bert"), "--method", m) for m in (method, "prunadapt"))
    trains = found["model"]["trainable"]
    assert trains == found["model"]["parameters"] if method == "full" else 0 < trains < ours["model"]["trainable"]
    phases = [p["phase"] for p in found["configs"][0]["phases"]]
    assert phases == (["scoring", "after the cut"] if method == "tmp" else ["dense"])


def test_even_plans_meet_the_target():
    built = inventory.skeleton(llama("7B"), parse([]), torch.bfloat16)
    for budget in ("params", "macs"):
        cut = planner.plan_for(built.structure, 0.6, budget, 8)
        assert cut.sparsity(budget) == pytest.approx(0.6, abs=0.01)
    kept = inventory.skeleton(llama("7B"), parse(["--keep_in_outer_layers", "0.9"]), torch.bfloat16)
    cut = planner.plan_for(kept.structure, 0.6, "params", 8)
    first, second, *_, last = cut.counts()
    assert cut.sparsity("params") == pytest.approx(0.6, abs=0.01) and first["heads"] == 29 > second["heads"]
    assert first["neurons"] == last["neurons"] == 9912 > second["neurons"]
    assert PruningPlan.dense(built.structure).hash == planner.plan_for(built.structure, 0.0, "params", 8).hash


def run(capsys, *words):
    code = plan.main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_program_on_a_config_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "shape.json"
    tiny_config("llama").to_json_file(file)
    words = ("--model_name_or_path", str(file), "--world_size", "4", "--gpu_memory", "1GiB", "--task_type", "causal_lm")
    code, out, _ = run(capsys, *words)
    assert code == 0 and all(f.name in out for f in FILES) and "assumed: 1 GiB per GPU" in out
    code, out, _ = run(capsys, *words, "--json", "--ds_config", "ds_configs/zero3.json", "--max_seq_length", "64")
    found = json.loads(out)
    assert code == 0 and [c["file"] for c in found["configs"]] == ["zero3.json"]
    assert found["run"]["max_seq_length"] == 64 and len(found["configs"][0]["phases"]) == 9
    written = tmp_path / "plan.yaml"
    written.write_text(
        "world_size: 4\ngpu_memory: 1GiB\nmax_seq_length: 64\nds_config: ds_configs/zero3.json\njson: true\n"
    )
    assert run(capsys, *words[:2], *words[6:], "--config", str(written)) == (0, out, "")


def test_a_teacher_of_language_is_counted_and_rests_on_disk(tmp_path, capsys):
    file = tmp_path / "shape.json"
    tiny_config("llama").to_json_file(file)
    words = ("--model_name_or_path", str(file), "--task_type", "causal_lm", "--json")
    without = json.loads(run(capsys, *words)[1])["teacher_bytes"]
    code, out, _ = run(capsys, *words, "--distill_top_k", "16")
    taught = json.loads(out)["teacher_bytes"]
    assert code == 0 and without == {"logits": 0, "mean_weights": 0}
    assert taught["logits"] == 0 and taught["mean_weights"] == 4 * json.loads(out)["model"]["trainable"]


def test_mistakes_are_said_together(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, said = run(capsys, "--world_size", "0", "--flops", "fast", "--r", "0", "--dtype", "int8")
    assert code == 2 and not out and len(said.splitlines()) == 5
    assert all(word in said for word in ("world_size=0", "flops='fast'", "r=0", "dtype='int8'"))
    assert "did you mean --world_size?" in run(capsys, "--world_sise", "4")[2]
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "typeless.json").write_text('{"hidden_size": 8}')
    for path, word in (
        (tmp_path / "nothing.json", "no such file"),
        (tmp_path, "no configuration can be read"),
        (tmp_path / "list.json", "is not a JSON object"),
        (tmp_path / "typeless.json", "has no model_type"),
    ):
        code, _, said = run(capsys, "--model_name_or_path", str(path))
        assert code == 2 and word in said and "Traceback" not in said and len(said.splitlines()) == 1
    tiny_config("bert").to_json_file(tmp_path / "bert.json")
    code, _, said = run(capsys, "--model_name_or_path", str(tmp_path / "bert.json"), "--task_type", "causal_lm")
    assert code == 2 and "decoder" in said
    code, _, said = run(capsys, "--model_name_or_path", str(tmp_path / "bert.json"), "--target_sparsity", "0.999")
    assert code == 2 and "at most" in said
    for name, value, word in (
        ("pruned_structure", {"kept": []}, "is pruned already"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "is quantised"),
    ):
        config = tiny_config("bert")
        setattr(config, name, value)
        config.save_pretrained(tmp_path / name)
        for path in (name, f"{name}/config.json"):
            code, out, said = run(capsys, "--model_name_or_path", str(tmp_path / path))
            assert code == 2 and not out and word in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"hidden_size": "32"}, "expected int, got str"),
        ({"intermediate_size": None}, "expected int, got NoneType"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"num_hidden_layers": 0}, "has no layers"),
        ({"max_position_embeddings": 100}, "max_seq_length=128: the model takes at most 100 tokens"),
    ],
)
def test_configurations_of_no_model_are_refused(tmp_path, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(tiny_config("bert").to_json_string()), **changes}))
    code, out, said = run(capsys, "--model_name_or_path", str(path))
    assert code == 2 and not out and words in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("budget", "latency", "measured when a run starts"),
        ("target_speedup", "2", "measured when a run starts"),
        ("adapter_name_or_path", "x", "is not read here"),
    ],
)
def test_what_a_plan_does_not_know_is_refused(name, value, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert plan.main([f"--{name}", value]) == 2
    assert f"{name}=" in (said := capsys.readouterr().err) and words in said


@pytest.mark.parametrize(
    ("text", "value"), [("80GiB", 80 * 2**30), ("400GB/s", 4e11), ("4e14", 4e14), ("1.5T", 1.5e12)]
)
def test_quantities(text, value):
    assert plan.quantity(text) == value


@pytest.mark.parametrize("text", ["80", "80B", " 400 ", "0.5K", "999999"])
def test_a_quantity_without_its_unit(text):
    """80 bytes are no GPU's memory, whatever fits into them."""
    with pytest.raises(ValueError, match=r"write the unit: [0-9.]+GiB"):
        plan.quantity(text)


def test_a_gpu_of_80_bytes_is_refused(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert plan.main(["--gpu_memory", "80", "--bandwidth", "400"]) == 2
    said = capsys.readouterr().err
    assert "gpu_memory='80': is less than any GPU has; write the unit: 80GiB" in said and "bandwidth='400'" in said


@pytest.mark.parametrize("text", ["", "GiB", "-3", "0", "80 apples", "1e", "1.2.3", "1e999"])
def test_no_quantities(text):
    with pytest.raises(ValueError, match="such as 80GiB"):
        plan.quantity(text)


def test_the_checked_points_are_within_the_stated_bound():
    """What benchmarks/plan_check.py measured here lies beside its predictions."""
    files = sorted(Path(ROOT / "benchmarks/results/plan_check").glob("*.json"))
    ratios = [row["ratio"] for f in files for name, row in json.loads(f.read_text()).items() if name != "point"]
    assert len(files) >= 6 and all(0.85 <= ratio <= 1.15 for ratio in ratios), ratios


def test_the_logits_of_a_language_model_count_at_the_peak():
    """Beside the fp32 copy that the loss saves: the logits, and the gradients of the loss's picks and of the softmax."""
    tokens, words = 2 * 64, 32000
    found = []
    for more in ((), ("--gradient_checkpointing",)):
        files = (
            "--task_type",
            "causal_lm",
            "--train_file",
            __file__,
            "--validation_file",
            __file__,
            "--max_seq_length",
            "64",
        )
        config = parse([*files, *more])
        built = inventory.skeleton(llama("7B", num_hidden_layers=1), config, torch.bfloat16)
        outside, blocks, largest, inputs = inventory.kept_bytes(built, 2, 64, 2)
        assert outside >= 4 * tokens * words
        found.append(inventory.take_stock(built, config, 2, 2).activations)
        logits = tokens * words * (2 + 4 + 4)
        assert found[-1] == outside + (inputs + max(largest, logits) if more else blocks + logits)
    assert found[0] > found[1]


def test_what_offloading_moves():
    """Partitions of what trains as well, with their gradients; only what stays whole between steps stays on the GPU."""
    config = parse(["--method", "full"])
    (_, _, dense), *_ = planner.phases(
        inventory.skeleton(llama("7B", num_hidden_layers=1), config, torch.bfloat16), config, 1, 2
    )
    files, machine = {f.name: f for f in FILES}, zero_costs.Machine(world_size=2)
    parts = {}
    for name in ("zero3.json", "zero3_offload_cpu.json", "zero3_offload_nvme.json"):
        parts[name] = zero_costs.rank_bytes(dense, resolved(files[name], 2), machine, recomputes=False)
    here, there, on_disk = parts.values()
    moved = ("frozen", "trainable", "gradients", "optimizer")
    whole = 2 * dense.whole(resolved(files["zero3.json"], 2).values["zero_optimization"])
    assert 0 < whole == there["device"]["trainable"] and sum(there["device"][n] for n in moved) == whole
    assert sum(there["host"].values()) == sum(here["device"][n] for n in moved) - whole
    assert on_disk["host"]["frozen"] == on_disk["host"]["trainable"] == 0
    assert (
        on_disk["host"]["buffers"] == 5 * 200_000_000 * 2 and on_disk["host"]["optimizer"] == there["host"]["optimizer"]
    )
