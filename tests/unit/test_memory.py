"""What autograd keeps is counted pass by pass."""

import pytest
import torch

from prunadapt_ds.memory import MemoryMarks, PeakMemory, SavedActivations, parameter_bytes

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


def test_a_mark_is_of_the_time_since_the_last_one():
    """What was held before it began, and what was let go of before the last mark, are no part of it."""
    before = torch.ones(2**23)  # 32 MiB
    peak = PeakMemory(torch.device("cpu"))
    marks = MemoryMarks(peak)
    assert peak.bytes() < 2**24
    torch.ones(2**24).sum()  # 64 MiB, let go of at once
    marks.note_peak(is_shrunk=False)
    assert 0.9 * 2**26 <= marks.peaks["dense_phase"] < 2**26 + 2**24
    marks.note_peak(is_shrunk=True)
    assert marks.peaks["after_shrink"] < 2**24 and before.sum() == 2**23


def test_bytes_of_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2).to(torch.bfloat16))
    model[0].requires_grad_(False)
    assert parameter_bytes(model) == 4 * 36 + 2 * 10 and parameter_bytes(model, only_frozen=True) == 4 * 36
