"""One gloo device for all process groups of a rank.

torch gives each gloo group a device of its own, with a thread that wakes up a hundred times a
second for as long as the group is there, busy or not. Megatron makes two dozen groups a rank, also
beside NCCL: the threads of four ranks took 40 % of two cores. A device serves any number of groups.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import ProcessGroupGloo, Store

Group: Any = ProcessGroupGloo
_with_own_device = Group.__init__


@cache
def _device() -> Any:
    """Made with the first group, so that a process that forks before has none."""
    return Group.create_default_device()


def _with_shared_device(
    self: Any, store: Store, rank: int, size: int, *args: Any, **kw: Any
) -> None:
    """As `torch.distributed.new_group` calls it, with a timeout; who brings options has devices."""
    timeout = kw.get("timeout", args[0] if args else None)
    if isinstance(timeout, timedelta):
        options = Group._Options()
        options._devices, options._timeout = [_device()], timeout
        args, kw = (options,), {}
    _with_own_device(self, store, rank, size, *args, **kw)


def share_device() -> None:
    """From now on all gloo groups of this process have one device.

    torch has no setting for it. A subclass would not do: torch asks for the class of groups that
    come back from C++, where they have lost it.
    """
    if hasattr(Group, "_Options") and hasattr(Group._Options, "_devices"):
        Group.__init__ = _with_shared_device
