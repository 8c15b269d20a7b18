"""Time of calls that take turns, and the peak memory of one call.

Allocator settings, on a CPU. Times: nothing is given back to the system, so that no contender pays
for page faults, which by default are most of the peers' time. Memory: every block of a megabyte or
more is given back when it is freed. By default glibc stops doing so for all sizes up to the largest
block freed so far, at most 32 MiB. A small result that outlives its tile may then take a corner of
the tile's freed buffer, the next tile's no longer fits and lands behind it: what is read is how the
heap was torn, not what a call holds. The same call gave 0.00, 0.50 and 0.94 of a [T, V] array.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

TIME_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
MEMORY_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576"}


def memory_environment() -> dict[str, str]:
    """Of a process whose peak is measured: its allocator gives memory back."""
    kept = {key: value for key, value in os.environ.items() if key not in TIME_ALLOCATOR}
    return {**kept, **MEMORY_ALLOCATOR}


def step(loss: Callable[..., Tensor], trained: Sequence[Tensor], fixed: Sequence[Tensor]) -> Any:
    """A call that does forward and backward; each makes leaves of its own of `trained`."""

    def work() -> None:
        leaves = [x.detach().requires_grad_() for x in trained]
        loss(*leaves, *fixed).backward()

    return work


def _seconds(work: Callable[[], Any], device: str) -> float:
    """CPU time of this process for one call, or device time."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    before = time.process_time()
    work()
    return time.process_time() - before


def take_turns(
    work: dict[str, Callable[[], Any]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each call in `repeats` rounds, after a round to warm up."""
    times: dict[str, list[float]] = {key: [] for key in work}
    for number in range(repeats + 1):
        for key, call in work.items():
            seconds = _seconds(call, device)
            if number:
                times[key].append(seconds)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {key: median(values) for key, values in times.items()}


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status: no {field}")


def peak_extra(work: Callable[[], Any], device: str, inputs: Sequence[Tensor]) -> int:
    """Bytes that one call holds at its peak beyond what was there before."""
    gc.collect()
    for x in inputs:  # pages that the system took back while idle would count as new
        x.detach().sum()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before
