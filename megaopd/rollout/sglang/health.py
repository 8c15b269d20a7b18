"""Watches over servers: who is down, who is back, when there is no hope left.

A front end that does not answer is noticed by asking it; generation that hangs behind a front end
that answers is noticed by its requests (`ServerStalled`), and not believed again before it has made
a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Protocol

from megaopd.errors import RolloutError
from megaopd.logger import get_logger
from megaopd.rollout.sglang.api import UNKNOWN_VERSION, ServerFault
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.placement import Placement, Server, State

logger = get_logger(__name__)

# Two of these in a row make a server down; with the interval between checks well below 15 s.
HEALTH_TIMEOUT_S = 4.0
# The same while it is paused for a weight update, of which it may be parsing 100 MB at a time.
UPDATE_TIMEOUT_S = 30.0
# A server that has just made tokens is not asked whether it lives.
PROOF_OF_LIFE_S = 3.0
# In this time a server that was down has to make a token before it is trusted again.
REVIVAL_TIMEOUT_S = 10.0
# So long all servers may be down, with none being restarted, before everything is given up.
ALL_DOWN_S = 20.0


class Endpoint(Protocol):
    """Where a server is and what it wants to hear."""

    @property
    def url(self) -> str: ...
    @property
    def api_key(self) -> str: ...
    @property
    def admin_key(self) -> str: ...


class Restarter(Protocol):
    """Restarts servers that this run started; called in a thread.

    Attributes:
        retired: indices of the servers that will not be started again.
    """

    retired: set[int]

    def restart(self, index: int) -> Endpoint:
        """Ends what is left of a server, starts it, and returns when it is ready.

        Raises:
            RolloutError: it did not get ready.
        """
        ...

    def stop(self) -> None:
        """Ends all servers."""
        ...


class HealthWatch:
    """Keeps `Server.state` true.

    Args:
        placement: whose servers are watched.
        open_client: makes the client of a server that was restarted, and sees that it is ready.
        settle: what is done with a server that came back, see `ServerPool`; None is nothing.
        restarter: restarts servers that are down; None waits until somebody else does.
        interval_s: between two checks of a server.
        counters: "servers_lost" and "servers_back" are counted here.
    """

    def __init__(
        self,
        placement: Placement,
        open_client: Callable[[Endpoint], Awaitable[ServerClient]],
        settle: Callable[[ServerClient], Awaitable[None]] | None,
        restarter: Restarter | None,
        interval_s: float,
        counters: Counter[str],
    ) -> None:
        self._placement = placement
        self._open = open_client
        self._settle = settle
        self._restarter = restarter
        self._interval_s = interval_s
        self._counters = counters

    async def run(self) -> None:
        """Watches until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for server in self._placement.servers:
                group.create_task(self._watch(server))
            group.create_task(self._despair())

    def down(self, server: Server, why: str) -> None:
        """Takes a server out; its requests end as `ServerDown`, with what they have so far."""
        if server.state is not State.UP:
            return
        logger.warning("rollout server %s is down: %s", server.client.url, why)
        self._counters["servers_lost"] += 1
        server.state = State.DOWN
        server.client.give_up(why, server.work)
        server.doubt.set()

    async def _watch(self, server: Server) -> None:
        while server.state is not State.RETIRED:
            if server.state is State.UP:
                await self._pause(server)
                if server.state is State.UP and not await self._lives(server):
                    self.down(server, "its front end does not answer")
            elif self._restarter is not None:
                await self._restart(server, self._restarter)
            else:
                await asyncio.sleep(self._interval_s)
                await self._revive(server)

    async def _pause(self, server: Server) -> None:
        """Until the next check is due, or somebody asks for it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.doubt.wait(), self._interval_s)

    async def _lives(self, server: Server) -> bool:
        doubted = server.doubt.is_set()
        server.doubt.clear()
        if not doubted and server.client.silent_s < PROOF_OF_LIFE_S:
            return True
        timeout_s = UPDATE_TIMEOUT_S if server.client.paused else HEALTH_TIMEOUT_S
        return await server.client.alive(timeout_s) or await server.client.alive(timeout_s)

    async def _restart(self, server: Server, restarter: Restarter) -> None:
        server.state = State.RESTARTING
        try:
            endpoint = await asyncio.to_thread(restarter.restart, server.index)
            client = await self._open(endpoint)
        except (RolloutError, ServerFault) as error:
            logger.warning("rollout server %d did not restart: %s", server.index, error)
            retired = server.index in restarter.retired
            server.state = State.RETIRED if retired else State.DOWN
        else:
            server.client = client
            self._up(server)

    async def _revive(self, server: Server) -> None:
        """Takes a server back that somebody else runs, once it has proved itself."""
        client = server.client
        try:
            if not await client.alive(HEALTH_TIMEOUT_S):
                return
            # An update that it did not survive may have paused it.
            if client.paused and not self._placement.held:
                await client.continue_()
            # Without its memory it could not; it is then believed.
            if not client.released and not await client.generates(REVIVAL_TIMEOUT_S):
                return
            capabilities = await client.probe()
            known = capabilities.stamps_versions
            if not known or await client.served_version() != client.version:
                client.version, client.released = UNKNOWN_VERSION, frozenset()
            if self._settle is not None:
                await self._settle(client)
        except (RolloutError, ServerFault) as error:
            logger.warning("rollout server %s is not back: %s", client.url, error)
            return
        self._up(server)

    def _up(self, server: Server) -> None:
        logger.info("rollout server %s is back", server.client.url)
        self._counters["servers_back"] += 1
        server.faults = 0
        server.doubt.clear()
        server.state = State.UP
        self._placement.recover()
        self._placement.dispatch()

    async def _despair(self) -> None:
        """Ends everything when no server has been up or on its way for `ALL_DOWN_S`."""
        hopeful = time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, ALL_DOWN_S / 4))
            states = {server.state for server in self._placement.servers}
            if states & {State.UP, State.RESTARTING}:
                hopeful = time.monotonic()
            elif states == {State.RETIRED} or time.monotonic() - hopeful > ALL_DOWN_S:
                urls = ", ".join(s.client.url for s in self._placement.servers)
                self._placement.fail(
                    RolloutError("rollout servers", f"all are down ({urls})", "look at their logs")
                )
