"""What one rank knows and the others have to hear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from megaopd.errors import RolloutError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that call an engine together.

    Attributes:
        rank, world_size: of this process.
        group: their process group; None is the default group.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    def broadcast(self, value: Any) -> Any:
        """Collective: rank 0's `value` on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def first(self, value: T | None) -> T | None:
        """Collective: the `value` of the first rank that has one, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return next((found for found in values if found is not None), None)

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Collective: the value of `work()` on rank 0, or its RolloutError, on every rank."""
        value: Any = None
        if self.rank == 0:
            try:
                value = work()
            except RolloutError as error:
                value = error
        value = self.broadcast(value)
        if isinstance(value, RolloutError):
            raise value
        return value
