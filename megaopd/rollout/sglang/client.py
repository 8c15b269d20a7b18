"""One SGLang server over HTTP: generation that is seen to progress, and what weight sync needs.

Nothing is retried here and no choice is made between servers; see `pool`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp

from megaopd.batch import Completion
from megaopd.errors import RolloutError
from megaopd.rollout.sglang.answers import StreamedAnswer, error_text, read_answer
from megaopd.rollout.sglang.api import (
    UNKNOWN_VERSION,
    BadAnswer,
    Capabilities,
    GenerateRequest,
    GivenUp,
    RequestRejected,
    ServerBusy,
    ServerDown,
    ServerFault,
    generate_body,
    parse_version,
    read_capabilities,
    refusal,
)
from megaopd.rollout.sglang.connection import BadStatus, Connection
from megaopd.rollout.sglang.control import ServerControl

# Events of a stream are wanted about this often: rarer ones look like a hang when the server slows
# down, more frequent ones cost it time, as each may repeat all tokens before it.
EVENT_EVERY_S = 1.0
MAX_INTERVAL = 256
# While it is not known how fast a server is, a response may come in so many events.
MAX_FIRST_EVENTS = 256


class ServerClient(ServerControl):
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
        connection = Connection(url, session, progress_timeout_s)
        super().__init__(connection, admin_key or api_key, update_timeout_s)
        self.version = UNKNOWN_VERSION
        self._given_up: WeakKeyDictionary[asyncio.Future[Any], str] = WeakKeyDictionary()
        self._api_key = api_key
        self._num_streams = 0
        # Of all streams together, as the last response that ended saw it.
        self._tokens_per_s = 0.0

    @property
    def silent_s(self) -> float:
        """Seconds since it last made a token for anybody, or was last resumed."""
        return self._connection.silent_s

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
            if status >= 500:
                raise ServerBusy(f"{self.url}{path} answers {status}: {error_text(answer)}")
        raise RolloutError(
            self.url, f"/get_server_info answers {status}", "give the URL of an SGLang server"
        )

    async def alive(self, timeout_s: float) -> bool:
        """Whether its front end answers within `timeout_s`; says nothing about generation."""
        try:
            status, _ = await self._get(self.capabilities.info_path, timeout_s)
        except (ServerFault, RolloutError):
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
            await self.generate_once({"input_ids": [0], "sampling_params": sampling}, timeout_s)
        except (ServerFault, RequestRejected, RolloutError):
            return False
        return True

    async def generate(self, request: GenerateRequest) -> Completion:
        """Runs one request; its `finish_reason` may be `api.CUT`.

        Raises:
            RequestRejected: this request is wrong in itself (status 400).
            ServerFault: one of its subclasses says what went wrong; what had come by then is its
                `partial`.
            RolloutError: our key is refused, or the probabilities are not finite.
        """
        version = self.version
        # A server refuses an id that it still works on, so every attempt has its own.
        rid = f"megaopd-{uuid.uuid4().hex}"
        interval = self._stream_interval(request.params.max_new_tokens)
        body = generate_body(request, rid, self.capabilities, interval)
        streamed = StreamedAnswer(self.capabilities.incremental_stream)
        first = 0.0
        self._num_streams += 1
        try:
            stream = self._connection.events("/generate", body, self._api_key)
            async with aclosing(stream) as events:
                async for event in events:
                    first = first or time.monotonic()
                    streamed.feed(event)
        except BadStatus as bad:
            raise _fault(bad.status, bad.answer) from None
        except ServerDown as fault:
            fault.partial = _salvage(streamed, request, version)
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            why = self._given_up.get(task) if task is not None else None
            if why is None:
                raise
            partial = _salvage(streamed, request, version)
            raise GivenUp(f"{self.url}: {why}", partial) from None
        finally:
            num_streams, self._num_streams = self._num_streams, self._num_streams - 1
        completion = read_answer(streamed.answer(), request, version)
        elapsed_s = time.monotonic() - first
        # Of a response in one event nothing is known.
        if len(completion.ids) > interval and elapsed_s > 0:
            self._tokens_per_s = (len(completion.ids) - 1) / elapsed_s * num_streams
        return completion

    async def generate_once(self, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """POST /generate without streaming, for scoring: the answer as it came.

        Raises:
            RequestRejected, ServerFault: as in `generate`; no answer in time is a `ServerStalled`.
        """
        status, answer = await self._connection.request(
            "POST", "/generate", body, timeout_s, self._api_key
        )
        self._connection.progressed()
        if status != 200:
            raise _fault(status, answer)
        if "meta_info" not in answer:
            raise BadAnswer(f"{self.url}: an answer that cannot be read")
        return answer

    def give_up(self, why: str, requests: Iterable[asyncio.Future[Any]]) -> None:
        """Ends these requests, tasks that called `generate`, as `GivenUp` with what they have so
        far."""
        for request in requests:
            self._given_up[request] = why
            request.cancel()

    def _stream_interval(self, max_new_tokens: int) -> int:
        """New tokens between two events: as many as one stream gets in `EVENT_EVERY_S` when all
        share what the server makes, so that it is not too many when their number rises."""
        if self._tokens_per_s:
            wanted = int(self._tokens_per_s / (self._num_streams + 1) * EVENT_EVERY_S)
        else:
            # It may be slow: short responses are asked for token by token.
            wanted = max_new_tokens // MAX_FIRST_EVENTS
        return max(1, min(wanted, MAX_INTERVAL))

    async def _get(self, path: str, timeout_s: float) -> tuple[int, dict[str, Any]]:
        return await self._connection.request("GET", path, None, timeout_s, self._api_key)


def _fault(status: int, answer: Mapping[str, Any]) -> Exception:
    return refusal(status, f"status {status}: {error_text(answer)}")


def _salvage(streamed: StreamedAnswer, request: GenerateRequest, version: int) -> Completion | None:
    """The tokens of a stream that broke off, None if there are none that can be read."""
    try:
        partial = read_answer(streamed.answer(), request, version, finished=False)
    except (ServerFault, RequestRejected, RolloutError):
        return None
    return partial if partial.ids else None
