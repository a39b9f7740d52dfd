"""What autograd keeps is counted pass by pass."""

import pytest
import torch

from prunadapt_ds.memory import SavedActivations

pytestmark = pytest.mark.fast


def test_the_most_that_any_pass_saves():
    """The allocator hands the addresses of one pass to the next: they count again."""
    weight = torch.ones(1, 256, requires_grad=True)
    saved, counted = SavedActivations(), []
    for rows in (64, 64, 128, 16):
        with saved.watch():
            (torch.ones(rows, 256) * weight).exp().sum().backward()
        counted.append(saved.bytes)
    of_a_row = 256 * 4
    assert counted[0] == counted[1] >= 64 * of_a_row
    assert counted[2] == counted[3] == counted[0] + 2 * 64 * of_a_row
