"""A server that speaks SGLang's HTTP in this process, and misbehaves on request.

For the client's answers to faults that a real server cannot be made to show on demand; what a
server really does is tested with real ones.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

VOCAB = 512

CONTROL = (
    *("/pause_generation", "/continue_generation", "/abort_request", "/flush_cache"),
    *("/begin_weight_update", "/end_weight_update", "/update_weights_from_disk"),
    *("/update_weights_from_tensor", "/update_weights_from_distributed"),
    *("/init_weights_update_group", "/destroy_weights_update_group"),
    *("/release_memory_occupation", "/resume_memory_occupation", "/weights_checker"),
)

Fault = Callable[[web.Request, dict[str, Any]], Any]


def next_token(ids: list[int]) -> int:
    """The fake model: the next token follows from all before, so a continuation can be checked."""
    return (5 * ids[-1] + sum(ids) + 7 * len(ids) ** 2) % VOCAB


def response_to(prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(next_token(ids))
    return tuple(ids[len(prompt) :])


def logprob_of(token: int) -> float:
    return -token / VOCAB


class FakeServer:
    """An `Endpoint`.

    Attributes:
        faults: what the next requests to /generate meet, one each: a status, "truncated", "reset",
            "silent", seconds of silence as a float, "hang" (a first token, then nothing), "abort"
            (cut in the middle), "abort first" (before a token), "extra_logprob", "alien id",
            "nan", "error event"; None is none.
        always: the fault of all further ones.
        delay_s: between two tokens.
        version: of the weights, as the server stamps it.
        requests: bodies that /generate has received.
        control: status of each path that is no request; others are 404.
        told: (path, body) of those.
        calls: how often each path was asked.
        frozen: no path answers any more.
        running, most_running: streams at one time, now and at most.
    """

    def __init__(self, version: str = "default", release: str = "0.5.23", key: str = "") -> None:
        self.faults: list[Any] = []
        self.always: Any = None
        self.delay_s = 0.0
        self.version = version
        self.release = release
        self.api_key = self.admin_key = key
        self.info: dict[str, Any] = {}
        self.requests: list[dict[str, Any]] = []
        self.control = dict.fromkeys(CONTROL, 200)
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.calls: Counter[str] = Counter()
        self.frozen = False
        self.running = 0
        self.most_running = 0
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._port = 0

    async def start(self) -> FakeServer:
        """Serves, at its old port if it did before; nothing if it does already."""
        if self._runner is not None:
            return self
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        return self

    async def stop(self) -> None:
        """As a process that is killed: open connections break. `start` starts it at its port."""
        if self._runner is not None:
            for connection in list(self._runner.server.connections):
                connection.transport and connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = "/" + request.match_info["path"]
        self.calls[path] += 1
        if self.frozen:
            await asyncio.sleep(3600)
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = json.loads(await request.read() or b"{}")
        old = tuple(map(int, self.release.split("."))) < (0, 5, 8)
        if path in (("/get_server_info",) if old else ("/server_info", "/get_server_info")):
            info = {"max_total_num_tokens": 4096, "max_req_input_len": 1018, "tp_size": 1}
            return web.json_response({"version": self.release} | info | self.info)
        if path in (("/get_model_info",) if old else ("/model_info", "/get_model_info")):
            return web.json_response({"weight_version": self.version})
        if path == "/generate":
            return await self._generate(request, body)
        if path in self.control:
            self.told.append((path, body))
            status = self.control[path]
            # Some of SGLang's answers are no JSON objects.
            if path == "/flush_cache":
                return web.Response(text="Cache flushed.", status=status)
            return web.json_response(
                None if "memory" in path else {"success": status == 200}, status=status
            )
        return web.json_response({"error": {"message": "Not Found"}}, status=404)

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.requests.append(body)
        if not body.get("stream"):
            fault = self.always
        else:
            fault = self.faults.pop(0) if self.faults else self.always
        if fault == "silent" or (fault == "hang" and not body.get("stream")):
            await asyncio.sleep(3600)
        if isinstance(fault, float):
            await asyncio.sleep(fault)
        if isinstance(fault, int):
            error: Any = {"message": "as asked for"} if fault == 400 else "as asked for"
            return web.json_response({"error": error}, status=fault)
        if not body.get("stream"):
            return web.json_response({"output_ids": [1], "meta_info": {}})
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            return await self._stream(request, body, fault)
        finally:
            self.running -= 1

    async def _stream(
        self, request: web.Request, body: dict[str, Any], fault: Any
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        params, ids = body["sampling_params"], list(body["input_ids"])
        num_prompt, limit = len(ids), params["max_new_tokens"]
        for sent in range(1, limit + 1):
            ids.append(next_token(ids))
            done = ids[-1] in params["stop_token_ids"]
            reason = {"type": "stop", "matched": ids[-1]} if done else None
            if sent == limit and not done:
                reason = {"type": "length", "length": limit}
            if fault == "abort first":
                ids.pop()
                sent = 0
            if fault == "abort first" or (fault == "abort" and sent == (limit + 1) // 2):
                reason = {"type": "abort", "message": "Aborted", "status_code": None}
            # Cumulative, or the new token alone.
            told = ids[-1:] if self.info.get("incremental_streaming_output") else ids[num_prompt:]
            answer = self._answer(told, sent, reason, fault)
            if fault == "error event":
                answer = {"error": {"message": "too long"}}
            text = json.dumps(answer)
            if fault == "truncated" and sent == (limit + 1) // 2:
                await response.write(f"data: {text[: len(text) // 2]}\n\ndata: [DONE]\n\n".encode())
                return response
            if fault == "reset" and sent == (limit + 1) // 2:
                request.transport.abort()
                return response
            await response.write(f"data: {text}\n\n".encode())
            if fault == "hang":
                await asyncio.sleep(3600)
            await asyncio.sleep(self.delay_s)
            if reason:
                break
        await response.write(b"data: [DONE]\n\n")
        return response

    def _answer(self, ids: list[int], count: int, reason: Any, fault: Any) -> dict[str, Any]:
        logprobs: list[Any] = [[logprob_of(token), token, None] for token in ids]
        if fault == "extra_logprob":
            logprobs.append([0.0, 1, None])
        if fault == "alien id":
            ids = [*ids[:-1], VOCAB]
            logprobs[-1][1] = VOCAB
        if fault == "nan":
            logprobs[-1][0] = None
        meta = {
            "finish_reason": reason,
            "completion_tokens": count,
            "output_token_logprobs": logprobs,
            "weight_version": self.version,
        }
        return {"output_ids": ids, "meta_info": meta}
