"""Several servers as one: a request is answered whatever happens to single servers.

Requests go only to servers that are up and whose weights are of the version last published. How
weights travel is not known here. Whoever updates them goes through these steps:

    pool.hold()                     nothing new is sent
    await pool.idle()               or `client.pause(...)` on all of `pool.up()`
    for each client of pool.up():   begin, buckets, end; then `client.version = version`, or
                                    `pool.quarantine(client, why)` where a part failed
    pool.publish(version)           from now on samples come from these weights alone
    pool.resume()                   after `client.continue_()`, if they were paused
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import aiohttp

from megaopd.batch import Completion
from megaopd.errors import RolloutError
from megaopd.logger import get_logger
from megaopd.rollout.sglang.answers import is_whole
from megaopd.rollout.sglang.api import (
    UNKNOWN_VERSION,
    GenerateRequest,
    GivenUp,
    ServerDown,
    ServerFault,
    ServerFull,
    ServerStalled,
    check_token_ids,
)
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.connection import new_session
from megaopd.rollout.sglang.health import Endpoint, HealthWatch, Restarter
from megaopd.rollout.sglang.placement import Placement, Server, State
from megaopd.rollout.sglang.response import Response

logger = get_logger(__name__)

T = TypeVar("T")

# Faults of one server in a row, without one success, that make it down.
MAX_FAULTS = 8
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 8.0
# Apart from the random numbers of the trainer's thread.
_jitter = random.Random()


@dataclass(frozen=True)
class Address:
    """The `Endpoint` of a server that somebody else runs."""

    url: str
    api_key: str = ""
    admin_key: str = ""


class ServerPool:
    """Many servers behind one `complete`. All methods belong to one event loop.

    Args:
        endpoints: the servers.
        vocab_size: ids from this on are never sent.
        restarter: restarts servers that are down; None waits for them to come back.
        max_tokens_in_flight: see `Placement`.
        progress_timeout_s: see `ServerClient`.
        health_interval_s: between two checks of a server.
        max_retries: times that a failed request is sent again.
        partial: whether a response that was cut may go on under other weights; if not, it starts
            again.
        settle: what is done with every server that comes, or comes back, before it is used.

    Attributes:
        counters: "retries", "cuts", "servers_lost", "servers_back" since the start.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        vocab_size: int,
        restarter: Restarter | None = None,
        max_tokens_in_flight: int = 0,
        progress_timeout_s: float = 30.0,
        health_interval_s: float = 3.0,
        max_retries: int = 5,
        partial: bool = True,
        settle: Callable[[ServerClient], Awaitable[None]] | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._endpoints = endpoints
        self._vocab_size = vocab_size
        self._progress_timeout_s = progress_timeout_s
        self._max_retries = max_retries
        self._partial = partial
        self._settle = settle
        self._placement = Placement(max_tokens_in_flight)
        self._health = HealthWatch(
            self._placement, self._open, settle, restarter, health_interval_s, self.counters
        )
        self._watch: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Asks all servers what they are and begins to watch them.

        Raises:
            RolloutError: one of them does not answer, or refuses our key.
        """
        for index, endpoint in enumerate(self._endpoints):
            try:
                client = await self._open(endpoint)
            except ServerFault as fault:
                await self.close()
                remedy = "start it, or correct rollout.urls"
                raise RolloutError(endpoint.url, f"no answer ({fault})", remedy) from None
            except RolloutError:
                await self.close()
                raise
            self._placement.servers.append(Server(index, client))
        self._watch = asyncio.create_task(self._health.run())
        self._watch.add_done_callback(self._unwatched)

    def _unwatched(self, watch: asyncio.Task[None]) -> None:
        """Nobody is to wait for servers that nobody watches."""
        if not watch.cancelled() and (error := watch.exception()) is not None:
            logger.error("the watch over the rollout servers broke", exc_info=error)
            found = f"the watch over them broke ({error!r})"
            self._placement.fail(RolloutError("rollout servers", found, "report this"))

    async def close(self) -> None:
        """Stops watching and closes all connections, which ends the requests on them."""
        if self._watch is not None:
            self._watch.cancel()
            # What broke it was told when it did.
            await asyncio.gather(self._watch, return_exceptions=True)
        self._placement.fail(RolloutError("rollout servers", "closed", "ask no more of them"))
        if self._session is not None:
            await self._session.close()

    # Requests.

    async def complete(self, request: GenerateRequest) -> Completion:
        """Answers one request; what was cut, by a weight update or a server's death, goes on from
        its tokens.

        Raises:
            RequestRejected: a server says that the request is wrong in itself.
            RolloutError: bad token ids, a request that no server has room for, no server left, or
                one failure more than `max_retries`.
        """
        check_token_ids(request.input_ids, self._vocab_size, request.name)
        self._check_length(request)
        response = Response(
            request,
            vocab_size=self._vocab_size,
            published=lambda: self.version,
            partial=self._partial,
            counters=self.counters,
        )
        num_empty = 0
        while not is_whole(response.done):
            before = response.done
            await self.ask(
                response.go_on,
                tokens=request.num_tokens,
                affinity=request.affinity,
                name=request.name,
            )
            got_on = response.done != before and response.done is not None and response.done.ids
            num_empty = 0 if got_on else num_empty + 1
            if num_empty > self._max_retries:
                found = f"was aborted {num_empty} times in a row before it had a token"
                raise RolloutError(request.name, found, "see who aborts requests on the servers")
        return response.done

    async def ask(
        self,
        work: Callable[[ServerClient], Awaitable[T]],
        *,
        tokens: int,
        affinity: Hashable = None,
        name: str,
    ) -> T:
        """Does `work` with some server, again with back-off, and with another one if there is one,
        when it fails.

        Args:
            tokens: room that it takes in the server's KV cache.
            affinity: work of equal affinity goes to the same server while that has room.
            name: what it is for, in messages.

        Raises:
            RolloutError: one failure more than `max_retries`, or no server is left.
        """
        failures, avoid = 0, ""
        while True:
            try:
                return await self.run(work, tokens=tokens, affinity=affinity, avoid=avoid)
            except ServerFault as fault:
                failures, avoid = failures + 1, fault.url
                self.counters["retries"] += 1
                if failures > self._max_retries:
                    raise RolloutError(
                        name,
                        f"failed {failures} times, at last: {fault}",
                        "look at the servers' logs",
                    ) from None
                backoff_s = min(FIRST_BACKOFF_S * 2 ** (failures - 1), MAX_BACKOFF_S)
                await asyncio.sleep(backoff_s * _jitter.uniform(0.5, 1))

    async def run(
        self,
        work: Callable[[ServerClient], Awaitable[T]],
        *,
        tokens: int,
        affinity: Hashable = None,
        avoid: str = "",
    ) -> T:
        """Does `work` once, with a server that is up and current.

        Args:
            tokens: room that it takes in the server's KV cache.
            affinity: work of equal affinity goes to the same server while that has room.
            avoid: URL of a server that is taken only if there is no other.

        Raises:
            ServerFault: it failed; its `url` says where.
            RolloutError: no server is left.
        """
        server = await self._placement.enter(tokens, affinity, avoid)
        client = server.client
        task = asyncio.ensure_future(work(client))
        server.work.add(task)
        try:
            result = await task
        except (asyncio.CancelledError, ServerFault) as error:
            this = asyncio.current_task()
            if this is not None and this.cancelling():
                # The caller does not want it any more.
                task.cancel()
                raise asyncio.CancelledError from None
            # Whoever else cancels it has given the server up.
            given_up = GivenUp(f"{client.url}: its requests were given up")
            fault = error if isinstance(error, ServerFault) else given_up
            fault.url = client.url
            if server.client is client:
                self._blame(server, fault)
            raise fault from None
        finally:
            server.work.discard(task)
            self._placement.leave(server, tokens)
        server.faults = 0
        return result

    def _blame(self, server: Server, fault: ServerFault) -> None:
        """Draws the consequences of a fault for its server."""
        if isinstance(fault, GivenUp | ServerFull):
            return
        server.faults += 1
        silent = server.client.silent_s > self._progress_timeout_s / 2
        if isinstance(fault, ServerStalled) and silent:
            self._health.down(server, str(fault))
        elif server.faults >= MAX_FAULTS:
            self._health.down(server, f"{server.faults} faults in a row, at last: {fault}")
        elif isinstance(fault, ServerDown):
            server.doubt.set()

    def _check_length(self, request: GenerateRequest) -> None:
        limit = self.max_request_tokens
        if limit and request.num_tokens > limit:
            raise RolloutError(
                request.name,
                f"{len(request.input_ids)} + {request.params.max_new_tokens} new tokens exceed "
                f"the servers' context {limit}",
                "shorten the prompt or the response, or give the servers more room",
            )

    # What weight sync needs.

    @property
    def version(self) -> int | None:
        """Of the weights that samples must come from; None takes every server as it is."""
        return self._placement.version

    @property
    def clients(self) -> list[ServerClient]:
        """Of all servers, whatever their state."""
        return [server.client for server in self._placement.servers]

    def up(self) -> list[ServerClient]:
        """The servers that are up, stale ones too."""
        return [s.client for s in self._placement.servers if s.state is State.UP]

    def stale(self) -> list[ServerClient]:
        """The servers that are up and lack the weights of `version`: restarted, or failed."""
        servers = self._placement.servers
        is_current = self._placement.is_current
        return [s.client for s in servers if s.state is State.UP and not is_current(s)]

    def starved(self) -> bool:
        """Whether requests wait because every server that is up lacks the weights of `version`."""
        stale = self.stale()
        waits = self._placement.num_waiting > 0 and not self._placement.held
        return waits and bool(stale) and len(stale) == len(self.up())

    @property
    def max_request_tokens(self) -> int:
        """The longest request that some server takes; 0 if one does not say."""
        limits = [client.capabilities.max_request_tokens for client in self.clients]
        return max(limits, default=0) if all(limits) else 0

    def hold(self) -> None:
        """Sends nothing new until `resume`."""
        self._placement.held = True

    async def idle(self) -> None:
        """Waits until no request is in flight. With `hold` it stays so."""
        await self._placement.idle()

    def resume(self) -> None:
        """Ends `hold`."""
        self._placement.held = False
        self._placement.dispatch()

    def publish(self, version: int) -> None:
        """From now on samples come from servers of this version alone."""
        self._placement.version = version
        self._placement.dispatch()

    def quarantine(self, client: ServerClient, why: str) -> None:
        """Its weights are not to be trusted: its requests go elsewhere, with the tokens they have,
        and it samples nothing before its `version` is the pool's again."""
        client.version = UNKNOWN_VERSION
        for server in self._placement.servers:
            if server.client is client:
                client.give_up(why, server.work)

    async def _open(self, endpoint: Endpoint) -> ServerClient:
        """A client that knows its server, which is ready to be used.

        Raises:
            ServerFault, RolloutError: see `ServerClient.probe` and `settle`.
        """
        if self._session is None:
            self._session = new_session()
        client = ServerClient(
            endpoint.url,
            api_key=endpoint.api_key,
            admin_key=endpoint.admin_key,
            session=self._session,
            progress_timeout_s=self._progress_timeout_s,
        )
        await client.probe()
        if self._settle is not None:
            await self._settle(client)
        return client
