"""The peak of the memory that this process uses."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK_KB = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


def take_peak() -> int | None:
    """The peak in bytes since the last call, or since the process started; starts over.

    With CUDA in use it is what tensors occupied on the device (torch.cuda.max_memory_allocated);
    else the resident set of the process (Linux: VmHWM, proc(5)), which also counts the interpreter
    and its libraries. None where the system does not tell.
    """
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        found = _PEAK_KB.search(_STATUS.read_text())
        _CLEAR.write_text("5")
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
