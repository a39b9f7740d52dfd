"""Measured times of sub-layers: curves, sizes, and that what is timed is what it is said to be."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from prunadapt_ds import export, latency, proof, reload
from prunadapt_ds.batches import Rows
from prunadapt_ds.budget import PruningPlan
from prunadapt_ds.label_scale import LabelScale
from prunadapt_ds.models.families import FAMILIES
from tests.tiny import VARIANTS, layout_and_structure, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.fast


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-1000, 10**6), min_size=2, max_size=9), st.integers(0, 3), st.integers(1, 40))
def test_a_curve_never_falls_and_begins_at_nothing(ns, least, step):
    points = tuple((least + step * i, t) for i, t in enumerate(ns))
    found = latency.curve(points, points[-1][0])
    assert len(found) == points[-1][0] + 1 and set(found[: least + 1]) == {0}
    assert all(b >= a for a, b in pairwise(found))
    if ns == sorted(ns):
        assert [found[n] for n, _ in points] == [t - ns[0] for t in ns], "what rises already stays as it was measured"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 1), st.integers(1, 64))
def test_sizes_hold_the_ends(num_units, least, multiple):
    found = latency.sizes(num_units, least, multiple)
    assert found[0] == least and found[-1] == num_units and len(found) <= latency.POINTS + 3
    assert all((n - least) % multiple == 0 for n in found[:-1])


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_each_width_is_timed(name, monkeypatch):
    """With a clock that ticks once per parameter, times are parameters: of every family, at every width."""
    monkeypatch.setattr(
        latency,
        "seconds",
        lambda block, *args: _runs(block, *args) and 1e-9 * sum(p.numel() for p in block.parameters()),
    )
    monkeypatch.setattr(latency, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(latency, "MOST_ROUNDS", 1)
    model = tiny_model(name, max_position_embeddings=130)
    layout, structure = layout_and_structure(model, 16)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    table = latency.measure(
        model,
        layout,
        batch_size=2,
        seq_length=16,
        neuron_multiple=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        name="cpu",
    )
    assert torch.equal(torch.get_rng_state(), state), "only rank 0 measures, and ranks must draw alike"
    assert latency.LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    timed = latency.with_times(structure, layout, table)
    draw = np.random.default_rng(0)
    for _ in range(5):
        counts = [int(draw.integers(s.floor, s.num_units + 1)) for s in structure.sublayers]
        less = {b: timed.dense_cost(b) - timed.cost(b, counts) for b in ("params", "latency")}
        assert less["latency"] == layout.passes * less["params"]
    assert timed.fixed_latency > 0


def test_a_busy_machine_is_timed_by_its_processor(monkeypatch):
    """A clock that jumps at random, and a processor's that does not."""
    draw = np.random.default_rng(0)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(draw.random() * 1e6))
    monkeypatch.setattr(latency, "MOST_ROUNDS", 3)
    model = tiny_model("bert")
    layout, _ = layout_and_structure(model, 16)
    options = {"batch_size": 2, "seq_length": 16, "neuron_multiple": 8, "dtype": torch.float32, "name": "cpu"}
    before = torch.get_num_threads()
    table = latency.measure(model, layout, device=torch.device("cpu"), **options)
    assert (table.clock, table.threads) == ("cpu", 1) and torch.get_num_threads() == before
    assert 0 < table.layer_ns < 1e9 and all(ns < 1e9 for _, ns in (*table.heads, *table.neurons))


def _runs(block, args, kwargs, device, calls, clock):
    out = block(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    return out.shape[:2] == (2, 16) and calls == 1 and clock is time.perf_counter


def test_the_worst_logit_of_all_sets_is_what_is_compared():
    first, second = torch.tensor([[1.0, -3.0]]), torch.tensor([[0.5, 2.0], [4.0, 0.0]])
    found = proof.compare_logits({"a": (first, first), "b": (second, second - torch.tensor([[0.0, 0.25], [0.0, 0.0]]))})
    assert found == {"max_abs_logit_diff": 0.25, "tolerance": pytest.approx(4e-4), "examples": 3}


@pytest.mark.parametrize(
    "scale, off, passes",
    [
        (LabelScale(0.0, 1e-5), 1e-8, False),  # a rate of something rare: an export that answers 0 would pass otherwise
        (LabelScale(0.0, 1e-5), 1e-10, True),
        (LabelScale(1e6, 10.0), 2.0, False),
        (LabelScale(1e6, 10.0), 0.0625, True),  # fp32 holds these numbers no better
    ],
)
def test_answers_of_a_regression_are_compared_in_units_of_its_labels(scale, off, passes):
    trained = scale.restored(torch.tensor([[-1.0], [0.5], [1.5]]))
    found = proof.compare_logits({"a": (trained, trained + off)}, scale)
    assert (found["max_abs_logit_diff"] <= found["tolerance"]) is passes, found


def test_a_gpu_that_does_not_compute_the_proof_leaves_it_to_the_cpu(monkeypatch):
    """Too small beside the run's engine, or taken by one process only. What the CPU cannot do either has failed."""
    asked = []

    def answer_on(device, request, why=""):
        asked.append((device, request["latency"], why))
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(reload, "answer_on", answer_on)
    reload.answer({"device": "cuda:0", "latency": {"repeats": 3}})
    assert asked == [
        ("cuda:0", {"repeats": 3}, ""),
        ("cpu", None, "cuda:0 did not compute it: CUDA out of memory."),
    ]
    asked.clear()
    with pytest.raises(torch.OutOfMemoryError):
        reload.answer({"device": "cpu", "latency": None})


TIMED_BY_SIZE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("reload", sys.argv[1])
reload = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reload)
reload.latency = lambda models, batch_size, **options: (
    [float(batch_size * sum(p.numel() for p in m.parameters())) for m in models], 1)
reload.answer(json.loads(open(sys.argv[2]).read()))
"""


def test_the_dense_model_is_timed_beside_the_exported_one(tmp_path):
    model = tiny_model("bert")
    layout, structure = layout_and_structure(model, 16)
    mask = torch.ones(structure.num_units, dtype=torch.bool)
    mask[1:40] = False
    plan = PruningPlan.from_mask(structure, mask)
    tokenizer, folder = tiny_tokenizer(tmp_path / "tokenizer"), tmp_path / "compact"
    assert export.export(model, layout, plan, tokenizer, folder)
    rows = Rows(Dataset.from_list([{"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1], "labels": 0}]), tokenizer)
    timing = {"batch_size": 3, "seq_length": 4, "repeats": 1, "dtype": "float32"}
    asked = proof.Reload(folder, {"rows": rows}, 1, torch.device("cpu"), needs_remote_code=True, latency=timing)
    (tmp_path / "request.json").write_text(json.dumps(asked.request(tmp_path)))
    words = [sys.executable, "-c", TIMED_BY_SIZE, reload.__file__, str(tmp_path / "request.json")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "result.json").read_text())["latency"]
    kept = sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    dense = sum(p.numel() for p in model.parameters())
    assert found["dense_ms_batch_1"] == dense > found["exported_ms_batch_1"] == kept
    assert found["dense_ms"] == 3 * dense and found["exported_ms"] == 3 * kept
    assert found["speedup"] == pytest.approx(found["dense_ms"] / found["exported_ms"])


@pytest.mark.parametrize(("call_s", "repeats", "warm_up"), [(0.1, 20, 3), (2.0, 12, 3), (9.0, 3, 1)])
def test_models_that_take_long_are_timed_less_often(monkeypatch, call_s, repeats, warm_up):
    clock, calls = [0.0], []

    def model(**inputs):
        calls.append(inputs["input_ids"].shape)
        clock[0] += call_s

    model.config = SimpleNamespace(vocab_size=9)
    monkeypatch.setattr(reload.time, "perf_counter", lambda: clock[0])
    times, found = reload.latency([model, model], 1, 4, 20, torch.device("cpu"), seconds=60)
    assert (found, len(calls)) == (repeats, 2 * (repeats + warm_up)) and set(calls) == {(1, 4)}
    assert times == pytest.approx([1000 * call_s] * 2)
