"""The harness itself: a test that cannot fail proves nothing."""

import time

import pytest

from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.ci


def _sum():
    import torch
    import torch.distributed as dist

    value = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(value)
    return value.item()


def _fail_on_one():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("planted")
    return 0


def _hang():
    time.sleep(60)


def _skip():
    pytest.skip("not here")


def _zero3_step():
    """One ZeRO-3 step of a linear layer: (elements resident on this rank before use, weights before, after)."""
    import deepspeed
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    before = model.weight.detach().clone()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    resident = engine.module.weight.numel()
    engine.backward(engine(torch.ones(2, 8)).square().mean())
    engine.step()
    with deepspeed.zero.GatheredParameters([engine.module.weight]):
        after = engine.module.weight.detach().clone()
    return resident, before.tolist(), after.tolist()


def test_deepspeed_shards_and_steps():
    first, second = run_ranks(_zero3_step, 2)
    assert first == second, "ranks hold different weights"
    resident, before, after = first
    assert resident == 0 and before != after


def test_ranks_talk():
    assert run_ranks(_sum, 2) == [3.0, 3.0]


def test_failure_names_rank_and_reason():
    with pytest.raises(pytest.fail.Exception, match=r"(?s)rank 1 raised.*planted"):
        run_ranks(_fail_on_one, 2)


def test_hang_is_killed():
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="not done in time"):
        run_ranks(_hang, 2, timeout=10)
    assert time.monotonic() - start < 45


def test_skip_is_passed_back():
    with pytest.raises(pytest.skip.Exception, match="not here"):
        run_ranks(_skip, 1)
