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


def test_ranks_talk():
    assert run_ranks(_sum, 2) == [3.0, 3.0]


def test_failure_names_rank_and_reason():
    with pytest.raises(pytest.fail.Exception, match=r"(?s)rank 1 raised.*planted"):
        run_ranks(_fail_on_one, 2)


def test_hang_is_killed():
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="not done in time"):
        run_ranks(_hang, 2, timeout=25)
    assert time.monotonic() - start < 60


def test_skip_is_passed_back():
    with pytest.raises(pytest.skip.Exception, match="not here"):
        run_ranks(_skip, 1)
