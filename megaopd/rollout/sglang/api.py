"""SGLang's HTTP protocol as data: what versions differ in, what is asked, what can fail.

No input or output happens here. Versions 0.4.10 to 0.5.23 were read; what a version lacks is found
by its number, by the fields of its server information, or by a 404, never assumed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megaopd.batch import Completion, SamplingParams
from megaopd.errors import RolloutError

UNKNOWN_VERSION = -1
"""The weight version of a server whose weights did not come from us."""

CUT = "cut"
"""The `finish_reason` of a completion that the server ended early (a pause in mode "abort", an
end-of-sequence token that the request does not stop at): it is to be continued."""


class ServerFault(Exception):
    """A server did not do what it should have; another attempt, or another server, may.

    Attributes:
        partial: the tokens that had come before, or None.
        url: of the server, where it is known.
    """

    def __init__(self, message: str, partial: Completion | None = None) -> None:
        super().__init__(message)
        self.partial = partial
        self.url = ""


class ServerDown(ServerFault):
    """No connection, a reset one, or silence: the server itself is in doubt."""


class ServerStalled(ServerDown):
    """It accepts requests and makes no progress with them."""


class GivenUp(ServerDown):
    """We ended the request ourselves, as its server went down or lost its weights."""


class ServerBusy(ServerFault):
    """Status 5xx, or another one that says nothing about the request."""


class ServerFull(ServerBusy):
    """Status 429: it has enough to do; nothing is wrong with it."""


class BadAnswer(ServerFault):
    """Truncated JSON, counts that do not agree, stale weights: what came cannot be used."""


class UpdateFailed(ServerFault):
    """The server refused a part of a weight update, or its pausing."""


class RequestRejected(Exception):
    """Status 400: this request will never be answered, other requests may be."""


def refusal(status: int, text: str) -> Exception:
    """What a generation's status other than 200 means; 0 is an error without one."""
    if status in (0, 400, 413, 422):
        return RequestRejected(text)
    return ServerFull(text) if status == 429 else ServerBusy(text)


@dataclass(frozen=True)
class Capabilities:
    """What a server is and can do.

    Attributes:
        version: of SGLang, such as (0, 5, 23).
        max_tokens: tokens of its KV cache; 0 if it does not say.
        max_request_tokens: the most of one request, prompt and response, that are not cut short
            in silence; 0 if it does not say.
        num_ranks: processes that take part in a distributed weight update.
        incremental_stream: every event of a stream holds the new tokens alone.
        seeded: `sampling_seed` has an effect.
        keeps_weights: they survive a release of memory.
        device: "cuda" or "cpu", empty if it does not say.
    """

    version: tuple[int, ...]
    max_tokens: int = 0
    max_request_tokens: int = 0
    num_ranks: int = 1
    incremental_stream: bool = False
    seeded: bool = False
    keeps_weights: bool = False
    device: str = ""

    @property
    def stamps_versions(self) -> bool:
        """Updates take `weight_version`, answers carry it."""
        return self.version >= (0, 5, 2)

    @property
    def flushes_on_disk_update(self) -> bool:
        """/update_weights_from_disk takes `flush_cache`; older ones always flush."""
        return self.version >= (0, 5, 2)

    @property
    def pause_modes(self) -> bool:
        """/pause_generation takes a mode; older ones know "abort" alone."""
        return self.version >= (0, 5, 8)

    @property
    def info_path(self) -> str:
        """Answers at once, without the scheduler."""
        return "/model_info" if self.version >= (0, 5, 8) else "/get_model_info"

    @property
    def bracketed_updates(self) -> bool:
        """Tensor and distributed updates lie between /begin_ and /end_weight_update."""
        return self.version >= (0, 5, 22)


OLDEST = (0, 4, 10)
"""Before it, updates have other fields and requests cannot be aborted."""


def read_capabilities(info: Mapping[str, Any]) -> Capabilities:
    """Reads /server_info (/get_server_info before 0.5.8).

    Raises:
        RolloutError: no SGLang, or one that is too old.
    """
    numbers = re.match(r"v?(\d+(?:\.\d+)*)", str(info.get("version", "")))
    if numbers is None:
        raise RolloutError(
            "rollout server", "its server information names no version", "give the URL of an SGLang"
        )
    version = tuple(int(part) for part in numbers[1].split("."))
    if version < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise RolloutError("rollout server", f"SGLang {numbers[1]}", f"use {wanted} or newer")
    ranks = [as_int(info.get(name)) or 1 for name in ("tp_size", "pp_size")]
    return Capabilities(
        version=version,
        max_tokens=as_int(info.get("max_total_num_tokens")),
        # The scheduler takes 5 off its longest request for this figure, and generates up to 1 less
        # than that longest request.
        max_request_tokens=as_int(info.get("max_req_input_len")) + 4
        if info.get("max_req_input_len")
        else 0,
        num_ranks=math.prod(ranks) * _replicas(info),
        incremental_stream=bool(
            info.get("incremental_streaming_output") or info.get("stream_output")
        ),
        seeded=bool(info.get("enable_deterministic_inference")),
        keeps_weights=bool(info.get("enable_weights_cpu_backup")),
        device=str(info.get("device") or ""),
    )


def _replicas(info: Mapping[str, Any]) -> int:
    """Data-parallel replicas with ranks of their own; with DP attention they share the TP ranks."""
    return 1 if info.get("enable_dp_attention") else as_int(info.get("dp_size")) or 1


def as_int(value: Any) -> int:
    """A value of JSON as an integer, 0 if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def parse_version(text: Any) -> int:
    """A `weight_version` as we stamp it, `UNKNOWN_VERSION` for any other text."""
    text = str(text)
    return int(text) if text.isdecimal() else UNKNOWN_VERSION


@dataclass(frozen=True)
class GenerateRequest:
    """One continuation of one sequence of tokens.

    Attributes:
        input_ids: the tokens so far.
        params: `max_new_tokens` are those of this request; `n` and `seed` are not looked at.
        seed: of this sample, at least 0; has an effect where the server is deterministic.
        name: what it is for, in messages.
        affinity: requests of equal affinity share a prefix, and a server where there is room.
    """

    input_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    name: str = "request"
    affinity: Hashable = None

    @property
    def num_tokens(self) -> int:
        """Room that it takes in a server's KV cache at most."""
        return len(self.input_ids) + self.params.max_new_tokens

    def rest(self, done: Completion | None) -> GenerateRequest:
        """What is left of it after `done`."""
        if done is None:
            return self
        left = self.params.max_new_tokens - len(done.ids)
        params = replace(self.params, max_new_tokens=left)
        return replace(self, input_ids=self.input_ids + done.ids, params=params)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, where: str) -> None:
    """Raises RolloutError unless all ids are in [0, vocab_size): another one kills a server."""
    if not token_ids:
        raise RolloutError(where, "it is empty", "give it at least one token")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        raise RolloutError(
            where,
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}",
            "use the tokenizer that belongs to the model",
        )


def generate_body(
    request: GenerateRequest, rid: str, able: Capabilities, stream_interval: int
) -> dict[str, Any]:
    """The body of POST /generate.

    Args:
        rid: unique among all attempts; a server refuses one that it still works on.
        stream_interval: new tokens between two events of the stream.
    """
    params = request.params
    sampling: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "stop_token_ids": list(params.stop_token_ids),
        # True would switch `stop_token_ids` off as well. An end-of-sequence token that the model's
        # files name and the request does not is taken for a cut, see `answers`.
        "ignore_eos": not params.stop_token_ids,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "stream_interval": stream_interval,
    }
    if able.seeded:
        sampling["sampling_seed"] = request.seed
    return {
        "rid": rid,
        "input_ids": list(request.input_ids),
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": True,
    }
