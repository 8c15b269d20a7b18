"""What the ways for weights to reach servers have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from megaopd.rollout.sglang.api import ServerDown, ServerFault
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.pool import ServerPool
from megaopd.weight_sync.buckets import Bucket

Faults = dict[ServerClient, ServerFault]
"""The servers that did not do what they were asked, and why."""

# How often a server that is waited for is looked at.
WATCH_EVERY_S = 1.0


class Carrier(Protocol):
    """A way for buckets to reach servers. Rank 0's, in the event loop of the pool.

    No method raises `ServerFault`: what fails at a server is told as one of `Faults`.

    Attributes:
        bracketed: an update lies between `begin_update` and `end_update`.
        max_bytes: the largest bucket that it takes, None if any.
    """

    @property
    def bracketed(self) -> bool: ...
    @property
    def max_bytes(self) -> int | None: ...

    async def open(self, pool: ServerPool, clients: Sequence[ServerClient]) -> Faults:
        """Prepares an update of these servers, which have begun it and sample nothing."""
        ...

    async def carry(
        self,
        pool: ServerPool,
        bucket: Bucket,
        clients: Sequence[ServerClient],
        version: int | None,
    ) -> Faults:
        """Brings a bucket to the servers that have had all before it.

        Args:
            version: what they stamp on samples from now on; None leaves their stamp.
        """
        ...

    async def close(self, pool: ServerPool) -> None:
        """Gives up what it shares with servers; it may be opened again."""
        ...


async def each(
    pool: ServerPool,
    clients: Iterable[ServerClient],
    ask: Callable[[ServerClient], Awaitable[object]],
) -> Faults:
    """Asks all servers at the same time, and those that go down meanwhile no longer."""
    asked = list(clients)
    faults = await asyncio.gather(*(_ask(pool, client, ask) for client in asked))
    return {c: fault for c, fault in zip(asked, faults, strict=True) if fault is not None}


async def _ask(
    pool: ServerPool, client: ServerClient, ask: Callable[[ServerClient], Awaitable[object]]
) -> ServerFault | None:
    task = asyncio.ensure_future(ask(client))
    try:
        while not (await asyncio.wait([task], timeout=WATCH_EVERY_S))[0]:
            # An update may take minutes, and a stopped server would be waited for so long.
            if client not in pool.up():
                return ServerDown(f"{client.url}: it went down during the update")
        task.result()
    except ServerFault as fault:
        return fault
    finally:
        task.cancel()
    return None
