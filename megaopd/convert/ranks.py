"""The processes of one conversion, and how they agree: if one fails, all do, with one message."""

from __future__ import annotations

import contextlib
import heapq
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megaopd.errors import EnvironmentFault, MegaOPDError

T = TypeVar("T")

# How long ranks wait for one another. A rank that dies is noticed at once, one that hangs after
# this; the shares of a conversion are equal in bytes, so the slowest is not far behind.
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that convert together; alone by default."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Ranks:
        """Joins the processes that torchrun started; without torchrun the process is alone.

        The group is gloo's whatever the machine has: a conversion moves files, and needs no GPU.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what every rank does by itself: ends when all have done it, or raises on all.

        Collective. The error is that of the lowest rank that had one.
        """
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        for rank, failure in enumerate(self.gather(_portable(mine))):
            if failure is None:
                continue
            if mine is not None and rank == self.rank:
                failure = mine
            if isinstance(failure, MegaOPDError):
                failure.agreed = True  # one rank reports it
            raise failure

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, in their order; collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise EnvironmentFault(
                f"rank {self.rank} of {self.size}",
                f"another rank has ended ({str(error).splitlines()[0]})",
                "see its own message, then start again",
            ) from None
        return values

    def share(self, items: Sequence[T], nbytes: Callable[[T], int]) -> list[T]:
        """Returns this rank's items, in their order; all ranks have about as many bytes."""
        loads = [(0, rank) for rank in range(self.size)]
        mine = []
        for index in sorted(range(len(items)), key=lambda i: -nbytes(items[i])):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + nbytes(items[index]), rank))
            if rank == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]


def _portable(error: Exception | None) -> Exception | None:
    """The error as other ranks can receive it: a bug's class may not be picklable."""
    if error is None or isinstance(error, MegaOPDError | OSError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))
