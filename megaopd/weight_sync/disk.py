"""Weights as files that the trainer writes and the servers read, one bucket after the other.

In /dev/shm a file is host memory. Every version of SGLang reads a directory of safetensors that
holds some of the model's tensors and leaves the others as they are.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from safetensors import SafetensorError
from safetensors.torch import save_file

from megaopd.errors import RolloutError
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.pool import ServerPool
from megaopd.weight_sync.buckets import Bucket, on_host
from megaopd.weight_sync.carrier import Faults, each

# With the host and the process, so that what a killed trainer leaves behind is known as such.
PREFIX = f"megaopd-weights-{socket.gethostname()}-"


class DiskCarrier:
    """Implements `Carrier`.

    Args:
        folder: a directory that the trainer and the servers see under this name. Buckets lie in
            directories of their own in it while they are carried.
    """

    # A disk update is a bracket by itself.
    bracketed = False

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    async def open(self, pool: ServerPool, clients: Sequence[ServerClient]) -> Faults:
        await asyncio.to_thread(self._remove_orphans)
        return {}

    def max_bytes(self, clients: Sequence[ServerClient]) -> int | None:
        return None

    async def carry(
        self,
        pool: ServerPool,
        bucket: Bucket,
        clients: Sequence[ServerClient],
        version: int | None,
    ) -> Faults:
        """See `Carrier`.

        Raises:
            RolloutError: the directory cannot be written.
        """
        path = await asyncio.to_thread(self._write, bucket)
        try:
            return await each(
                pool,
                clients,
                lambda client: client.update_from_disk(
                    str(path), version=version, flush_cache=bucket.is_last
                ),
            )
        finally:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def close(self, pool: ServerPool) -> None:
        pass

    def _write(self, bucket: Bucket) -> Path:
        path = None
        try:
            path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=self._folder))
            # Servers may run as another user of the same group.
            path.chmod(0o750)
            file = path / "model.safetensors"
            save_file({name: on_host(tensor) for name, tensor in bucket.tensors}, file)
            file.chmod(0o640)
        except (OSError, SafetensorError) as error:
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
            raise RolloutError(
                "rollout.sglang.sync_dir",
                f"{bucket.num_bytes} bytes of weights cannot be written to {self._folder} "
                f"({error})",
                "name a directory with room for rollout.sglang.bucket_bytes",
            ) from error
        return path

    def _remove_orphans(self) -> None:
        """Removes the buckets of trainers of this host that died over them."""
        for path in self._folder.glob(f"{PREFIX}*"):
            pid = path.name.removeprefix(PREFIX).split("-")[0]
            if pid.isdecimal() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(path, ignore_errors=True)
