"""One gloo device for all process groups of a rank.

torch gives each gloo group a device of its own, with a thread that wakes up a hundred times a
second for as long as the group is there, busy or not. Megatron makes two dozen groups a rank, also
beside NCCL: the threads of four ranks took 40 % of two cores. A device serves any number of groups.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed.distributed_c10d as c10d
from torch.distributed import Store

Original: Any = c10d.ProcessGroupGloo


@cache
def _device() -> Any:
    """Made with the first group, so that a process that forks before has none."""
    return Original.create_default_device()


class SharedDeviceGloo(Original):
    """`ProcessGroupGloo` as `torch.distributed.new_group` makes it, but for the device."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = Original._Options()
        options._devices = [_device()]
        options._timeout = timeout
        super().__init__(store, rank, size, options)


def share_device() -> None:
    """From now on all gloo groups of this process have one device. torch has no setting for it."""
    if hasattr(Original, "_Options") and hasattr(Original._Options, "_devices"):
        c10d.ProcessGroupGloo = SharedDeviceGloo  # type: ignore[misc]
