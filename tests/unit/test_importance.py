"""Per-sample statistics: exact, and the same for every split of the same samples (law 2)."""

from dataclasses import replace

import pytest
import torch

from prunadapt_ds import adapters, gates
from prunadapt_ds.importance import CRITERIA, FORWARD, STATISTICS, Recorder, ScoreAverage, WindowSums, criterion
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.objective import sample_losses, task_loss
from tests.tiny import VARIANTS, layout_and_structure, tiny_model

pytestmark = pytest.mark.fast
MODELS = [*FAMILIES, *VARIANTS]
ROWS, TOKENS = 8, 12


def gated(model_type, *, activations=True, seed=0):
    model = tiny_model(model_type, num_labels=3, seed=seed)
    layout, structure = layout_and_structure(model, TOKENS)
    torch.manual_seed(seed)
    model.requires_grad_(False)
    adapters.add_lora(model, layout, adapters.target_modules(layout), r=2, lora_alpha=4)
    recorder = Recorder(structure.num_units, activations=activations)
    gates.attach(model, layout, structure, recorder)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "delta" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    return model, layout, structure, recorder


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 150, (ROWS, TOKENS), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, length in enumerate((12, 5, 9, 12, 3, 7, 12, 10)):
        attention_mask[row, length:] = 0
    return input_ids, attention_mask, torch.randint(0, 3, (ROWS,), generator=generator)


def record(model, recorder, chunks, accumulation=1, teacher=None):
    """Window sums of the rows in `chunks`, each one micro-batch: (rows, weight per row)."""
    input_ids, attention_mask, labels = batch()
    for rows, weight in chunks:
        weights = torch.full((len(rows),), weight)
        recorder.begin(weights / accumulation, attention_mask[rows])
        logits = model(input_ids=input_ids[rows], attention_mask=attention_mask[rows]).logits
        losses = sample_losses(
            logits,
            labels[rows],
            is_regression=False,
            teacher=None if teacher is None else teacher[rows],
            distill_weight=0.5,
        )
        ((losses * weights).sum() / accumulation).backward()
        recorder.end()
    return recorder.all_reduce()


def split(size, weight=None):
    return [(list(range(i, min(i + size, ROWS))), weight or 1 / size) for i in range(0, ROWS, size)]


def assert_same(a: WindowSums, b: WindowSums):
    assert a.count == b.count == ROWS
    for name in STATISTICS:
        torch.testing.assert_close(a.sums[name], b.sums[name], rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("model_type", MODELS)
def test_equals_autograd_sample_by_sample(model_type):
    """The slow way: one sample at a time, its own loss at weight 1, autograd's gradient of a mask that is a leaf."""
    model, _, structure, recorder = gated(model_type)
    keep = torch.rand(structure.num_units, generator=torch.Generator().manual_seed(5)) > 0.3
    gates.apply_mask(model, keep)
    teacher = torch.randn(ROWS, 3)
    fast = record(model, recorder, split(ROWS), teacher=teacher)

    input_ids, attention_mask, labels = batch()
    masks = {}

    def leaf_mask(gate):
        def forward(x):
            m = masks.setdefault(gate.start, gate.mask.clone().requires_grad_())  # one leaf, however often it is used
            return (x.unflatten(-1, (gate.num_units, gate.width)) * ((1 + gate.delta) * m)[:, None]).flatten(-2)

        return forward

    for gate in gates.gates_of(model):
        gate.forward = leaf_mask(gate)
    slow = torch.zeros(2, structure.num_units)
    for row in range(ROWS):
        masks.clear()
        logits = model(input_ids=input_ids[[row]], attention_mask=attention_mask[[row]]).logits
        loss = sample_losses(logits, labels[[row]], is_regression=False, teacher=teacher[[row]], distill_weight=0.5)
        d = torch.cat(torch.autograd.grad(loss.sum(), [masks[start] for start in sorted(masks)]))
        slow += torch.stack([d.square(), d.abs()])
    torch.testing.assert_close(fast.sums["grad_sq"], slow[0], rtol=1e-3, atol=1e-10)
    torch.testing.assert_close(fast.sums["grad_abs"], slow[1], rtol=1e-3, atol=1e-7)
    assert (fast.sums["grad_sq"][~keep] > 0).any(), "cut units must go on being scored"


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize(
    "chunks, accumulation",
    [
        (split(4), 1),
        (split(4), 2),
        (split(2, weight=4 / ROWS), 4),
        ([(list(range(5)), 1 / 5), (list(range(5, 8)), 1 / 3)], 1),
        ([(list(range(8)), 1 / 8), ([0], 0.0)], 1),
    ],
    ids=["halves", "accumulated", "accumulated-weighted", "ragged", "idle-rank"],
)
def test_same_for_every_split(model_type, chunks, accumulation):
    model, _, _, recorder = gated(model_type)
    whole = record(model, recorder, split(ROWS))
    assert_same(whole, record(model, recorder, chunks, accumulation))


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_same_under_gradient_checkpointing(model_type, use_reentrant):
    model, _, _, recorder = gated(model_type)
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers cannot recompute this family's blocks")
    whole = record(model, recorder, split(ROWS))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    model.train()
    assert_same(whole, record(model, recorder, split(ROWS)))


def test_chunked_feed_forward_adds_before_squaring():
    model, _, _, recorder = gated("bert")
    whole = record(model, recorder, split(ROWS))
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 4
    chunked = record(model, recorder, split(ROWS))
    assert_same(whole, chunked)


def test_activations_ignore_padding():
    model, _, structure, recorder = gated("bert")
    short = record(model, recorder, split(ROWS))
    assert short.sums["activation_abs"].shape == (structure.num_units,)
    input_ids, attention_mask, labels = batch()
    recorder.begin(torch.full((ROWS,), 1 / ROWS), torch.nn.functional.pad(attention_mask, (0, 4)))
    padded = torch.nn.functional.pad(input_ids, (0, 4))
    logits = model(input_ids=padded, attention_mask=torch.nn.functional.pad(attention_mask, (0, 4))).logits
    task_loss(logits, labels, False).mean().backward()
    recorder.end()
    torch.testing.assert_close(
        recorder.all_reduce().sums["activation_abs"], short.sums["activation_abs"], rtol=1e-4, atol=1e-7
    )


def test_powers_of_activations():
    """Against the inputs of the output projections themselves."""
    model, layout, _, recorder = gated("llama")
    seen = []
    for layer in model.get_submodule(layout.layers):
        for sub in layout.sublayers:
            gates.gate_before(layer, sub.output.path).register_forward_pre_hook(
                lambda m, args, sub=sub: seen.append(args[0].detach().unflatten(-1, (-1, sub.width)))
            )
    found = record(model, recorder, split(ROWS))
    mask = batch()[1].float()
    for name, power in FORWARD.items():
        means = [(x.abs() ** power).mean(3) * mask[:, :, None] for x in seen]
        wanted = torch.cat([(m.sum(1) / mask.sum(1, keepdim=True)).sum(0) for m in means])
        torch.testing.assert_close(found.sums[name], wanted, rtol=1e-4, atol=1e-9)


def test_gate_gradient_equals_autograd():
    model, _, structure, recorder = gated("bert")
    keep = torch.rand(structure.num_units, generator=torch.Generator().manual_seed(2)) > 0.3
    gates.apply_mask(model, keep)
    record(model, recorder, split(ROWS))
    ours = {g.start: g.delta.grad.clone() for g in gates.gates_of(model)}
    model.zero_grad()
    for gate in gates.gates_of(model):

        def plain(x, gate=gate):
            scale = ((1 + gate.delta) * gate.mask)[:, None]
            return (x.unflatten(-1, (gate.num_units, gate.width)) * scale).flatten(2)

        gate.forward = plain
    record(model, recorder, split(ROWS))
    for gate in gates.gates_of(model):
        torch.testing.assert_close(ours[gate.start], gate.delta.grad, rtol=1e-3, atol=1e-7)


def test_nothing_is_recorded_when_not_asked():
    model, _, _, recorder = gated("bert")
    input_ids, attention_mask, labels = batch()
    task_loss(model(input_ids=input_ids, attention_mask=attention_mask).logits, labels, False).mean().backward()
    assert recorder.all_reduce().count == 0


def test_gate_keeps_small_updates_in_bf16():
    gate = gates.Gate(4, 2, 0, dtype=torch.bfloat16, device=torch.device("cpu"))
    with torch.no_grad():
        gate.delta.fill_(1e-3)
    out = gate(torch.ones(1, 1, 8))
    torch.testing.assert_close(out, torch.full_like(out, 1 + gate.delta[0].item()), rtol=0, atol=1e-7)
    assert (out != 1).all()


def test_detach_undoes_attach():
    model, *_ = gated("bert")
    gates.detach(model)
    assert not list(gates.gates_of(model))
    assert not any("prune_gate" in name for name, _ in model.named_modules())
    input_ids, attention_mask, _ = batch()
    model(input_ids=input_ids, attention_mask=attention_mask)


def window(**sums):
    u = len(next(iter(sums.values())))
    full = {name: torch.tensor(sums.get(name, [0.0] * u)) for name in STATISTICS}
    return WindowSums(full, 4.0, seed=3)


def test_criteria():
    assert set(CRITERIA) == {"fisher", "taylor", "outlier", "activation_norm", "magnitude", "random"}
    w = window(grad_sq=[4.0, 8.0], grad_abs=[2.0, 6.0], activation_abs=[1.0, 3.0])
    assert CRITERIA["fisher"].score(w).tolist() == [1.0, 2.0]
    assert CRITERIA["taylor"].score(w).tolist() == [0.5, 1.5]
    assert CRITERIA["magnitude"].score(w).tolist() == [0.25, 0.75]
    a = window(grad_abs=[2.0, 6.0, 1.0], activation_sq=[4.0, 16.0, 0.0], activation_4th=[12.0, 256.0, 0.0])
    assert CRITERIA["activation_norm"].score(a).tolist() == [1.0, 2.0, 0.0]
    # Kurtosis of means 1 and 4, 3 and 64: 3 and 4. A unit that is always 0 has no outliers.
    assert CRITERIA["outlier"].score(a).tolist() == pytest.approx([0.5 * 3**0.5, 1.5 * 2, 0.25])
    drawn = CRITERIA["random"].score(a)
    assert torch.equal(drawn, CRITERIA["random"].score(a)) and len(set(drawn.tolist())) == 3, "the same on every rank"
    assert not torch.equal(drawn, CRITERIA["random"].score(replace(a, seed=4)))


def test_registry_refuses_taken_names_and_unknown_statistics():
    with pytest.raises(ValueError, match="registered already"):
        criterion("grad_sq")(CRITERIA["fisher"].score)
    with pytest.raises(ValueError, match="reads"):
        criterion("hessian")(lambda w: w)


def test_score_average():
    average, all_seen = ScoreAverage(0.5), torch.tensor([True, True])
    assert average.update(torch.tensor([2.0, 6.0]), all_seen).tolist() == [2.0, 6.0]
    assert average.update(torch.tensor([4.0, 0.0]), torch.tensor([True, False])).tolist() == [3.0, 6.0]
    assert average.update(torch.tensor([5.0, 8.0]), all_seen).tolist() == [4.0, 7.0]
