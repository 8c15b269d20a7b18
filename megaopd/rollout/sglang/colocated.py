"""Memory of servers that share the trainer's GPUs: theirs while they generate, or take weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from megaopd.errors import RolloutError
from megaopd.rollout.sglang.api import ServerFault, UpdateFailed
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.control import MEMORY
from megaopd.rollout.sglang.pool import ServerPool

# What we gave up may run on a server for a moment, and one that is asked for its memory while
# something runs dies of it.
IDLE_TIMEOUT_S = 30.0


class ColocatedMemory:
    """Lends memory to all servers of a pool. Its methods belong to the pool's event loop."""

    def __init__(self) -> None:
        self._num_users = 0
        self._changing = asyncio.Lock()

    async def settle(self, client: ServerClient) -> None:
        """Brings a server that has just come, or come back, to what the others have.

        Raises:
            RolloutError: it does not do it.
        """
        async with self._changing:
            try:
                await (_resume(client, MEMORY) if self._num_users else _release(client))
            except ServerFault as fault:
                raise RolloutError(
                    client.url, f"gives no memory back ({fault})", "start it with a memory saver"
                ) from None

    async def for_weights(self, pool: ServerPool) -> None:
        """Lends what an update needs; the next `lent` takes it back at its end."""
        async with self._changing:
            await _at_all(pool, resume=("weights",))

    @asynccontextmanager
    async def lent(self, pool: ServerPool) -> AsyncIterator[None]:
        """Lends everything; the last one that ends without an error, or is given up, takes it
        back."""
        async with self._changing:
            self._num_users += 1
            try:
                await _at_all(pool, resume=MEMORY)
            except asyncio.CancelledError:
                await self._take_back(pool)
                raise
            except BaseException:
                self._num_users -= 1
                raise
        try:
            yield
        except asyncio.CancelledError:
            async with self._changing:
                await self._take_back(pool)
            raise
        except BaseException:
            self._num_users -= 1
            raise
        async with self._changing:
            await self._take_back(pool)

    async def _take_back(self, pool: ServerPool) -> None:
        self._num_users -= 1
        if self._num_users == 0:
            await _at_all(pool, resume=())


async def _at_all(pool: ServerPool, resume: Sequence[str]) -> None:
    """Resumes, or with nothing to resume releases, all servers that are up at the same time."""

    async def change(client: ServerClient) -> None:
        try:
            await (_resume(client, resume) if resume else _release(client))
        except ServerFault as fault:
            pool.quarantine(client, f"its memory is in an unknown state ({fault})")

    await asyncio.gather(*map(change, pool.up()))


async def _resume(client: ServerClient, tags: Sequence[str]) -> None:
    await client.resume_memory(tags)


async def _release(client: ServerClient) -> None:
    kept = client.capabilities.keeps_weights
    until = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        try:
            # Refused while anything runs; what it forgets goes with the memory anyway.
            await client.flush_cache()
            break
        except UpdateFailed:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.1)
    await client.release_memory([tag for tag in MEMORY if kept or tag != "weights"])
