"""The laws, on real ranks: gloo, ZeRO-3, the real program on a tiny model."""

import json
from itertools import pairwise

import pytest
import torch

from prunadapt_ds.config import OPTIONS
from prunadapt_ds.models.families import FAMILIES
from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.tiny import tiny_data, tiny_folder, tiny_model

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("tiny")
    tiny_folder(base / "bert", "bert")
    tiny_data(base / "data", n_train=37, n_dev=21)
    return base


def ds_config(path, stage=3, zero=None, **more):
    values = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": stage,
            **({"stage3_param_persistence_threshold": 100_000} if stage == 3 else {}),
            **(zero or {}),
        },
        **more,
    }
    path.write_text(json.dumps(values))
    return str(path)


def of_method(method, defaults):
    """Those of the options that have an effect with the method."""
    needs = {name: OPTIONS[name].limits["needs"].get("method", [method]) for name in defaults}
    return {name: value for name, value in defaults.items() if method in needs[name]}


def arguments(folder, output, *, stage=3, batch=4, zero=None, **options):
    """`zero`: more of the ds_config's ZeRO block; {"stage3_max_reuse_distance": 0} has blocks fetched module by module."""
    data = folder / "data"
    defaults = {
        "model_name_or_path": folder / "bert",
        "train_file": data / "train.csv",
        "validation_file": data / "validation.csv",
        "output_dir": output,
        "per_device_train_batch_size": batch,
        "max_seq_length": 32,
        "max_steps": 8,
        "logging_steps": 1,
        "num_decisions": 2,
        "learning_rate": 3e-3,
        "distill_weight": 0.5,
        "distill_min_r2": -1000,  # after a few steps no teacher knows anything: these follow it all the same
    }
    if not options.get("distill_weight", defaults["distill_weight"]):
        del defaults["distill_min_r2"]
    options = of_method(options.get("method", "prunadapt"), defaults) | options
    output.mkdir(parents=True, exist_ok=True)
    argv = ["--ds_config", ds_config(output / "ds.json", stage, zero)]
    for name, value in options.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


# ------------------------------------------------------------------------------------------------------ law 1


@pytest.mark.parametrize("method", ["prunadapt", "tmp", "lora"])
def test_frozen_weights_are_sharded_and_untouched(folder, tmp_path, method):
    for result in run_ranks(runs.fit, 2, arguments(folder, tmp_path / "out", method=method)):
        assert result["frozen_same"] and result["num_frozen"] > 20
        assert max(result["frozen_shares"]) <= 1 / 2 + 0.02, "after training, after evaluation"
        assert min(result["frozen_shares"]) >= 1 / 2 - 0.02, "and all of it is somewhere"
        assert len(set(result["losses"])) > 1


def test_layers_beyond_the_persistence_threshold_are_sharded(folder, tmp_path):
    """Matrices of 262,144 elements, which DeepSpeed shards, beside vectors, which it would keep whole."""
    tiny_folder(tmp_path / "wide", "bert", hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
    argv = arguments(folder, tmp_path / "out", model_name_or_path=tmp_path / "wide", max_steps=4)
    for result in run_ranks(runs.fit, 2, argv):
        assert result["frozen_same"] and max(result["frozen_shares"]) <= 1 / 2 + 0.02


def test_an_evaluation_keeps_no_weights_for_a_backward_pass(folder, tmp_path):
    argv = arguments(folder, tmp_path / "out", max_steps=6, per_device_eval_batch_size=4)
    zero = {"stage": 3, "stage3_prefetch_bucket_size": 0}
    ds_config(tmp_path / "out" / "ds.json", zero_optimization=zero)
    for result in run_ranks(runs.fit, 2, argv):
        assert len(result["shares_in_evaluation"]) == 3
        assert max(result["shares_in_evaluation"]) <= 1 / 2 + 0.02


def test_the_whole_head_trains(folder, tmp_path):
    trained = run_ranks(runs.fit, 2, arguments(folder, tmp_path / "out", method="lora"))[0]["trained"]
    heads = {name for name in trained if "lora_" not in name}
    assert heads == {f"{m}.{k}" for m in ("bert.pooler.dense", "classifier") for k in ("weight", "bias")}


@pytest.mark.parametrize("stage", [3, 0])
def test_the_optimizer_is_what_the_deepspeed_file_says(folder, tmp_path, stage):
    argv = arguments(folder, tmp_path / "out", stage=stage, max_steps=2, num_decisions=1)
    argv = argv[: (at := argv.index("--learning_rate"))] + argv[at + 2 :]
    adam = {"lr": 2e-3, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.3}
    zero = {"stage": stage}
    ds_config(tmp_path / "out" / "ds.json", stage, zero, optimizer={"type": "AdamW", "params": adam})
    for result in run_ranks(runs.fit, 2, argv):
        groups = {group.pop("name"): group for group in result["groups"]}
        assert {tuple(g["betas"]) for g in groups.values()} == {(0.8, 0.9)}
        assert {g["eps"] for g in groups.values()} == {1e-7}
        assert {name: (g["base_lr"], g["weight_decay"]) for name, g in groups.items()} == {
            "adapters": (2e-3, 0.3),
            "head": (2e-3, 0.3),
            "head_no_decay": (2e-3, 0.0),
            "backbone_no_decay": (2e-3, 0.0),  # norms
            "gates": (1e-2, 0.0),
        }


def test_tmp_adapts_what_its_paper_does(folder, tmp_path):
    """LoRA on query, key and value alone, of rank 8 in a third of the layers and 4 elsewhere, beside norms and head; and one
    plan and one loss curve for every split."""
    found = [
        run_ranks(runs.fit, ranks, arguments(folder, tmp_path / str(ranks), batch=8 // ranks, method="tmp"))[0]
        for ranks in (1, 2)
    ]
    one, two = found
    ranks = two["lora_ranks"]
    assert {name.rpartition(".")[2] for name in ranks} == {"query", "key", "value"}
    by_layer = {name.partition(".attention")[0]: rank for name, rank in ranks.items()}
    assert sorted(by_layer.values()) == [4, 4, 8]
    assert any("LayerNorm" in name for name in two["trained"]) and one["plan_hash"] == two["plan_hash"]
    assert one["lora_ranks"] == ranks and one["losses"] == pytest.approx(two["losses"], abs=1e-5)


@pytest.mark.parametrize("stage", [3, 0])
def test_a_head_of_the_same_classes_in_another_order_is_put_into_ours(folder, tmp_path, stage):
    model = tiny_model("bert", 2)
    model.config.id2label, model.config.label2id = {0: "GOOD", 1: "BAD"}, {"GOOD": 0, "BAD": 1}
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1.0, 2.0]))
    tiny_folder(tmp_path / "tuned", "bert")
    model.save_pretrained(tmp_path / "tuned")
    argv = arguments(folder, tmp_path / "out", stage=stage, model_name_or_path=tmp_path / "tuned")
    for (weight, bias), notes in run_ranks(runs.head_of_a_classifier, 2, argv):
        assert bias == [2.0, 1.0] and weight == model.classifier.weight.flip(0).tolist()
        assert "knew the classes as GOOD, BAD" in notes[-1]


def test_a_checkpoint_is_gathered_where_it_is_written(folder, tmp_path):
    """What trains may be the whole model (--method full), of which a host with several ranks holds a copy and not several."""
    writer, other = run_ranks(runs.gathered_for_a_checkpoint, 2, arguments(folder, tmp_path / "out", method="full"))
    assert len(set(writer.values())) == 1 and writer["master"] > 20 and set(other.values()) == {0}


# ------------------------------------------------------------------------------------------------------ law 2


@pytest.fixture(scope="module")
def scores_of_one_rank(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("scores") / "out"
    output.mkdir()
    (output / "metrics.jsonl").write_text("of a run\n")
    found = run_ranks(runs.score, 1, arguments(folder, output, batch=8))[0]
    assert (output / "metrics.jsonl").read_text() == "of a run\n" and not (output / "runs").exists()
    assert all(min(sums) > 0 for name, sums in found.items() if name != "sample_ids"), "those of every criterion"
    return found


@pytest.mark.parametrize(
    "world_size, options",
    [
        (2, {"batch": 4}),
        (1, {"batch": 4, "gradient_accumulation_steps": 2}),
        (2, {"batch": 3, "gradient_accumulation_steps": 2}),
        (2, {"batch": 8, "gradient_checkpointing": True}),
        (1, {"batch": 5, "stage": 0}),
        (2, {"batch": 16, "stage": 1}),
        (2, {"batch": 4, "stage": 2, "gradient_accumulation_steps": 2}),
    ],
    ids=["2x4", "1x4x2", "2x3x2", "checkpointing", "stage0", "idle-rank-stage1", "stage2"],
)
def test_scores_do_not_depend_on_the_split(folder, tmp_path, scores_of_one_rank, world_size, options):
    found = run_ranks(runs.score, world_size, arguments(folder, tmp_path / "out", **options))[0]
    assert found["count"] == scores_of_one_rank["count"] == [37.0]
    assert sorted(found["sample_ids"]) == list(range(37))
    for name in ("grad_sq", "grad_abs", "activation_abs"):
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(scores_of_one_rank[name]), rtol=1e-3, atol=1e-15
        )


def test_a_skipped_layer_keeps_its_score(folder, tmp_path):
    """No sample passes it, which is no evidence against it: it may still come back."""
    options = {"uniform": True, "target_sparsity": 0.7, "prune_end": 0.9, "num_decisions": 4, "max_steps": 10}
    made, layers = run_ranks(runs.decisions, 1, arguments(folder, tmp_path / "out", shrink="never", **options))[0]
    for (before, skipped), (after, _) in pairwise(made):
        assert {layer for layer, old, new in zip(layers, before, after, strict=True) if old == new} == set(skipped)
    assert made[-2][1], "a layer is skipped before the last decision"


# ------------------------------------------------------------------------------------------------------ law 3


@pytest.fixture(scope="module")
def one_rank(folder, tmp_path_factory):
    """Shrinks at every decision: `auto` would ask the clock, and a unit that is gone has no scores any more."""
    argv = arguments(folder, tmp_path_factory.mktemp("one") / "out", batch=8, shrink="always")
    return run_ranks(runs.fit, 1, argv)[0]


@pytest.mark.parametrize(
    "world_size, options",
    [
        (2, {"batch": 4}),
        (1, {"batch": 4, "gradient_accumulation_steps": 2}),
        (2, {"batch": 4, "stage": 0}),
        (2, {"batch": 4, "stage": 1}),
        (2, {"batch": 2, "stage": 2, "gradient_accumulation_steps": 2}),
        (2, {"batch": 4, "gradient_checkpointing": True}),
        (2, {"batch": 4, "gradient_checkpointing": True, "zero": {"stage3_max_reuse_distance": 0}}),
    ],
    ids=["2x4", "1x4x2", "stage0", "stage1", "stage2", "checkpointing", "checkpointing-modules"],
)
def test_loss_curve_does_not_depend_on_the_split(folder, tmp_path, one_rank, world_size, options):
    found = run_ranks(runs.fit, world_size, arguments(folder, tmp_path / "out", shrink="always", **options))
    assert found[0]["losses"] == pytest.approx(one_rank["losses"], rel=1e-4, abs=1e-5)
    assert len(found[0]["losses"]) == 8 and found[0]["losses"][0] != found[0]["losses"][-1]
    assert {r["plan_hash"] for r in found} == {one_rank["plan_hash"]}
    torch.testing.assert_close(
        torch.tensor(found[0]["scores"]), torch.tensor(one_rank["scores"]), rtol=1e-3, atol=1e-15
    )
    logits = [torch.tensor(r["logits"]["validation"]) for r in (*found, one_rank)]
    for other in logits[:-1]:
        torch.testing.assert_close(other, logits[-1], rtol=1e-2, atol=5e-3)


# ------------------------------------------------------------------------------------- blocks fetched as one piece


def check_gradients(tmp_path, folder, model_types):
    """ZeRO-3, with each block in one piece, without, and recomputed, finds what plain data parallelism finds."""
    kinds = {"plain": (0, {}), "pieces": (3, {}), "modules": (3, {"stage3_max_reuse_distance": 0})}
    names = [(m, *kind) for kind in kinds.items() for m in model_types]  # ZeRO-3 last: what it shards stays so
    names += [(m, "recomputed", (3, {})) for m in model_types if tiny_model(m).supports_gradient_checkpointing]
    argvs = []
    for model_type, kind, (stage, zero) in names:
        if not (tmp_path / model_type).exists():
            tiny_folder(tmp_path / model_type, model_type, seed=3)
        options = {"model_name_or_path": tmp_path / model_type, "gradient_checkpointing": kind == "recomputed"}
        argv = arguments(folder, tmp_path / f"{model_type}-{kind}", **options)
        ds_config(tmp_path / f"{model_type}-{kind}" / "ds.json", zero_optimization={"stage": stage, **zero})
        argvs.append(argv)
    found = dict(zip([name[:2] for name in names], run_ranks(runs.gradients, 2, argvs)[0], strict=True))
    for (model_type, kind), result in found.items():
        is_in_pieces = kind in ("pieces", "recomputed") and not FAMILIES[model_type].shares_layers
        assert (result["pieces"] > 0) == is_in_pieces, (model_type, kind)
        plain = found[model_type, "plain"]["gradients"]
        assert result["gradients"].keys() == plain.keys()
        for name, gradient in result["gradients"].items():
            torch.testing.assert_close(
                torch.tensor(gradient),
                torch.tensor(plain[name]),
                rtol=1e-3,
                atol=1e-6,
                msg=f"{model_type} {kind} {name}",
            )


def test_gradients_of_blocks_in_one_piece(folder, tmp_path):
    check_gradients(tmp_path, folder, ["llama", "albert"])


@pytest.mark.full
def test_gradients_of_blocks_in_one_piece_in_every_family(folder, tmp_path):
    check_gradients(tmp_path, folder, list(FAMILIES))


# ------------------------------------------------------------------------------------------------------ gates


def test_gates_train_when_nothing_persists(folder, tmp_path, one_rank):
    """A gate is fetched by ZeRO-3 like any module: with a persistence threshold of 0 it still trains, and the same."""
    found = run_ranks(_fit_without_persistence, 2, arguments(folder, tmp_path / "out", batch=4, shrink="always"))
    assert any(abs(d) > 1e-4 for d in found[0]["deltas"])
    torch.testing.assert_close(torch.tensor(found[0]["deltas"]), torch.tensor(one_rank["deltas"]), rtol=5e-2, atol=2e-3)


def _fit_without_persistence(argv):
    return runs.fit(argv, threshold_zero=True)


def test_both_kinds_are_cut_and_layers_differ(one_rank):
    counts = one_rank["counts"]
    assert len({(c["heads"], c["neurons"]) for c in counts}) > 1


def test_learning_rates_by_group(folder, tmp_path):
    argv = arguments(folder, tmp_path / "out", max_steps=10, warmup_ratio=0.4, gate_learning_rate=0.02)
    rates = run_ranks(runs.fit, 1, argv)[0]["learning_rates"]
    adapters, gate_rates = ([r[f"learning_rate/{g}"] for r in rates] for g in ("adapters", "gates"))
    assert adapters[0] == pytest.approx(3e-3 / 4) and gate_rates[0] == pytest.approx(0.02 / 4)
    assert adapters[3] == pytest.approx(3e-3) and gate_rates[3] == pytest.approx(0.02)
    assert adapters[9] == pytest.approx(3e-3 / 6) and gate_rates[9] == pytest.approx(0.02 / 6)


# ------------------------------------------------------------------------------------- law 6, and all ranks alike


def test_ranks_that_disagree_stop():
    messages = run_ranks(runs.disagree, 2, 1)
    assert all("[1]" in m and "the plan" in m for m in messages)
    assert run_ranks(runs.disagree, 2, 5) == [None, None]


def test_a_mistake_that_one_rank_sees_stops_all():
    assert len(set(run_ranks(runs.mistake_on_one_rank, 2))) == 1


def test_hosts_that_hold_other_files_stop():
    """Under ZeRO-3 each rank reads its own part of a matrix from its own host: two revisions would be mixed without a word."""
    assert run_ranks(runs.hosts, 2, "same") == [{"backbone": "same"}] * 2
    said = run_ranks(runs.hosts, 2, "other")
    assert said[0] == said[1] and said[0].startswith(
        "RanksDisagree: the model's files on node1 differ from those on node0"
    )
    said = run_ranks(runs.hosts, 2, "none")
    assert said[0] == said[1] and "reading the model's files failed: config.json" in said[0]


def test_work_of_one_rank_may_take_longer_than_a_collective_may():
    assert run_ranks(runs.long_work, 2, False) == [(5, True)] * 2
    assert run_ranks(runs.long_work, 2, True) == [("proving failed: no room", True)] * 2
    assert run_ranks(runs.long_work, 2, False, 0.0) == [(5, False)] * 2, "what is stuck looks alive no longer"


def test_statistics_that_cannot_be_written_end_all_ranks(tmp_path):
    (tmp_path / "scores").write_text("a file")
    said = run_ranks(runs.full_disk, 2, str(tmp_path / "scores"))
    assert said[0] == said[1] and "writing the statistics" in said[0]
    assert run_ranks(runs.full_disk, 2, str(tmp_path / "sums")) == [None, None]
    assert [p.name for p in (tmp_path / "sums").iterdir()] == ["3.safetensors"]


def test_every_rank_draws_chance_of_its_own(folder, tmp_path):
    """The samples of two ranks must not lose the same places to dropout; a seed still says which."""
    found = [run_ranks(runs.chance, 2, arguments(folder, tmp_path / str(i), lora_dropout=0.1)) for i in range(2)]
    assert found[0] == found[1] and found[0][0] != found[0][1]


@pytest.mark.parametrize("num_samples, micro_batch, accumulation", [(37, 4, 2), (3, 4, 1), (16, 4, 2)])
def test_every_sample_counts_once_an_epoch(num_samples, micro_batch, accumulation):
    ranks = run_ranks(runs.sample_ids, 2, num_samples, micro_batch, accumulation, 5)
    steps = -(-num_samples // (2 * micro_batch * accumulation))
    seen = [i for rank in ranks for step in rank[:steps] for samples, weight in step if weight for i in samples]
    assert sorted(seen) == list(range(num_samples))
    for step in range(steps):  # the weights make the mean over ranks and accumulation the mean over samples
        total = sum(w * len(s) for rank in ranks for s, w in rank[step])
        assert total / (2 * accumulation) == pytest.approx(1)


@pytest.mark.parametrize("num_rows, batch_size", [(21, 4), (3, 4), (16, 4), (1, 8)])
def test_evaluation_counts_every_row_once(num_rows, batch_size):
    lengths = [(7 * i) % 11 + 1 for i in range(num_rows)]
    for result in run_ranks(runs.recover_logits, 2, lengths, batch_size):
        assert result == list(map(float, range(num_rows)))
