"""SGLang's HTTP protocol as data: what versions differ in, requests out, answers in, what can fail.

No input or output happens here. Versions 0.4.10 to 0.5.23 were read; what a version lacks is found
by its number, by the fields of its server information, or by a 404, never assumed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """

    def __init__(self, message: str, partial: Completion | None = None) -> None:
        super().__init__(message)
        self.partial = partial


class ServerDown(ServerFault):
    """No connection, a reset one, or silence: the server itself is in doubt."""


class ServerStalled(ServerDown):
    """It accepts requests and makes no progress with them."""


class ServerBusy(ServerFault):
    """Status 429 or 5xx."""


class BadAnswer(ServerFault):
    """Truncated JSON, counts that do not agree, stale weights: what came cannot be used."""


class UpdateFailed(ServerFault):
    """The server refused a part of a weight update, or its pausing."""


class RequestRejected(Exception):
    """Status 400: this request will never be answered, other requests may be."""


@dataclass(frozen=True)
class Capabilities:
    """What a server is and can do.

    Attributes:
        version: of SGLang, such as (0, 5, 23).
        max_tokens: tokens of its KV cache; 0 if it does not say.
        context_length: the most tokens of one request, prompt and response; 0 if it does not say.
        num_ranks: processes that take part in a distributed weight update.
        incremental_stream: every event of a stream holds the new tokens alone.
        seeded: `sampling_seed` has an effect.
        skips_tokenizer: it was started without a tokenizer.
    """

    version: tuple[int, ...]
    max_tokens: int = 0
    context_length: int = 0
    num_ranks: int = 1
    incremental_stream: bool = False
    seeded: bool = False
    skips_tokenizer: bool = False

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
    ranks = [_int(info.get(name)) or 1 for name in ("tp_size", "pp_size")]
    return Capabilities(
        version=version,
        max_tokens=_int(info.get("max_total_num_tokens")),
        # The scheduler keeps some tokens of its context for itself; the configured one is exact.
        context_length=_int(info.get("context_length")),
        num_ranks=math.prod(ranks) * _replicas(info),
        incremental_stream=bool(
            info.get("incremental_streaming_output") or info.get("stream_output")
        ),
        seeded=bool(info.get("enable_deterministic_inference")),
        skips_tokenizer=bool(info.get("skip_tokenizer_init")),
    )


def _replicas(info: Mapping[str, Any]) -> int:
    """Data-parallel replicas with ranks of their own; with DP attention they share the TP ranks."""
    return 1 if info.get("enable_dp_attention") else _int(info.get("dp_size")) or 1


def _int(value: Any) -> int:
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
        name: which sample it is for, in messages and as the key of prefix affinity before "/".
    """

    input_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    name: str = "request"

    @property
    def num_tokens(self) -> int:
        """Room that it takes in a server's KV cache at most."""
        return len(self.input_ids) + self.params.max_new_tokens

    @property
    def prompt_id(self) -> str:
        return self.name.rpartition("/")[0] or self.name


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
        # files name and the request does not is taken for a cut, see `read_answer`.
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


class StreamedAnswer:
    """Puts the events of a stream together.

    Servers differ: events hold all tokens so far, or the new ones alone. Of the first kind the last
    is all, and no other is even parsed.
    """

    def __init__(self, incremental: bool) -> None:
        self._incremental = incremental
        self._ids: list[int] = []
        self._logprobs: list[Any] = []
        self._last = b""

    def feed(self, event: bytes) -> None:
        """Takes the JSON of one event.

        Raises:
            BadAnswer: it is not JSON.
        """
        self._last = event
        if self._incremental:
            answer = load_json(event)
            meta = answer.get("meta_info", {})
            self._ids += answer.get("output_ids", [])
            logprobs = meta.get("output_token_logprobs") or []
            # Some versions leave the log-probabilities cumulative beside incremental ids.
            self._logprobs = (
                logprobs
                if len(logprobs) == len(self._ids) and len(self._logprobs) < len(logprobs)
                else self._logprobs + logprobs
            )

    def answer(self) -> dict[str, Any]:
        """All that has come, as one answer; empty if nothing has.

        Raises:
            BadAnswer: it is not JSON.
        """
        answer = load_json(self._last) if self._last else {}
        if self._incremental and "meta_info" in answer:
            meta = {**answer["meta_info"], "output_token_logprobs": self._logprobs}
            answer = {**answer, "output_ids": self._ids, "meta_info": meta}
        return answer


def load_json(text: bytes | str) -> dict[str, Any]:
    """Raises BadAnswer unless `text` is a JSON object."""
    try:
        answer = json.loads(text)
    except ValueError as error:
        raise BadAnswer(f"an answer that is not JSON ({error})") from None
    if not isinstance(answer, dict):
        raise BadAnswer(f"an answer that is no JSON object ({str(answer)[:80]})")
    return answer


def error_text(answer: Any) -> str:
    """What a server says is wrong, in any of its spellings."""
    if isinstance(answer, dict):
        for key in ("error", "message", "detail"):
            if key in answer:
                return error_text(answer[key])
    return " ".join(str(answer).split())[:300]


def read_answer(
    answer: Mapping[str, Any], request: GenerateRequest, version: int, finished: bool = True
) -> Completion:
    """Checks the answer to one request and makes a `Completion` of it.

    Args:
        version: the version for tokens of which the server does not say it.
        finished: False where the stream broke off: what there is becomes a cut completion.

    Raises:
        RequestRejected: an error of the request's own.
        ServerBusy: an error of the server's.
        BadAnswer: counts do not agree, or it ended in a way it should not.
        RolloutError: the model's probabilities are not finite.
    """
    if "error" in answer:
        error = answer["error"]
        code = _int(error.get("code")) if isinstance(error, Mapping) else 0
        raise (ServerBusy if code >= 429 else RequestRejected)(error_text(answer))
    meta = answer.get("meta_info")
    if not isinstance(meta, Mapping):
        raise BadAnswer("an answer without meta_info")
    reason = meta.get("finish_reason") or {}
    kind = reason.get("type") if isinstance(reason, Mapping) else reason
    status = _int(reason.get("status_code")) if isinstance(reason, Mapping) else 0
    if kind == "abort" and status >= 400:
        raise (RequestRejected if status == 400 else ServerBusy)(error_text(reason))
    ids, logprobs = _tokens(answer, meta, version)
    versions = _token_versions(meta, len(ids), version)
    limit, stops = request.params.max_new_tokens, request.params.stop_token_ids
    if len(ids) > limit:
        raise BadAnswer(f"{len(ids)} tokens where {limit} were asked for")
    if not finished or kind == "abort":
        return Completion(ids, logprobs, CUT, versions)
    if kind == "stop" and ids:
        if ids[-1] in stops:
            return Completion(ids, logprobs, "stop", versions)
        ended = "length" if len(ids) == limit else CUT
        return Completion(ids, logprobs, ended, versions)
    if kind == "length" and len(ids) == limit:
        ended = "stop" if ids and ids[-1] in stops else "length"
        return Completion(ids, logprobs, ended, versions)
    raise BadAnswer(f"finish reason {kind!r} after {len(ids)} of {limit} tokens")


def _tokens(
    answer: Mapping[str, Any], meta: Mapping[str, Any], version: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ids and log-probabilities, which must agree token by token."""
    try:
        entries = [(entry[0], entry[1]) for entry in meta.get("output_token_logprobs") or ()]
    except (TypeError, IndexError):
        raise BadAnswer("log-probabilities that are no lists of entries") from None
    ids = tuple(entry[1] for entry in entries)
    # Servers with a tokenizer give no output_ids before 0.5; with the log-probabilities ids come
    # always.
    given = answer.get("output_ids")
    if given is not None and tuple(given) != ids:
        raise BadAnswer(f"{len(given)} token ids beside log-probabilities of {len(ids)} others")
    counted = meta.get("completion_tokens")
    if counted is not None and counted != len(ids):
        raise BadAnswer(f"{counted} tokens counted, {len(ids)} log-probabilities sent")
    for logprob, _ in entries:
        # JSON has no NaN: servers write null.
        if logprob is None or not math.isfinite(logprob):
            raise RolloutError(
                "rollout engine",
                f"weights of version {version} give non-finite probabilities",
                "restart from an earlier checkpoint with a lower learning rate",
            )
    return ids, tuple(float(logprob) for logprob, _ in entries)


def _token_versions(meta: Mapping[str, Any], num_tokens: int, version: int) -> tuple[int, ...]:
    """The weight version of each token: from the spans of newer servers, else one for all."""
    spans = meta.get("weight_versions")
    if spans:
        versions: list[int] = []
        for span in spans:
            if span["start"] != len(versions):
                raise BadAnswer("weight versions that leave tokens out")
            versions += [parse_version(span["version"])] * (span["end"] - span["start"])
        if len(versions) != num_tokens:
            raise BadAnswer(f"weight versions of {len(versions)} tokens beside {num_tokens} tokens")
        return tuple(versions)
    # One stamp says which weights sampled the last token. Older than expected is the truth, newer
    # may be so for a part: none is then called newer than it is.
    if "weight_version" in meta:
        version = min(version, parse_version(meta["weight_version"]))
    return (version,) * num_tokens


def append(first: Completion | None, then: Completion) -> Completion:
    """A completion and what it was continued with."""
    if first is None:
        return then
    return Completion(
        first.ids + then.ids,
        first.logprobs + then.logprobs,
        then.finish_reason,
        first.versions + then.versions,
    )
