"""What one server is told besides requests: pausing, weights, memory.

All of it raises `UpdateFailed` where the server refuses, and another `ServerFault` where it does
not answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megaopd.rollout.sglang.answers import error_text
from megaopd.rollout.sglang.api import Capabilities, UpdateFailed
from megaopd.rollout.sglang.connection import Connection

MEMORY = ("kv_cache", "weights")

PauseMode = Literal["abort", "retract", "in_place"]


class ServerControl:
    """The administrator's half of a `ServerClient`.

    Attributes:
        capabilities: see `ServerClient`.
        released: the kinds of memory that the server has given up, of `MEMORY`.
    """

    def __init__(self, connection: Connection, admin_key: str, update_timeout_s: float) -> None:
        self.capabilities = Capabilities(version=(0,))
        self.released: frozenset[str] = frozenset()
        self._connection = connection
        self._admin_key = admin_key
        self._update_timeout_s = update_timeout_s

    @property
    def url(self) -> str:
        return self._connection.url

    @property
    def paused(self) -> bool:
        """Between `pause` and `continue_`, when no progress is expected."""
        return self._connection.paused

    async def pause(self, mode: PauseMode) -> None:
        """Stops generation. Servers before 0.5.8 know "abort" alone, and do that.

        "abort" ends all requests as cut ones; "retract" and "in_place" keep them for `continue_`.

        Raises:
            UpdateFailed, ServerFault: it is not known to have paused.
        """
        self._connection.paused = True
        await self._admin("/pause_generation", {"mode": mode})

    async def continue_(self) -> None:
        """Resumes generation after `pause`.

        Raises:
            UpdateFailed, ServerFault: it is not known to have resumed.
        """
        await self._admin("/continue_generation", {})
        self._connection.resumed()

    async def abort(self, rid: str) -> None:
        """Ends one request, or all with an empty `rid`."""
        await self._admin("/abort_request", {"rid": rid, "abort_all": not rid})

    async def flush_cache(self) -> None:
        """Forgets cached prefixes; refused (`UpdateFailed`) while requests run."""
        await self._admin("/flush_cache", {})

    async def begin_update(self) -> None:
        """Opens a bracket around tensor and distributed updates, where the server knows one.

        Raises:
            UpdateFailed: refused; nothing may be broadcast to this server.
        """
        if self.capabilities.bracketed_updates:
            await self._admin("/begin_weight_update", {})

    async def end_update(self) -> None:
        """Closes the bracket of `begin_update`.

        Raises:
            UpdateFailed: the new weights could not be put into use.
        """
        if self.capabilities.bracketed_updates:
            await self._admin("/end_weight_update", {})

    async def update_from_disk(
        self, path: str, *, version: int | None, flush_cache: bool = True
    ) -> None:
        """Loads safetensors from a directory that the server can read.

        Args:
            version: what the server stamps on its samples from now on; None leaves its stamp.

        Raises:
            UpdateFailed: refused. With `flush_cache` and a request running that is said although
                the weights did change.
        """
        body: dict[str, Any] = {"model_path": path}
        if self.capabilities.flushes_on_disk_update:
            body["flush_cache"] = flush_cache
        await self._admin("/update_weights_from_disk", {**body, **self._stamp(version)})

    async def update_from_tensor(
        self,
        serialized: Sequence[str],
        *,
        version: int | None,
        flush_cache: bool = True,
        load_format: str | None = None,
    ) -> None:
        """Loads tensors out of the request.

        Args:
            serialized: for each of the server's tensor-parallel ranks the base64 of its pickled
                list of (name, tensor).
            load_format: such as "flattened_bucket"; None is the plain list.
        """
        body: dict[str, Any] = {
            "serialized_named_tensors": list(serialized),
            "flush_cache": flush_cache,
        }
        if load_format is not None:
            body["load_format"] = load_format
        await self._admin("/update_weights_from_tensor", {**body, **self._stamp(version)})

    async def init_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: Literal["nccl", "gloo"],
    ) -> None:
        """Joins a process group for distributed updates; returns when the group is complete."""
        await self._admin(
            "/init_weights_update_group",
            {
                "master_address": master_address,
                "master_port": master_port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": group_name,
                "backend": backend,
            },
        )

    async def update_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        version: int | None,
        flush_cache: bool = True,
    ) -> None:
        """Receives tensors that rank 0 of the group broadcasts in this order.

        Args:
            dtypes: torch's names, such as "bfloat16".
        """
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "flush_cache": flush_cache,
        }
        await self._admin("/update_weights_from_distributed", {**body, **self._stamp(version)})

    async def destroy_group(self, group_name: str) -> None:
        """Leaves the process group; nothing to do for servers that know no such request."""
        await self._admin(
            "/destroy_weights_update_group", {"group_name": group_name}, missing_ok=True
        )

    async def release_memory(self, tags: Sequence[str] = MEMORY) -> None:
        """Gives the device's memory back: of "weights", "kv_cache", or both. Nothing may run."""
        if wanted := [tag for tag in tags if tag not in self.released]:
            await self._admin("/release_memory_occupation", {"tags": wanted})
            self.released |= set(wanted)

    async def resume_memory(self, tags: Sequence[str] = MEMORY) -> None:
        """Takes released memory again; weights come back with unspecified values unless
        `capabilities.keeps_weights`."""
        if wanted := [tag for tag in tags if tag in self.released]:
            await self._admin("/resume_memory_occupation", {"tags": wanted})
            self.released -= set(wanted)

    async def checksum(self) -> dict[str, Any]:
        """What /weights_checker says of the server's tensors, as it came.

        Raises:
            UpdateFailed: the server knows no checksums.
        """
        return await self._admin("/weights_checker", {"action": "checksum"})

    def _stamp(self, version: int | None) -> dict[str, str]:
        if version is None or not self.capabilities.stamps_versions:
            return {}
        return {"weight_version": str(version)}

    async def _admin(
        self, path: str, body: Mapping[str, Any], missing_ok: bool = False
    ) -> dict[str, Any]:
        status, answer = await self._connection.request(
            "POST", path, body, self._update_timeout_s, self._admin_key
        )
        if status == 404 and missing_ok:
            return {}
        if status != 200 or answer.get("success") is False:
            raise UpdateFailed(f"{self.url}{path} answers {status}: {error_text(answer)}")
        return answer
