"""The peak of memory, of the process and of the phases of a step."""

from __future__ import annotations

import sys

import pytest
import torch

from megaopd.memory import take_peak
from megaopd.metrics import PhaseTimer

MIB = 2**20


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_initialized(), reason="the resident set of Linux"
)
def test_the_peak_is_that_since_the_last_call() -> None:
    take_peak()
    before = take_peak()
    assert before is not None
    block = torch.ones(256 * MIB, dtype=torch.uint8)
    del block
    peak, after = take_peak(), take_peak()
    assert peak is not None
    assert after is not None
    assert 250 * MIB < peak - before < 300 * MIB
    assert peak - after > 200 * MIB


def test_a_phase_has_the_peak_of_all_its_parts() -> None:
    peaks = iter([9, 3, 7, 2, 8, 1])  # since the boundary before, at every boundary
    timer = PhaseTimer(take_peak=lambda: next(peaks) * 2**30)
    with timer.phase("outer"), timer.phase("inner"):
        pass
    with timer.phase("outer"):
        pass
    assert timer.peak_memory() == {"memory/outer_peak_gib": 7.0, "memory/inner_peak_gib": 7.0}


def test_where_nobody_knows_the_peak_nothing_is_said() -> None:
    timer = PhaseTimer(take_peak=lambda: None)
    with timer.phase("student"):
        pass
    assert timer.peak_memory() == {}
    assert PhaseTimer().peak_memory() == {}
