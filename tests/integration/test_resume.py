"""Law 5: a run that is killed and resumed is the run that was not, bit for bit on as many ranks, in fp32.

Real processes die by SIGKILL, at moments that `fault_point` in the program lets a test choose.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunadapt_ds import checkpoint
from prunadapt_ds import report as reports
from prunadapt_ds.commands import unfinished
from prunadapt_ds.config import NOT_SCORING
from prunadapt_ds.latency import LatencyTable, curve
from tests.distributed.harness import Ranks
from tests.distributed.test_laws import arguments, ds_config, of_method
from tests.tiny import exchange_two_words, tiny_data, tiny_folder

pytestmark = pytest.mark.ci
CLOCKS = ("samples/s", "time/train(s)", "memory/live(bytes)", "memory/parameters(bytes)")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny_folder(folder / "bert", "bert")
    tiny_data(folder / "data", n_train=37, n_dev=21)
    return folder


def argv(base, output, **options):
    """12 steps, decisions at 4, 6 and 7, a checkpoint every other step, dropout so that random states matter."""
    steps = {"max_steps": 12, "num_decisions": 3, "logging_steps": 3, "checkpoint_steps": 2, "save_total_limit": 9}
    pruning = {"target_sparsity": 0.6, "shrink": "always", "lora_dropout": 0.1, "teacher_window": 1.0}
    options = {"batch": 4, **of_method(options.get("method", "prunadapt"), steps | pruning), **options}
    return arguments(base, output, **{name: value for name, value in options.items() if value is not None})


def run(arguments, world_size=2, fault=None, timeout=400):
    return Ranks(arguments, world_size, {"PRUNADAPT_FAULT": fault} if fault else None).wait(timeout)


def complete(arguments, world_size=2):
    """Run to the end: everything that an interruption must not change, and what rank 0 said."""
    ranks = run(arguments, world_size)
    for rank in ranks:
        assert rank.code == 0, rank.text[-3000:]
    return outcome(arguments), ranks[0].text


def outcome(arguments):
    output = Path(arguments[arguments.index("--output_dir") + 1])
    report = json.loads((output / "report.json").read_text())
    reports.validate(report)
    assert report["status"] == "complete"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "plan_hash": report["plan_hash"],
        "metric": report["metric"],
        "params": report["params"],
        "predictions": (output / "predictions.jsonl").read_text(),
        "metrics": [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines],
        "progress": [(row["step"], row["loss"], row["sparsity"]) for row in report["progress"]],
        "exported": (output / "exports" / "compact" / "model.safetensors").read_bytes(),
    }


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    arguments = argv(base, tmp_path_factory.mktemp("whole") / "out")
    return arguments, complete(arguments)[0]


@pytest.fixture(scope="module")
def killed(base, tmp_path_factory):
    """A run whose ranks were all killed in step 6's decision, with checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("killed") / "out"
    assert {rank.code for rank in run(argv(base, output), fault="SIGKILL@decide-6@all")} == {-9}
    assert [step for step, _ in checkpoint.listed(output / "checkpoints")] == [4, 2]
    return output


@pytest.fixture
def remains(killed, tmp_path):
    """A copy of what the killed run left."""
    shutil.copytree(killed, tmp_path / "out", ignore=shutil.ignore_patterns(".lock"))
    return tmp_path / "out"


def test_killed_in_a_decision_with_a_damaged_checkpoint(base, remains, uninterrupted):
    """The newest checkpoint has a flipped bit: the one before is taken."""
    damage(remains / "checkpoints" / "step-4")
    found, said = complete(argv(base, remains))
    assert found == uninterrupted[1]
    assert said.count("step-4: tensors.safetensors was cut short or changed; skipped") == 1
    assert "goes on after step 2 of 12" in said


def test_a_killed_run_is_exported_from_its_newest_intact_checkpoint(remains):
    """On one rank, of what two have trained; the run can go on as if nothing had been exported."""
    damage(remains / "checkpoints" / "step-4")
    (remains / "exports" / "onnx").mkdir(parents=True)  # of other weights
    before = everything_below(remains)
    (ended,) = run(["--run_dir", str(remains), "--export_formats", "compact"], world_size=1)
    assert ended.code == 0 and "as after step 2: score" in ended.text and "step-4: tensors" in ended.text, ended.text[
        -2000:
    ]
    report, saved = (
        json.loads((remains / "report.json").read_text()),
        checkpoint.read(remains / "checkpoints" / "step-2"),
    )
    reports.validate(report)
    assert report["status"] == "interrupted" and (report["time"]["steps"], report["world_size"]) == (2, 2)
    place, peak = saved.state["place"], saved.state["memory"]["now"]
    assert {name: report[name] for name in ("zero_stage", "device")} == {"zero_stage": 3, "device": place["device"]}
    assert report["memory"]["frozen_shard_bytes"] == place["memory"]["frozen_shard_bytes"], (
        "of two ranks, not of this one"
    )
    assert report["memory"]["peak_rank_bytes"] == {"dense_phase": peak, "after_shrink": None}
    assert report["parity"]["max_abs_logit_diff"] <= report["parity"]["tolerance"]
    assert set(report["exports"]) == {"compact"} == {p.name for p in (remains / "exports").iterdir()}
    plan = json.loads((remains / "plan.json").read_text())
    assert [unit["kept"] for unit in plan["units"]] == saved.state["plan"]
    exported = load_file(remains / "exports" / "compact" / "model.safetensors")
    for name in ("classifier.weight", "bert.pooler.dense.weight", "bert.embeddings.LayerNorm.weight"):
        assert torch.equal(exported[name], saved.tensors()[f"master/{name}"]), "what was learnt"
    new = {"report", "plan", "predictions"}
    after = {p: t for p, t in everything_below(remains).items() if "exports" not in p.parts and p.stem not in new}
    assert after == before
    later = checkpoint.Checkpoint(saved.folder, 4, saved.state)
    assert unfinished.is_exported(remains, saved) and not unfinished.is_exported(remains, later)


def test_stopped_before_the_proof_nothing_is_called_exported(base, tmp_path):
    output = tmp_path / "out"
    (ended,) = run(argv(base, output, max_steps=4, num_decisions=1), world_size=1, fault="SIGUSR1@export/end@0")
    assert ended.code == 75 and json.loads((output / "report.json").read_text())["exports"] == {}, ended.text[-2000:]
    (ended,) = run(["--run_dir", str(output), "--export_formats", "padded"], world_size=1)
    report = json.loads((output / "report.json").read_text())
    assert ended.code == 0 and report["status"] == "interrupted", ended.text[-2000:]
    assert set(report["exports"]) == {"compact", "padded"} and report["metric"]["exported"]


def damage(folder):
    """Flip a bit in the middle of a checkpoint's tensors."""
    file = folder / checkpoint.TENSORS
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def everything_below(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("SIGKILL@shrink-6/begin@1", marks=pytest.mark.full),
        "SIGKILL@shrink-6/end@1",
        pytest.param("SIGKILL@checkpoint-8/begin@0", marks=pytest.mark.full),
        "SIGKILL@checkpoint-8/half written@0",
        pytest.param("SIGKILL@export/begin@0", marks=pytest.mark.full),
        "SIGKILL@export/half written@0",
    ],
    ids=[
        "before a shrink",
        "in a shrink",
        "before a checkpoint",
        "in a checkpoint",
        "before the export",
        "in the export",
    ],
)
def test_killed_and_resumed_is_uninterrupted(base, tmp_path, uninterrupted, fault):
    arguments = argv(base, tmp_path / "out")
    ended = run(arguments, fault=fault)
    assert ended[int(fault[-1])].code == -9 and all(rank.code for rank in ended), "the others end as well"
    assert not (tmp_path / "out" / "report.json").exists()
    assert complete(arguments)[0] == uninterrupted[1]


def test_a_speed_is_met_and_a_resumed_run_keeps_its_table(base, tmp_path):
    """Two ranks decide alike by times that only one has taken; killed after the first decision, they read them again."""
    out = tmp_path / "out"
    arguments = argv(base, out, target_sparsity=None, target_speedup=1.3, shrink="never", latency_batch_size=1)
    assert {rank.code for rank in run(arguments, fault="SIGKILL@step-6@all")} == {-9}
    table = (out / "latency.json").read_text()
    (out / "latency.json").unlink()
    said = complete(arguments)[1]
    assert "goes on after step 6" in said or "goes on after step 4" in said
    assert (out / "latency.json").read_text() == table, "measured again, it would differ by some nanoseconds"
    report, found = json.loads((out / "report.json").read_text()), LatencyTable.from_dict(json.loads(table))
    assert (found.batch_size, found.seq_length, found.dtype) == (1, 16, "float32")
    units = json.loads((out / "plan.json").read_text())["units"]
    curves = {kind: curve(getattr(found, kind), 4 if kind == "heads" else 48) for kind in ("heads", "neurons")}
    kept, dense = (
        3 * found.layer_ns + sum(curves[u["kind"]][n(u)] for u in units)
        for n in (lambda u: len(u["kept"]), lambda u: u["dense"])
    )
    assert report["latency"]["target_speedup"] == pytest.approx(1.3)
    assert report["latency"]["table_speedup"] == pytest.approx(dense / kept)
    dearest = max(
        b - a for kind, step in (("heads", 1), ("neurons", 8)) for a, b in zip(curves[kind], curves[kind][step:])
    )
    assert abs(kept - dense / 1.3) <= dearest and kept < dense
    assert report["latency"]["speedup"] > 0 and "Speed-up: 1.30 requested" in said


def test_killed_within_a_window(base, tmp_path, uninterrupted):
    """Step 5 lies between two decisions: every rank goes on with its own sums, and none with those of all."""
    whole, arguments = (
        argv(base, tmp_path / name, checkpoint_steps=5, save_scores="true") for name in ("whole", "out")
    )
    assert complete(whole)[0] == uninterrupted[1]
    run(arguments, fault="SIGKILL@step-6@all")
    assert [path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*")] == ["step-5"]
    assert complete(arguments)[0] == uninterrupted[1]
    # The decisions of so small a model are the same for many scores: the sums behind them are compared, too.
    sums, expected = (files_of(tmp_path / name / "scores") for name in ("out", "whole"))
    assert set(sums) == {f"{step}.safetensors" for step in (4, 6, 7)} and sums == expected


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name, rank", [("SIGUSR1", "1"), ("SIGTERM", "all")])
def test_asked_to_stop_and_started_again(base, tmp_path, uninterrupted, name, rank):
    """Every rank leaves with 75, whichever got the signal; the same command goes on."""
    arguments = argv(base, tmp_path / "out", checkpoint_steps=100)
    ended = run(arguments, fault=f"{name}@step-5@{rank}")
    assert [r.code for r in ended] == [75, 75]
    assert f"stopped by {name} after step 6 of 12" in ended[0].text and "Traceback" not in ended[0].text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["status"] == "interrupted" and report["time"]["steps"] == 6
    if rank == "1":
        assert complete(arguments)[0] == uninterrupted[1]


def test_scoring_stops_when_asked_to(base, tmp_path):
    arguments = [*arguments_of_scores(base, tmp_path / "out"), "--score_only"]
    ended = run(arguments, fault="SIGTERM@score-1@1")
    assert [r.code for r in ended] == [75, 75] and "stopped by SIGTERM" in ended[0].text
    assert not (tmp_path / "out" / "scores").exists()


def arguments_of_scores(base, output):
    """Without what scoring has no use for."""
    plain = argv(base, output)
    return [
        word
        for name, value in zip(plain[::2], plain[1::2], strict=True)
        if name[2:] not in NOT_SCORING
        for word in (name, value)
    ]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_second_ctrl_c_leaves_at_once(base, tmp_path, world_size):
    """A terminal sends it to every rank. One of them answers the first; none waits for the step after the second."""
    ranks = Ranks(argv(base, tmp_path / "out"), world_size, {"PRUNADAPT_FAULT": "stall@step-5@all"})
    ranks.wait_for(lambda: (tmp_path / "out" / "checkpoints" / "step-4").exists(), timeout=300)
    time.sleep(2)
    for _ in range(2):
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
    ended = ranks.wait(30)
    assert {rank.code for rank in ended} == {-signal.SIGINT}
    heard = [rank.text.count("stopping after this step; once more to leave now") for rank in ended]
    assert heard == [1, 0][:world_size]


def test_a_complete_run_is_not_run_again(uninterrupted):
    arguments, before = uninterrupted
    start = time.monotonic()
    found, said = complete(arguments)
    assert found == before and "complete already" in said and "loss" not in said
    assert time.monotonic() - start < 60
    ended = run([*arguments, "--seed", "3"])
    assert [rank.code for rank in ended] == [2, 2] and "seed=3" in ended[0].text
    assert outcome(arguments) == before


@pytest.mark.parametrize("name", ["seed", "gradient_clipping", "backbone", "data", "tokenizer"])
def test_what_would_be_another_run_is_refused(base, remains, tmp_path, name):
    arguments = argv(base, remains)
    if name == "seed":
        arguments, words = [*arguments, "--seed", "3"], ["seed=3", "began with 0"]
    elif name == "gradient_clipping":
        path = Path(arguments[1])
        path.write_text(json.dumps({**json.loads(path.read_text()), "gradient_clipping": 0.5}))
        words = ["max_grad_norm=0.5", "began with 1.0"]
    elif name == "backbone":
        tiny_folder(tmp_path / "other", "bert", seed=1)
        arguments, words = [*arguments, "--model_name_or_path", str(tmp_path / "other")], ["model_name_or_path="]
    elif name == "tokenizer":
        exchange_two_words(Path(shutil.copytree(base / "bert", tmp_path / "other")))
        arguments = [*arguments, "--model_name_or_path", str(tmp_path / "other")]
        words = ["model_name_or_path=", "its tokenizer makes other tokens of the data"]
    else:
        tiny_data(tmp_path / "data", n_train=38, n_dev=21)
        arguments, words = [*arguments, "--train_file", str(tmp_path / "data" / "train.csv")], ["train_file="]
    before = {p: p.stat().st_mtime_ns for p in remains.rglob("*") if p.is_file()}
    first, second = run(arguments)
    assert (first.code, second.code) == (2, 2) and all(word in first.text for word in words), first.text[-2000:]
    assert ("--resume never" in first.text) == (name != "tokenizer") and "error" not in second.text
    assert {p: p.stat().st_mtime_ns for p in remains.rglob("*") if p.is_file()} == before


# ------------------------------------------------------------------------------------ another number of ranks


def agree(mine, other):
    """The plans of two checkpoints: on 99.5 % of the cost; whoever they differ on is at the threshold."""
    from prunadapt_ds.models.layouts import family_of, layout_of
    from prunadapt_ds.models.structure import structure_of
    from tests.tiny import tiny_model

    model = tiny_model("bert")
    structure = structure_of(model, layout_of(family_of(model.config), model.config, model.base_model_prefix), 32)
    costs = torch.cat([s.costs("params").diff() for s in structure.sublayers])
    masks = []
    for found in (mine, other):
        mask = torch.zeros(structure.num_units, dtype=torch.bool)
        for sublayer, kept in zip(structure.sublayers, found.state["plan"], strict=True):
            mask[sublayer.start + torch.tensor(kept, dtype=torch.long)] = True
        masks.append(mask)
    differ = masks[0] ^ masks[1]
    assert costs[differ].sum() <= 0.005 * costs.sum()
    density = (mine.tensors()["scores"] / costs)[differ]
    if len(density):
        assert density.max() - density.min() <= 1e-3 * density.max()


def continue_on(base, tmp_path, before, after, *, stage=3):
    """Without dropout: killed on `before` ranks in step 6's decision, and gone on with on `after` ranks under `stage`; beside
    the run that was not killed there, up to the checkpoint behind that decision."""

    def arguments(name, ranks):
        return argv(base, tmp_path / name, batch=8 // ranks, lora_dropout=0.0)

    run(arguments("whole", before), before, fault="SIGKILL@step-7@all")
    run(arguments("out", before), before, fault="SIGKILL@decide-6@all")
    again = arguments("out", after)
    ds_config(Path(again[1]), stage)
    found, said = complete(again, after)
    assert "goes on after step 4 of 12" in said
    agree(*(checkpoint.read(tmp_path / name / "checkpoints" / "step-6") for name in ("out", "whole")))
    assert [line["step"] for line in found["metrics"]] == [3, 4, 6, 9, 12, 12]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["time"]["last_step_s"] and report["memory"]["live_tensor_bytes"]["after_shrink"]
    dense = (report["time"]["dense_step_s"], report["memory"]["live_tensor_bytes"]["dense"])
    assert dense == (None, None), "what other ranks have measured is not set beside it"


def test_two_ranks_continue_as_one_under_another_stage(base, tmp_path):
    continue_on(base, tmp_path, 2, 1, stage=1)
