"""Which server a request goes to, and when: state of the servers, and the queue before them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from megaopd.errors import RolloutError
from megaopd.rollout.sglang.client import ServerClient

# Responses are rarely as long as they may be, and a server queues what it has no room for: with
# four times its capacity asked for it is never idle, and what its death costs stays bounded.
OVERCOMMIT = 4
# Prefixes whose server is remembered.
MAX_HOMES = 1 << 16


class State(Enum):
    """Whether a server may be asked at all."""

    UP = "up"
    DOWN = "down"
    RESTARTING = "restarting"
    RETIRED = "retired"


@dataclass(eq=False)
class Server:
    """One server as the pool sees it.

    Attributes:
        tokens: prompt and longest response tokens of its requests in flight.
        faults: requests that failed since the last one that succeeded.
        work: the requests in flight.
        doubt: set when somebody wants it checked now.
    """

    index: int
    client: ServerClient
    state: State = State.UP
    tokens: int = 0
    faults: int = 0
    work: set[asyncio.Future[Any]] = field(default_factory=set)
    doubt: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Waiter:
    tokens: int
    affinity: Hashable
    avoid: str
    placed: asyncio.Future[Server]

    def has_server(self) -> bool:
        """Whether it was placed, and neither cancelled nor failed before."""
        done = self.placed.done() and not self.placed.cancelled()
        return done and self.placed.exception() is None


class Placement:
    """First come, first served; to the server that has the prefix, else to the least loaded.

    Args:
        max_tokens: that one server is asked for at a time; 0 is `OVERCOMMIT` times its KV cache.

    Attributes:
        servers: all of them.
        version: of the weights that samples must come from; None takes every server as it is.
        held: nothing is placed.
    """

    def __init__(self, max_tokens: int = 0) -> None:
        self.servers: list[Server] = []
        self.version: int | None = None
        self.held = False
        self._max_tokens = max_tokens
        self._waiters: deque[_Waiter] = deque()
        self._homes: OrderedDict[Hashable, Server] = OrderedDict()
        self._idle = asyncio.Event()
        self._idle.set()
        self._failure: RolloutError | None = None

    async def enter(self, tokens: int, affinity: Hashable, avoid: str) -> Server:
        """Waits for a server with room; `leave` must follow.

        Args:
            affinity: of requests with an equal prefix; None has none.
            avoid: URL of the server that has just failed at it: taken only if there is no other.

        Raises:
            RolloutError: `fail` was called.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            waiter = _Waiter(tokens, affinity, avoid, asyncio.get_running_loop().create_future())
            self._waiters.append(waiter)
            self.dispatch()
            try:
                server = await waiter.placed
            except asyncio.CancelledError:
                if waiter.has_server():
                    self.leave(waiter.placed.result(), tokens)
                raise
            # Since it was placed the server may have gone down, or been quarantined.
            if self._takes_requests(server):
                return server
            self.leave(server, tokens)

    def leave(self, server: Server, tokens: int) -> None:
        """Gives the room of a request back."""
        server.tokens -= tokens
        if not any(s.tokens for s in self.servers):
            self._idle.set()
        self.dispatch()

    async def idle(self) -> None:
        """Waits until nothing is in flight; with `held` it stays so."""
        await self._idle.wait()

    def dispatch(self) -> None:
        """Places what can be placed; to be called when a server may have become free."""
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.placed.done():
                server = self._choose(waiter)
                if server is None:
                    return
                server.tokens += waiter.tokens
                self._idle.clear()
                if waiter.affinity is not None:
                    self._remember(waiter.affinity, server)
                waiter.placed.set_result(server)
            self._waiters.popleft()

    def fail(self, failure: RolloutError) -> None:
        """Everybody who waits gets `failure`, and whoever comes, until `recover`."""
        self._failure = failure
        for waiter in self._waiters:
            if not waiter.placed.done():
                waiter.placed.set_exception(failure)
        self._waiters.clear()

    def recover(self) -> None:
        """Takes `fail` back."""
        self._failure = None

    @property
    def num_waiting(self) -> int:
        """Requests without a server; may be asked from any thread."""
        return len(self._waiters)

    def is_current(self, server: Server) -> bool:
        """Whether its weights are those that samples must come from."""
        return self.version is None or server.client.version == self.version

    def _takes_requests(self, server: Server) -> bool:
        return not self.held and server.state is State.UP and self.is_current(server)

    def _choose(self, waiter: _Waiter) -> Server | None:
        with_room = [
            s
            for s in self.servers
            if self._takes_requests(s)
            # What is larger than all room goes alone.
            and (s.tokens == 0 or s.tokens + waiter.tokens <= self._capacity(s))
        ]
        others = [s for s in with_room if s.client.url != waiter.avoid] or with_room
        home = self._homes.get(waiter.affinity)
        if home in others:
            return home
        return min(others, key=lambda s: s.tokens / self._capacity(s), default=None)

    def _capacity(self, server: Server) -> float:
        return self._max_tokens or OVERCOMMIT * server.client.capabilities.max_tokens or 1 << 20

    def _remember(self, affinity: Hashable, server: Server) -> None:
        self._homes[affinity] = server
        self._homes.move_to_end(affinity)
        if len(self._homes) > MAX_HOMES:
            self._homes.popitem(last=False)
