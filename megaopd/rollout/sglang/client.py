"""One SGLang server over HTTP: generation that is seen to progress, and what weight sync needs.

Nothing is retried here and no choice is made between servers; see `pool`.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal

import aiohttp

from megaopd.batch import Completion
from megaopd.errors import RolloutError
from megaopd.rollout.sglang.api import (
    UNKNOWN_VERSION,
    BadAnswer,
    Capabilities,
    GenerateRequest,
    RequestRejected,
    ServerBusy,
    ServerDown,
    ServerFault,
    ServerStalled,
    StreamedAnswer,
    UpdateFailed,
    error_text,
    generate_body,
    load_json,
    parse_version,
    read_answer,
    read_capabilities,
)

PauseMode = Literal["abort", "retract", "in_place"]

CONNECT_TIMEOUT_S = 5.0
# Events of a stream are wanted about this often: rarer ones look like a hang, more frequent ones
# cost the server time, as each may repeat all tokens before it.
EVENT_EVERY_S = 3.0
FIRST_INTERVAL, MAX_INTERVAL = 32, 1024
# A request of its own may wait this many times longer than a whole server may be silent.
LOST_AFTER = 10


def new_session() -> aiohttp.ClientSession:
    """A session whose connections are kept and shared by all clients of one event loop.

    How many requests are in flight is the pool's decision, so connections are not limited. Proxies
    of the environment are not used: servers are addressed directly.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=75),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        trust_env=False,
    )


class ServerClient:
    """The HTTP of one server. All methods belong to the event loop of the session.

    Args:
        url: such as "http://127.0.0.1:30000".
        api_key: for ordinary requests, empty for none.
        admin_key: for updates, pausing and memory; empty takes `api_key`.
        session: see `new_session`.
        progress_timeout_s: a request without a new token for so long, while the server has none for
            any other request either, has stalled.
        update_timeout_s: the longest that a weight update or pausing may take.

    Attributes:
        version: the version of the weights it serves, `UNKNOWN_VERSION` until an update succeeded.
            `update_*` and `end_update` do not set it: whoever updates does, with `version =`, when
            the whole update is done.
        capabilities: after `probe`.
        paused: between `pause` and `continue_`, when no progress is expected.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        admin_key: str = "",
        session: aiohttp.ClientSession,
        progress_timeout_s: float = 30.0,
        update_timeout_s: float = 600.0,
    ) -> None:
        self.url = url.rstrip("/")
        self.version = UNKNOWN_VERSION
        self.capabilities = Capabilities(version=(0,))
        self.paused = False
        self._keys = (api_key, admin_key or api_key)
        self._session = session
        self._progress_timeout_s = progress_timeout_s
        self._update_timeout_s = update_timeout_s
        self._last_progress = 0.0
        self._resumed = 0.0
        self._tokens_per_s = 0.0

    async def probe(self, timeout_s: float = 30.0) -> Capabilities:
        """Asks what the server is; sets `capabilities` and, where it is told, nothing else.

        Raises:
            ServerDown, ServerBusy: it does not answer (yet).
            RolloutError: it is no SGLang, too old, or refuses our key.
        """
        for path in ("/server_info", "/get_server_info"):
            status, answer = await self._get(path, timeout_s)
            if status == 200:
                self.capabilities = read_capabilities(answer)
                return self.capabilities
        raise RolloutError(
            self.url, f"/get_server_info answers {status}", "give the URL of an SGLang server"
        )

    async def alive(self, timeout_s: float) -> bool:
        """Whether its front end answers within `timeout_s`; says nothing about generation."""
        try:
            status, _ = await self._get(self.capabilities.info_path, timeout_s)
        except ServerFault:
            return False
        return status == 200

    async def served_version(self, timeout_s: float = 10.0) -> int:
        """The weight version that the server itself names, `UNKNOWN_VERSION` if it names none.

        Raises:
            ServerFault: it does not answer.
        """
        status, answer = await self._get(self.capabilities.info_path, timeout_s)
        return parse_version(answer.get("weight_version")) if status == 200 else UNKNOWN_VERSION

    async def generates(self, timeout_s: float) -> bool:
        """Whether it makes a token within `timeout_s`: one costs a forward pass."""
        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        try:
            answer = await self.generate_once(
                {"input_ids": [0], "sampling_params": sampling}, timeout_s
            )
        except (ServerFault, RequestRejected):
            return False
        return "meta_info" in answer

    async def generate(self, request: GenerateRequest) -> Completion:
        """Runs one request; its `finish_reason` may be `api.CUT`.

        Raises:
            RequestRejected: this request is wrong in itself (status 400).
            ServerFault: one of its subclasses says what went wrong; what had come by then is its
                `partial`.
            RolloutError: our key is refused, or the probabilities are not finite.
        """
        version = self.version
        rid = f"megaopd-{uuid.uuid4().hex}"
        body = generate_body(request, rid, self.capabilities, self._stream_interval())
        streamed = StreamedAnswer(self.capabilities.incremental_stream)
        start = first = time.monotonic()
        try:
            async for event in self._events("/generate", body):
                first = time.monotonic() if first == start else first
                streamed.feed(event)
            completion = read_answer(streamed.answer(), request, version)
        except ServerDown as fault:
            fault.partial = _salvage(streamed, request, version)
            raise
        elapsed = time.monotonic() - first
        if len(completion.ids) > 1 and elapsed > 0:
            self._tokens_per_s = (len(completion.ids) - 1) / elapsed
        return completion

    async def generate_once(self, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """POST /generate without streaming, for scoring: the answer as it came.

        Raises:
            RequestRejected, ServerFault: as in `generate`; no answer in time is a `ServerStalled`.
        """
        status, answer = await self._request("POST", "/generate", body, timeout_s)
        self._last_progress = time.monotonic()
        if status != 200:
            raise _fault(status, answer)
        return answer

    async def pause(self, mode: PauseMode) -> None:
        """Stops generation. Servers before 0.5.8 know "abort" alone, and do that.

        "abort" ends all requests as cut ones; "retract" and "in_place" keep them for `continue_`.

        Raises:
            UpdateFailed, ServerFault: it is not known to have paused.
        """
        self.paused = True
        await self._admin("/pause_generation", {"mode": mode})

    async def continue_(self) -> None:
        """Resumes generation after `pause`.

        Raises:
            UpdateFailed, ServerFault: it is not known to have resumed.
        """
        await self._admin("/continue_generation", {})
        self.paused, self._resumed = False, time.monotonic()

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

    async def release_memory(self, tags: Sequence[str] | None = None) -> None:
        """Gives the device's memory back: of "weights", "kv_cache", or by default of both."""
        await self._admin("/release_memory_occupation", {"tags": list(tags) if tags else None})

    async def resume_memory(self, tags: Sequence[str] | None = None) -> None:
        """Takes the memory again; weights come back with unspecified values."""
        await self._admin("/resume_memory_occupation", {"tags": list(tags) if tags else None})

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

    def _stream_interval(self) -> int:
        if not self._tokens_per_s:
            return FIRST_INTERVAL
        every_s = min(EVENT_EVERY_S, self._progress_timeout_s / 10)
        return max(1, min(int(self._tokens_per_s * every_s), MAX_INTERVAL))

    async def _admin(
        self, path: str, body: Mapping[str, Any], missing_ok: bool = False
    ) -> dict[str, Any]:
        status, answer = await self._request(
            "POST", path, body, self._update_timeout_s, key=self._keys[1]
        )
        if status == 404 and missing_ok:
            return {}
        if status != 200 or answer.get("success") is False:
            raise UpdateFailed(f"{self.url}{path} answers {status}: {error_text(answer)}")
        return answer

    async def _get(self, path: str, timeout_s: float) -> tuple[int, dict[str, Any]]:
        return await self._request("GET", path, None, timeout_s)

    async def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float,
        key: str | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """One exchange: its status and its JSON, of which there may be none beside a status."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method,
                    self.url + path,
                    # By hand: a body of many megabytes is encoded once, as bytes.
                    data=None if body is None else json.dumps(body).encode(),
                    headers=self._headers(key),
                ) as response,
            ):
                text = await response.read()
                self._check_key(response.status)
        except TimeoutError:
            raise ServerStalled(f"{self.url}{path}: no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerDown(f"{self.url}{path}: {_reason(error)}") from None
        if response.status == 200 and path == "/generate":
            return 200, load_json(text)
        try:
            return response.status, load_json(text)
        except BadAnswer:
            return response.status, {"message": text.decode(errors="replace")}

    async def _events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        """The JSON texts of a stream of server-sent events, up to its end mark."""
        own = time.monotonic()
        buffer = b""
        headers = self._headers(None)
        try:
            response = await self._patient(
                self._session.post(
                    self.url + path, data=json.dumps(body).encode(), headers=headers
                ),
                own,
                started=False,
            )
            async with response:
                if response.status != 200:
                    self._check_key(response.status)
                    text = await asyncio.wait_for(response.read(), self._progress_timeout_s)
                    raise _fault(response.status, _loosely(text))
                started = False
                while chunk := await self._patient(response.content.readany(), own, started):
                    own = self._last_progress = time.monotonic()
                    started = True
                    *events, buffer = (buffer + chunk).split(b"\n\n")
                    for event in events:
                        text = event.strip().removeprefix(b"data:").strip()
                        if text == b"[DONE]":
                            return
                        if text:
                            yield text
        except TimeoutError:
            raise ServerStalled(f"{self.url}{path}: no progress") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerDown(f"{self.url}{path}: {_reason(error)}") from None
        raise ServerDown(f"{self.url}{path}: the stream ended without its end mark")

    async def _patient(self, awaitable: Any, own: float, started: bool) -> Any:
        """Awaits the next piece of a stream for as long as the server is seen to work.

        A request that still queues is known by the progress of others; one that has begun and is
        then forgotten while the others go on is given up as well, only later.

        Args:
            own: when this request last had a piece.

        Raises:
            TimeoutError: it has stalled.
        """
        task = asyncio.ensure_future(awaitable)
        try:
            while True:
                done, _ = await asyncio.wait([task], timeout=self._progress_timeout_s / 4)
                if done:
                    return task.result()
                now = time.monotonic()
                if self.paused:
                    continue
                own_since = max(own, self._resumed)
                if now - max(own_since, self._last_progress) > self._progress_timeout_s:
                    raise TimeoutError
                if started and now - own_since > LOST_AFTER * self._progress_timeout_s:
                    raise TimeoutError
        finally:
            if not task.done():
                task.cancel()

    def _headers(self, key: str | None) -> dict[str, str]:
        key = self._keys[0] if key is None else key
        headers = {"Content-Type": "application/json"}
        return {**headers, "Authorization": f"Bearer {key}"} if key else headers

    def _check_key(self, status: int) -> None:
        if status in (401, 403):
            raise RolloutError(
                self.url,
                f"the server refuses the key (status {status})",
                "set the variables named by rollout.sglang.api_key_env and admin_key_env",
            )


def _fault(status: int, answer: Mapping[str, Any]) -> Exception:
    """What a status other than 200 of a generation means."""
    text = f"status {status}: {error_text(answer)}"
    if status == 429 or status >= 500:
        return ServerBusy(text)
    return RequestRejected(text)


def _loosely(text: bytes) -> dict[str, Any]:
    try:
        return load_json(text)
    except BadAnswer:
        return {"message": text.decode(errors="replace")}


def _salvage(streamed: StreamedAnswer, request: GenerateRequest, version: int) -> Completion | None:
    """The tokens of a stream that broke off, None if there are none that can be trusted."""
    try:
        partial = read_answer(streamed.answer(), request, version, finished=False)
    except (ServerFault, RequestRejected):
        return None
    return partial if partial.ids else None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
