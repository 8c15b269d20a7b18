"""What a server answered: streams put together, counts compared, weight versions per token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from megaopd.batch import Completion
from megaopd.errors import RolloutError
from megaopd.rollout.sglang.api import (
    CUT,
    BadAnswer,
    GenerateRequest,
    RequestRejected,
    ServerBusy,
    as_int,
    parse_version,
)


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
        code = as_int(error.get("code")) if isinstance(error, Mapping) else 0
        raise (ServerBusy if code >= 429 else RequestRejected)(error_text(answer))
    meta = answer.get("meta_info")
    if not isinstance(meta, Mapping):
        raise BadAnswer("an answer without meta_info")
    reason = meta.get("finish_reason") or {}
    kind = reason.get("type") if isinstance(reason, Mapping) else reason
    status = as_int(reason.get("status_code")) if isinstance(reason, Mapping) else 0
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
        ended = "stop" if ids[-1] in stops else "length" if len(ids) == limit else CUT
        return Completion(ids, logprobs, ended, versions)
    if kind == "length" and len(ids) == limit:
        return Completion(ids, logprobs, "length", versions)
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


def append(first: Completion | None, then: Completion | None) -> Completion | None:
    """A completion and what it was continued with; None is nothing."""
    if first is None or then is None:
        return then if first is None else first
    return Completion(
        first.ids + then.ids,
        first.logprobs + then.logprobs,
        then.finish_reason,
        first.versions + then.versions,
    )


def settled(done: Completion | None, request: GenerateRequest) -> Completion | None:
    """A cut completion that lacks nothing (only its end was not told) as a finished one."""
    if done is None or done.finish_reason != CUT or not done.ids:
        return done
    if done.ids[-1] in request.params.stop_token_ids:
        return replace(done, finish_reason="stop")
    if len(done.ids) == request.params.max_new_tokens:
        return replace(done, finish_reason="length")
    return done


def is_whole(done: Completion | None) -> TypeGuard[Completion]:
    """Whether there is nothing left to do."""
    return done is not None and done.finish_reason != CUT
