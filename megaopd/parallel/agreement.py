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


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; collective."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags[0])
