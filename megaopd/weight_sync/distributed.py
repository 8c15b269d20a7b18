"""Weights by broadcast, in a process group of rank 0 and all ranks of the servers.

The group stays from update to update, as long as the servers are the same. A member that fails
breaks a broadcast for all; the others are then given the same bucket again in a new group.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from megaopd.errors import RolloutError
from megaopd.logger import get_logger
from megaopd.rollout.sglang.api import ServerDown, ServerFault, UpdateFailed
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.pool import ServerPool
from megaopd.weight_sync.buckets import Bucket
from megaopd.weight_sync.carrier import ANSWER_TIMEOUT_S, Faults, each

logger = get_logger(__name__)

T = TypeVar("T")

# Connecting takes seconds; so long all wait for one that does not come.
JOIN_TIMEOUT_S = 30.0
# One bucket, from the request to the last tensor.
BROADCAST_TIMEOUT_S = ANSWER_TIMEOUT_S
# A server notices by itself that a broadcast was given up.
LEAVE_TIMEOUT_S = 30.0
# A broadcast that is overdue is given up by us; NCCL's own way would end this process.
GROUP_TIMEOUT_S = 1800.0
POLL_S = 0.002


class DistributedCarrier:
    """Implements `Carrier`.

    Args:
        backend: "nccl" between GPUs, else "gloo".
    """

    bracketed = True

    def __init__(self, backend: Literal["nccl", "gloo"]) -> None:
        self._backend = backend
        self._members: tuple[ServerClient, ...] = ()
        self._name = ""
        self._group: dist.ProcessGroup | None = None

    async def open(self, pool: ServerPool, clients: Sequence[ServerClient]) -> Faults:
        """See `Carrier`; joins the servers to the group.

        Raises:
            RolloutError: rank 0 has no address for the servers.
        """
        if not clients or (tuple(clients) == self._members and self._group is not None):
            return {}
        await self.close(pool)
        # Loopback is of use only where all servers are on this host.
        host = min(map(address_towards, (c.url for c in clients)), key=_is_loopback)
        ranks = [client.capabilities.num_ranks for client in clients]
        offsets = dict(zip(clients, accumulate(ranks, initial=1), strict=False))
        size, name = 1 + sum(ranks), f"megaopd-{uuid.uuid4().hex[:12]}"
        store = dist.TCPStore(
            host,
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_TIMEOUT_S),
            multi_tenant=True,
        )
        port, backend = store.port, self._backend
        ours = _in_thread(partial(_join, backend, store, size, name))
        # It ends with its last user: servers that wait for one that does not come hear of it.
        del store

        async def join(client: ServerClient) -> None:
            await client.init_group(
                master_address=host,
                master_port=port,
                rank_offset=offsets[client],
                world_size=size,
                group_name=name,
                backend=backend,
            )

        group, faults = await self._together(pool, clients, name, join, ours)
        if not faults:
            self._group, self._members, self._name = group, tuple(clients), name
            return {}
        # Those that did join are in a group that will never work.
        await self._leave(pool, clients, name)
        return await self._without(pool, clients, faults, self.open)

    def max_bytes(self, clients: Sequence[ServerClient]) -> int | None:
        return None

    async def carry(
        self,
        pool: ServerPool,
        bucket: Bucket,
        clients: Sequence[ServerClient],
        version: int | None,
    ) -> Faults:
        group = self._group
        if group is None or not clients:
            return _all_fail(clients, "the group of weight sync broke")
        # One request for all tensors, each of which is broadcast by itself: every version of SGLang
        # knows that.
        tensors = [(name, tensor.detach().contiguous()) for name, tensor in bucket.tensors]
        over = threading.Event()

        async def receive(client: ServerClient) -> None:
            await client.update_from_distributed(
                names=[name for name, _ in tensors],
                dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
                shapes=[tensor.shape for _, tensor in tensors],
                group_name=self._name,
                version=version,
                flush_cache=bucket.is_last,
            )

        ours = _in_thread(lambda: _broadcast([tensor for _, tensor in tensors], group, over))
        _, faults = await self._together(pool, clients, self._name, receive, ours, over)
        if not faults:
            return {}

        async def again(pool: ServerPool, rest: Sequence[ServerClient]) -> Faults:
            faults = await self.open(pool, rest)
            good = [client for client in rest if client not in faults]
            return faults | await self.carry(pool, bucket, good, version) if good else faults

        await self.close(pool)
        return await self._without(pool, clients, faults, again)

    async def _together(
        self,
        pool: ServerPool,
        clients: Sequence[ServerClient],
        name: str,
        ask: Callable[[ServerClient], Awaitable[None]],
        ours: Future[T],
        over: threading.Event | None = None,
    ) -> tuple[T | None, Faults]:
        """What all members do at the same time, of which one that fails stops the others.

        Args:
            name: of the group.
            ours: rank 0's part of it.
            over: set when that is in vain.

        Returns:
            rank 0's result, None if it failed; and the servers that failed by themselves, or all if
            it is not known who did.
        """
        first: Faults = {}
        failed = asyncio.Event()

        async def noted(client: ServerClient) -> None:
            try:
                await ask(client)
            except ServerFault as fault:
                if not failed.is_set() or isinstance(fault, ServerDown):
                    first[client] = fault
                failed.set()
                raise
            except asyncio.CancelledError:
                first[client] = ServerDown(f"{client.url}: it did not answer")
                failed.set()
                raise

        theirs = asyncio.ensure_future(each(pool, clients, noted))
        mine = asyncio.ensure_future(asyncio.wrap_future(ours))
        stop = asyncio.ensure_future(failed.wait())
        waited: list[asyncio.Future[Any]] = [mine, stop]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if over is not None and failed.is_set():
            over.set()
        result, why = None, ""
        try:
            result = await mine
        except (RuntimeError, TimeoutError) as error:
            why = str(error)
        if why:
            # Servers that still wait, for us or for those that failed, hear of it by their ends of
            # the connections.
            failed.set()
            self._give_up()
            await self._leave(pool, list(first), name)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(theirs, LEAVE_TIMEOUT_S if why else None)
        stop.cancel()
        if why and not first:
            return None, _all_fail(clients, f"the group of weight sync broke ({why})")
        return result, first

    async def _without(
        self,
        pool: ServerPool,
        clients: Sequence[ServerClient],
        faults: Faults,
        again: Callable[[ServerPool, Sequence[ServerClient]], Awaitable[Faults]],
    ) -> Faults:
        """Goes on with the servers that did not fail, in a group of their own."""
        rest = [client for client in clients if client not in faults]
        return faults | await again(pool, rest) if rest else faults

    async def close(self, pool: ServerPool) -> None:
        members, name = self._members, self._name
        self._give_up()
        await self._leave(pool, members, name)

    def _give_up(self) -> None:
        group, self._group, self._members = self._group, None, ()
        if group is not None:
            _in_thread(lambda: _destroy(group))

    async def _leave(self, pool: ServerPool, clients: Sequence[ServerClient], name: str) -> None:
        alive = [client for client in clients if client in pool.up()]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(
                each(pool, alive, lambda client: client.destroy_group(name)), LEAVE_TIMEOUT_S
            )


def address_towards(url: str) -> str:
    """This host's address as the host of `url` sees it.

    Raises:
        RolloutError: there is no way to that host.
    """
    parts = urlsplit(url)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM
        )[0]
        # A datagram socket that is connected sends nothing; it only finds its way.
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RolloutError(url, f"no way to it ({error})", "correct rollout.urls") from error


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _join(backend: str, store: dist.Store, size: int, name: str) -> dist.ProcessGroup | None:
    """Rank 0's end of the group; returns when the others have joined (nccl: at once).

    The servers make theirs with torch's default group machinery, which no public function does a
    second time in a process; the prefixes of the store have to be the same.
    """
    group, _ = c10d._new_process_group_helper(
        size,
        0,
        [],
        c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=timedelta(seconds=JOIN_TIMEOUT_S if backend == "gloo" else GROUP_TIMEOUT_S),
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


def _broadcast(tensors: list[Tensor], group: dist.ProcessGroup, over: threading.Event) -> None:
    """Rank 0's broadcasts, in order; returns when all members have them.

    Raises:
        TimeoutError: they do not, or `over` says that they never will.
        RuntimeError: a connection broke.
    """
    works = [dist.broadcast(tensor, group=group, group_src=0, async_op=True) for tensor in tensors]
    deadline = time.monotonic() + BROADCAST_TIMEOUT_S
    for work in works:
        while not work.is_completed():
            if over.is_set():
                raise TimeoutError("a server does not receive")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not received within {BROADCAST_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
        work.wait()


def _destroy(group: dist.ProcessGroup) -> None:
    with contextlib.suppress(RuntimeError, ValueError):
        group.abort()
    with contextlib.suppress(RuntimeError, ValueError):
        dist.destroy_process_group(group)


def _all_fail(clients: Sequence[ServerClient], why: str) -> Faults:
    return {client: UpdateFailed(f"{client.url}: {why}") for client in clients}


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Runs `work` in a thread of its own that never keeps the process alive: it may wait for a
    server that does not come."""
    future: Future[T] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()  # nobody cancels it after this
        try:
            future.set_result(work())
        except BaseException as error:
            # Its traceback would keep alive what has to end for others to hear of it.
            future.set_exception(error.with_traceback(None))

    threading.Thread(target=run, name="megaopd-weight-sync", daemon=True).start()
    return future
