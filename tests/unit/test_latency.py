"""Measured times of sub-layers: curves, sizes, and that what is timed is what it is said to be."""

import json
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunadapt_ds import latency, reload
from prunadapt_ds.models.families import FAMILIES
from tests.tiny import VARIANTS, layout_and_structure, tiny_model

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
