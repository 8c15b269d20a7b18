"""What the ways for weights to reach servers have in common."""

from __future__ import annotations

import asyncio
import time
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
# So long a server may take over one thing that it is told. Well below the time limit of the
# trainer's collectives, in one of which the other ranks wait for the next bucket.
ANSWER_TIMEOUT_S = 240.0


class Carrier(Protocol):
    """A way for buckets to reach servers. Rank 0's, in the event loop of the pool.

    No method raises `ServerFault`: what fails at a server is told as one of `Faults`.

    Attributes:
        bracketed: an update lies between `begin_update` and `end_update`.
    """

    @property
    def bracketed(self) -> bool: ...

    async def open(self, pool: ServerPool, clients: Sequence[ServerClient]) -> Faults:
        """Prepares an update of these servers, which have begun it and sample nothing."""
        ...

    def max_bytes(self, clients: Sequence[ServerClient]) -> int | None:
        """The largest bucket that these servers, for which it was opened, take; None if any."""
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
    """Asks all servers at the same time, and those that go down meanwhile no longer.

    Raises:
        RolloutError: a key is refused; all servers have been asked.
    """
    asked = list(clients)
    asking = (_ask(pool, client, ask) for client in asked)
    answers = await asyncio.gather(*asking, return_exceptions=True)
    faults: Faults = {}
    for client, answer in zip(asked, answers, strict=True):
        if isinstance(answer, ServerFault):
            faults[client] = answer
        elif answer is not None:
            raise answer
    return faults


async def _ask(
    pool: ServerPool, client: ServerClient, ask: Callable[[ServerClient], Awaitable[object]]
) -> ServerFault | None:
    task = asyncio.ensure_future(ask(client))
    until = time.monotonic() + ANSWER_TIMEOUT_S
    try:
        while not (await asyncio.wait([task], timeout=WATCH_EVERY_S))[0]:
            # An update may take minutes, and a stopped server would be waited for so long.
            if client not in pool.up():
                return ServerDown(f"{client.url}: it went down during the update")
            if time.monotonic() > until:
                return ServerDown(f"{client.url}: no answer within {ANSWER_TIMEOUT_S:g} s")
        task.result()
    except ServerFault as fault:
        return fault
    finally:
        task.cancel()
    return None
