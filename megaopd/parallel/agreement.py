"""What ranks tell one another before one of them goes its own way; no Megatron."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megaopd.errors import MegaOPDError


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Raises on every rank what one of them met in the block; collective at its end.

    No rank goes on into a collective that the others will never join.
    """
    error: MegaOPDError | None = None
    try:
        yield
    except MegaOPDError as found:
        error = found
    errors: list[MegaOPDError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for first in errors:
        if first is not None:
            first.agreed = True  # one rank prints it
            raise first


def first_reason(reason: str | None) -> str | None:
    """The reason of the first rank that has one, on every rank; collective.

    Where none has, which is nearly always, one small tensor is reduced.
    """
    if not dist.is_initialized():
        return reason
    flags = torch.tensor([int(reason is not None)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    if not flags[0]:
        return None
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next(r for r in reasons if r is not None)
