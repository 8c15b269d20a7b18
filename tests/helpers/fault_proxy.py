"""An HTTP proxy before a real server: on request it does what a broken network or server does."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

from megaopd.rollout.sglang.loop import EventLoopThread


class FaultProxy:
    """Forwards to `upstream` all that it is not told to spoil. An `Endpoint`, as the server is.

    Args:
        upstream: has `url`, `api_key` and `admin_key`.

    Attributes:
        url: its own.
        requests: path -> number of requests that came.
        spoiled: fault -> number of requests that it spoiled.
        prompts: the `input_ids` of every generation that came.
    """

    def __init__(self, upstream: Any) -> None:
        self.api_key, self.admin_key = upstream.api_key, upstream.admin_key
        self.requests: Counter[str] = Counter()
        self.spoiled: Counter[str] = Counter()
        self.prompts: list[tuple[int, ...]] = []
        self.url = ""
        self._upstream = upstream.url
        self._faults: list[str] = []
        self._always = ""
        self._closed = False
        self._only: Callable[[dict[str, Any]], bool] = lambda body: True
        self._loop = EventLoopThread("fault-proxy")
        self._loop.run(self._start())

    def spoil(
        self, *faults: str, only: Callable[[dict[str, Any]], bool] = lambda body: True
    ) -> None:
        """Each of the next generations whose body `only` is true of meets one of these faults."""
        self._faults, self._only = list(faults), only

    def spoil_all(self, fault: str) -> None:
        """Every generation from now on; an empty string ends it."""
        self._always = fault

    def close(self) -> None:
        """The end of it: connections break, new ones are refused. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._loop.run(self._stop())
            self._loop.close()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            trust_env=False,
        )
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.path] += 1
        body = await request.read()
        if request.path == "/generate":
            asked = json.loads(body)
            self.prompts.append(tuple(asked["input_ids"]))
            fault = self._always
            if not fault and self._faults and self._only(asked):
                fault = self._faults.pop(0)
            if fault:
                self.spoiled[fault] += 1
                return await FAULTS[fault](self, request, body)
        return await self.forward(request, body)

    async def forward(
        self, request: web.Request, body: bytes, cut_after: int | None = None
    ) -> web.StreamResponse:
        """The server's answer; with `cut_after` only so many bytes of it, ended as if complete."""
        headers = {
            k: v for k, v in request.headers.items() if k in ("Authorization", "Content-Type")
        }
        async with self._session.request(
            request.method, self._upstream + request.path_qs, data=body, headers=headers
        ) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk[:cut_after])
                if cut_after is not None and (cut_after := cut_after - len(chunk)) <= 0:
                    break
            await response.write_eof()
            return response


Fault = Callable[[FaultProxy, web.Request, bytes], Awaitable[web.StreamResponse]]


def _status(status: int) -> Fault:
    async def answer(proxy: FaultProxy, request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response({"error": {"message": f"spoiled as {status}"}}, status=status)

    return answer


async def _truncated(proxy: FaultProxy, request: web.Request, body: bytes) -> web.StreamResponse:
    return await proxy.forward(request, body, cut_after=60)


async def _reset(proxy: FaultProxy, request: web.Request, body: bytes) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionResetError


async def _hang(proxy: FaultProxy, request: web.Request, body: bytes) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise TimeoutError


FAULTS: dict[str, Fault] = {
    "400": _status(400),
    "429": _status(429),
    "500": _status(500),
    "503": _status(503),
    "truncated": _truncated,
    "reset": _reset,
    "hang": _hang,
}

RETRIED = ("429", "500", "503", "truncated", "reset")
"""After which the same request may succeed."""
