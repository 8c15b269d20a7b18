"""HTTP to one server: keys, time limits, and streams that are seen to progress.

Statuses are told to the caller as they are, but for a refused key; what goes wrong below HTTP
becomes a `ServerFault`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

import aiohttp

from megaopd.errors import RolloutError
from megaopd.rollout.sglang.answers import load_json
from megaopd.rollout.sglang.api import BadAnswer, ServerDown, ServerStalled

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
# Servers close a connection that was idle for 5 s, and a POST on such a one fails.
KEEP_ALIVE_S = 4.0
# aiohttp's RuntimeErrors say that a stream or a session was closed while somebody used it.
BROKEN = (aiohttp.ClientError, OSError, RuntimeError)
# A request of its own may wait this many times longer than a whole server may be silent.
LOST_AFTER = 10


class BadStatus(Exception):
    """A stream was answered with a status other than 200.

    Attributes:
        status: the status.
        answer: its body.
    """

    def __init__(self, status: int, answer: dict[str, Any]) -> None:
        super().__init__(f"status {status}")
        self.status, self.answer = status, answer


def new_session() -> aiohttp.ClientSession:
    """A session whose connections are kept and shared by all clients of one event loop.

    How many requests are in flight is the pool's decision, so connections are not limited. Proxies
    of the environment are not used: servers are addressed directly.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        trust_env=False,
    )


class Connection:
    """What goes over the wire to one server.

    Args:
        url: of the server, without a path.
        session: see `new_session`.
        progress_timeout_s: a stream without anything new for so long, while no other stream of the
            server has anything either, has stalled.

    Attributes:
        paused: nothing is expected of its streams.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, progress_timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self.paused = False
        self._session = session
        self._progress_timeout_s = progress_timeout_s
        self._last_progress = 0.0
        self._resumed = 0.0

    @property
    def silent_s(self) -> float:
        """Seconds since anything came on a stream, or `progressed` was called."""
        return time.monotonic() - max(self._last_progress, self._resumed)

    def progressed(self) -> None:
        """Notes that the server has made something."""
        self._last_progress = time.monotonic()

    def resumed(self) -> None:
        """Its streams are expected to go on again, from now."""
        self.paused, self._resumed = False, time.monotonic()

    async def request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float, key: str
    ) -> tuple[int, dict[str, Any]]:
        """One exchange.

        Returns:
            its status and its JSON; under "message" the text where that is none.

        Raises:
            ServerStalled: no answer within `timeout_s`.
            ServerDown: no connection, or it broke.
            RolloutError: the key is refused.
        """
        # In a thread: weights are many megabytes, and the loop has streams to look after. As bytes,
        # so that they are not encoded a second time.
        data = None if body is None else await asyncio.to_thread(_encode, body)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method,
                    self.url + path,
                    data=data,
                    headers=_headers(key),
                ) as response,
            ):
                text = await response.read()
        except BROKEN as error:
            # A connection that cannot be made in time is one of aiohttp's errors, too.
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
                late = f"{self.url}{path}: no answer within {timeout_s:g} s"
                raise ServerStalled(late) from None
            raise ServerDown(f"{self.url}{path}: {_reason(error)}") from None
        self._check_key(response.status)
        return response.status, _loosely(text)

    async def events(
        self, path: str, body: Mapping[str, Any], key: str
    ) -> AsyncGenerator[bytes, None]:
        """The JSON texts of a stream of server-sent events, up to its end mark.

        Raises:
            BadStatus: there is no stream.
            ServerStalled: nothing new for too long.
            ServerDown: no connection, or it broke before the end mark.
            RolloutError: the key is refused.
        """
        own, buffer = time.monotonic(), b""
        posted = self._session.post(
            self.url + path, data=json.dumps(body).encode(), headers=_headers(key)
        )
        try:
            async with await self._patient(posted, own, started=False) as response:
                if response.status != 200:
                    self._check_key(response.status)
                    text = await self._patient(response.read(), time.monotonic(), started=True)
                    raise BadStatus(response.status, _loosely(text))
                started = False
                while chunk := await self._patient(response.content.readany(), own, started):
                    own, started = time.monotonic(), True
                    self.progressed()
                    *events, buffer = (buffer + chunk).split(b"\n\n")
                    for event in events:
                        text = event.strip().removeprefix(b"data:").strip()
                        if text == b"[DONE]":
                            return
                        if text:
                            yield text
        except BROKEN as error:
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
                raise ServerStalled(f"{self.url}{path}: no progress") from None
            raise ServerDown(f"{self.url}{path}: {_reason(error)}") from None
        raise ServerDown(f"{self.url}{path}: the stream ended without its end mark")

    async def _patient(self, awaitable: Awaitable[T], own: float, started: bool) -> T:
        """Awaits the next piece of a stream for as long as the server is seen to work.

        A request that still queues is known by the progress of others; one that has begun and is
        then forgotten while the others go on is given up as well, only later.

        Args:
            own: when this request last had a piece.

        Raises:
            TimeoutError: it has stalled.
        """
        task = asyncio.ensure_future(awaitable)
        limit_s = self._progress_timeout_s
        try:
            while True:
                since = max(own, self._resumed)
                left_s = max(since, self._last_progress) + limit_s - time.monotonic()
                if started:
                    left_s = min(left_s, since + LOST_AFTER * limit_s - time.monotonic())
                if self.paused:
                    left_s = limit_s
                if left_s <= 0:
                    raise TimeoutError
                await asyncio.wait([task], timeout=left_s)
                if task.done():
                    return task.result()
        finally:
            task.cancel()

    def _check_key(self, status: int) -> None:
        if status in (401, 403):
            raise RolloutError(
                self.url,
                f"the server refuses the key (status {status})",
                "set the variables named by rollout.sglang.api_key_env and admin_key_env, "
                "or teacher.api_key_env",
            )


def _encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _headers(key: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    return {**headers, "Authorization": f"Bearer {key}"} if key else headers


def _loosely(text: bytes) -> dict[str, Any]:
    try:
        return load_json(text)
    except BadAnswer:
        return {"message": text.decode(errors="replace")}


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
