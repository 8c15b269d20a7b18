"""Weights in the request: handles of device memory to servers that share it, else by value.

CUDA IPC needs one host and both sides on GPUs that see each other's memory. By value it is a pickle
in base64 in JSON, which any server takes, at the price of a few copies of each bucket.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import pickle
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.pool import ServerPool
from megaopd.weight_sync.buckets import Bucket, on_host
from megaopd.weight_sync.carrier import Faults, each

# Of a request: a server's front end parses it as a whole, and answers no health check meanwhile.
MAX_VALUE_BYTES = 64 << 20

# In what torch makes of a CUDA tensor: the index of its device.
_DEVICE_ARGUMENT = 6


class TensorCarrier:
    """Implements `Carrier`.

    Args:
        by_value: never use CUDA IPC.
    """

    bracketed = True

    def __init__(self, *, by_value: bool) -> None:
        self._by_value = by_value
        self._sharing: frozenset[ServerClient] = frozenset()

    async def open(self, pool: ServerPool, clients: Sequence[ServerClient]) -> Faults:
        if not self._by_value:
            # In a thread: names of hosts are looked up.
            sharing = await asyncio.to_thread(lambda: [c for c in clients if _shares_gpus(c)])
            self._sharing = frozenset(sharing)
        return {}

    def max_bytes(self, clients: Sequence[ServerClient]) -> int | None:
        """See `Carrier`; by value a request holds a copy of the bucket for each rank."""
        ranks = [c.capabilities.num_ranks for c in clients if c not in self._sharing]
        return MAX_VALUE_BYTES // max(ranks) if ranks else None

    async def carry(
        self,
        pool: ServerPool,
        bucket: Bucket,
        clients: Sequence[ServerClient],
        version: int | None,
    ) -> Faults:
        sharing = self._sharing.intersection(clients)
        copied = "" if len(sharing) == len(clients) else await asyncio.to_thread(_value, bucket)

        async def update(client: ServerClient) -> None:
            # One for each rank; of a handle torch counts who uses it, so that none is sent twice.
            ranks = range(client.capabilities.num_ranks)
            handles = [_handles(bucket) if client in sharing else copied for _ in ranks]
            await client.update_from_tensor(handles, version=version, flush_cache=bucket.is_last)

        faults = await each(pool, clients, update)
        if sharing:
            torch.cuda.ipc_collect()
        return faults

    async def close(self, pool: ServerPool) -> None:
        pass


def _value(bucket: Bucket) -> str:
    """The bucket itself, in base64."""
    tensors = [(name, on_host(tensor)) for name, tensor in bucket.tensors]
    return base64.b64encode(pickle.dumps(tensors, pickle.HIGHEST_PROTOCOL)).decode()


class _HandlePickler(pickle.Pickler):
    """Pickles CUDA tensors as handles of their memory, with the device's UUID in place of its
    number, which is another one in the server's process."""

    def reducer_override(self, item: Any) -> Any:
        if not (isinstance(item, Tensor) and item.is_cuda):
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(item)
        device = str(torch.cuda.get_device_properties(arguments[_DEVICE_ARGUMENT]).uuid)
        before, after = arguments[:_DEVICE_ARGUMENT], arguments[_DEVICE_ARGUMENT + 1 :]
        return rebuild, (*before, device, *after)


def _handles(bucket: Bucket) -> str:
    """Handles of the bucket's device memory, in base64; the bucket has to outlive their use."""
    buffer = io.BytesIO()
    tensors = [(name, tensor.detach().contiguous()) for name, tensor in bucket.tensors]
    _HandlePickler(buffer, pickle.HIGHEST_PROTOCOL).dump(tensors)
    return base64.b64encode(buffer.getvalue()).decode()


def _shares_gpus(client: ServerClient) -> bool:
    return client.capabilities.device == "cuda" and is_this_host(client.url)


def is_this_host(url: str) -> bool:
    """Whether the host of `url` is the one that this process runs on."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    addresses = {str(info[4][0]).split("%")[0] for info in found}
    own = {a.address.split("%")[0] for links in psutil.net_if_addrs().values() for a in links}
    return any(a in own or ipaddress.ip_address(a).is_loopback for a in addresses)
