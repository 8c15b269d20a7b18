"""One update of the servers' weights, all or nothing: a server that did not take all of it serves
no sample until it has.

Rank 0 talks to the servers, in the engine's event loop; while one bucket travels the ranks gather
the next. What goes wrong at servers never stops the gathering, in which all ranks take part, and is
drawn up at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from megaopd.errors import RolloutError
from megaopd.logger import get_logger
from megaopd.rollout.sglang.api import ServerDown, UpdateFailed
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.control import PauseMode
from megaopd.rollout.sglang.engine import SGLangEngine
from megaopd.rollout.sglang.pool import ServerPool
from megaopd.weight_sync.buckets import Bucket, buckets
from megaopd.weight_sync.carrier import Carrier, Faults, each
from megaopd.weight_sync.checksum import Checksums, disagreement

logger = get_logger(__name__)

T = TypeVar("T")

# Other ranks wait in a collective, which has a time limit: rank 0 gives a sign of life.
SIGN_OF_LIFE_S = 60.0
# The `version` of a client whose server is in the middle of an update. A server that goes down
# meanwhile and comes back is given another one, however quickly it does.
IN_UPDATE = -2
# Times that one server is sent one version. The last ones go by the fallback.
MAX_ATTEMPTS, BY_FALLBACK_FROM = 4, 2


class NoServerTookWeights(RolloutError):
    """Servers are up, and none of them has the new weights."""


@dataclass
class _Update:
    """Rank 0's view of an update.

    Attributes:
        clients: the servers that are updated.
        faults: those that failed a part of it.
        is_repair: the version is published; only servers that lack it are updated.
    """

    carrier: Carrier
    clients: list[ServerClient]
    version: int
    is_repair: bool
    faults: Faults = field(default_factory=dict)
    checksums: Checksums | None = None
    broken: RolloutError | None = None

    @property
    def good(self) -> list[ServerClient]:
        return [client for client in self.clients if client not in self.faults]


class ServerTransport:
    """Implements `WeightTransport`.

    Sent a version that is published already, it updates only the servers that are up and lack it,
    while the others go on: that is how a server is repaired.

    Args:
        carrier: how buckets travel.
        fallback: how they travel to a server where that failed twice.
        bucket_bytes: of weights that are gathered and sent at a time; twice as many exist for a
            while.
        partial: responses under way go on under the new weights; without it the update waits for
            them.
        verify: compare checksums after every update.
    """

    def __init__(
        self,
        carrier: Carrier,
        fallback: Carrier,
        *,
        bucket_bytes: int,
        partial: bool = True,
        verify: bool = False,
    ) -> None:
        self._carrier, self._fallback = carrier, fallback
        self._bucket_bytes = bucket_bytes
        self._partial = partial
        self._verify = verify
        # Server -> (version, times it was sent).
        self._attempts: WeakKeyDictionary[ServerClient, tuple[int, int]] = WeakKeyDictionary()

    def send(
        self, engine: SGLangEngine, weights: Iterator[tuple[str, Tensor]], version: int
    ) -> None:
        """See `WeightTransport`; collective. `weights` are all of the model's.

        Raises:
            NoServerTookWeights: on all ranks alike.
            RolloutError: on all ranks alike: a key is refused, a directory cannot be written.
        """
        rank_0 = engine.ranks.rank == 0
        quiet = engine.submit(self._quiet(engine, version)) if rank_0 else None
        update = self._wait_together(engine, quiet)
        if update is not None:
            self._stream(engine, update, weights)
        deque(weights, maxlen=0)  # on rank 0 it is at its end
        end = engine.submit(self._end(engine, update)) if update is not None else None
        self._wait_together(engine, end)

    def repairable(self, engine: SGLangEngine) -> bool:
        """Whether a server that is up lacks the published weights and is worth another attempt; on
        rank 0."""
        assert engine.pool is not None
        version = engine.pool.version
        return version is not None and bool(self._missing(engine, version))

    def hopeless(self, engine: SGLangEngine) -> bool:
        """Whether no server that is up has the published weights and none is worth another
        attempt; on rank 0."""
        pool = engine.pool
        assert pool is not None
        return _nobody_has_them(pool) and not self.repairable(engine)

    def close(self, engine: SGLangEngine) -> None:
        """Gives up what is shared with servers; on rank 0."""
        if engine.pool is not None:
            with contextlib.suppress(RolloutError):
                engine.run(self._carrier.close(engine.pool))

    def _wait_together(self, engine: SGLangEngine, future: Future[T] | None) -> T | None:
        """Collective: waits for rank 0's work at the servers, which may take minutes: responses
        that are waited for, checksums of a large model. Its result on rank 0, None elsewhere.

        Raises:
            RolloutError: on all ranks alike, as the work.
        """
        while True:
            news: object = None
            if future is not None:
                try:
                    future.result(timeout=SIGN_OF_LIFE_S)
                except TimeoutError:
                    news = "wait"
                except RolloutError as error:
                    news = error
            news = engine.ranks.broadcast(news)
            if isinstance(news, RolloutError):
                raise news
            if news is None:
                return future.result() if future else None

    async def _quiet(self, engine: SGLangEngine, version: int) -> _Update:
        pool = engine.pool
        assert pool is not None
        is_repair = pool.version == version
        if is_repair:
            clients = self._missing(engine, version)
            times = max((self._times_sent(client, version) for client in clients), default=0)
            carrier = self._carrier if times < BY_FALLBACK_FROM else self._fallback
        else:
            pool.hold()
            if not self._partial:
                await pool.idle()
            clients, carrier = pool.up(), self._carrier
        for client in clients:
            self._attempts[client] = (version, self._times_sent(client, version) + 1)
        update = _Update(carrier, clients, version, is_repair)
        # What is retracted computes its keys and values anew under the new weights. Under
        # "in_place" those of the old weights stay, and tokens after them are of no weights at all.
        mode: PauseMode = "retract" if self._partial and not is_repair else "abort"
        try:
            update.faults |= await each(pool, clients, lambda client: client.pause(mode))
            if carrier.bracketed:
                update.faults |= await each(pool, update.good, _begin_update)
            update.faults |= await carrier.open(pool, update.good)
        except RolloutError as error:
            update.broken = error
        for client in update.good:
            client.version = IN_UPDATE
        if self._verify:
            update.checksums = Checksums()
        return update

    def _missing(self, engine: SGLangEngine, version: int) -> list[ServerClient]:
        assert engine.pool is not None
        stale = engine.pool.stale()
        return [c for c in stale if self._times_sent(c, version) < MAX_ATTEMPTS]

    def _times_sent(self, client: ServerClient, version: int) -> int:
        last, times = self._attempts.get(client, (version, 0))
        return times if last == version else 0

    def _stream(
        self, engine: SGLangEngine, update: _Update, weights: Iterator[tuple[str, Tensor]]
    ) -> None:
        """Rank 0: gathers all buckets, and sends them as long as somebody takes them."""
        limit = update.carrier.max_bytes(update.good)
        max_bytes = min(self._bucket_bytes, limit or self._bucket_bytes)
        sent: Future[Faults] | None = None
        for bucket in buckets(weights, max_bytes):
            self._collect(update, sent)
            sent = None
            if update.good and update.broken is None:
                sent = engine.submit(self._carry(engine, update, bucket))
        self._collect(update, sent)

    async def _carry(self, engine: SGLangEngine, update: _Update, bucket: Bucket) -> Faults:
        assert engine.pool is not None
        stamp = update.version if bucket.is_last else None
        if update.checksums is not None:
            await asyncio.to_thread(update.checksums.add, bucket)
        return await update.carrier.carry(engine.pool, bucket, update.good, stamp)

    def _collect(self, update: _Update, sent: Future[Faults] | None) -> None:
        if sent is not None:
            try:
                update.faults |= sent.result()
            except RolloutError as error:
                update.broken = error

    async def _end(self, engine: SGLangEngine, update: _Update) -> None:
        await self._conclude(engine, update)
        if update.broken is not None:
            raise update.broken
        pool = engine.pool
        assert pool is not None
        # Those that could not be reached may be dead: the pool finds out, has them restarted, or
        # ends the run. They get the weights when they are back.
        refused = [f for f in update.faults.values() if not isinstance(f, ServerDown)]
        if refused and _nobody_has_them(pool):
            why = "; ".join(map(str, update.faults.values()))
            raise NoServerTookWeights(
                "weight sync", f"no server took version {update.version} ({why})", "read their logs"
            )

    async def _conclude(self, engine: SGLangEngine, update: _Update) -> None:
        """Ends the update at every server and publishes the version."""
        pool, faults = engine.pool, update.faults
        assert pool is not None
        if update.broken is not None:
            faults |= {c: UpdateFailed(str(update.broken)) for c in update.good}
        if update.carrier.bracketed:
            faults |= await each(pool, update.good, lambda client: client.end_update())
            # A bracket that is left open would refuse the next one.
            await each(pool, [c for c in faults if c in pool.up()], lambda c: c.end_update())
        if update.checksums is not None:
            faults |= await self._check(engine, update)
        for client in update.good:
            if client.version != IN_UPDATE:
                faults[client] = ServerDown(f"{client.url}: it was away during the update")
        for client, fault in faults.items():
            logger.warning("%s: did not take version %d: %s", client.url, update.version, fault)
            # Before it goes on: what it made of half an update must not become a sample.
            pool.quarantine(client, f"it did not take a weight update ({fault})")
        for client in update.good:
            client.version = update.version
        if not update.is_repair:
            pool.publish(update.version)
        lost = await each(pool, update.clients, lambda client: client.continue_())
        for client, fault in lost.items():
            if client not in faults:
                pool.quarantine(client, f"it does not go on after a weight update ({fault})")
                faults[client] = fault
        pool.resume()

    async def _check(self, engine: SGLangEngine, update: _Update) -> Faults:
        """The servers whose checksums are not ours, or not those of the others."""
        pool = engine.pool
        assert pool is not None
        assert update.checksums is not None
        answers: dict[ServerClient, dict[str, object]] = {}

        async def ask(client: ServerClient) -> None:
            answers[client] = await client.checksum()

        began = time.monotonic()
        faults = await each(pool, update.good, ask)
        faults |= disagreement(update.checksums, answers)
        elapsed_s = time.monotonic() - began
        logger.info(
            "checksums of version %d: %d of %d servers agree, %.1f s",
            *(update.version, len(update.clients) - len(faults), len(update.clients), elapsed_s),
        )
        return faults


def _nobody_has_them(pool: ServerPool) -> bool:
    """Whether servers are up, and all of them lack the published weights."""
    return bool(pool.up()) and len(pool.stale()) == len(pool.up())


async def _begin_update(client: ServerClient) -> None:
    try:
        await client.begin_update()
    except UpdateFailed:
        # One that a trainer which died had begun.
        await client.end_update()
        await client.begin_update()
