"""What a server answered: streams put together, counts compared, weight versions per token."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeGuard

from megaopd.batch import Completion
from megaopd.errors import RolloutError
from megaopd.rollout.sglang.api import (
    CUT,
    BadAnswer,
    GenerateRequest,
    as_int,
    parse_version,
    refusal,
)


class StreamedAnswer:
    """Puts the events of a stream together.

    Servers differ: events hold all tokens so far, or the new ones alone. Of the first kind the last
    is all, and no other is even parsed.
    """

    def __init__(self, incremental: bool) -> None:
        self._incremental = incremental
        # What `output_token_logprobs` holds, from the first token on.
        self._entries: list[Any] = []
        self._last = b""

    def feed(self, event: bytes) -> None:
        """Takes the JSON of one event.

        Raises:
            BadAnswer: it is not JSON, or its counts do not fit what came before.
        """
        self._last = event
        if self._incremental:
            with _expected_shape():
                self._append(load_json(event))

    def _append(self, answer: dict[str, Any]) -> None:
        if "meta_info" not in answer:
            # An error, which `read_answer` reads.
            return
        meta = answer["meta_info"]
        new = meta.get("output_token_logprobs") or []
        # Some versions leave the log-probabilities cumulative beside incremental ids; and whoever
        # is aborted while it queues is told its last id again. The count is always that of all.
        total = meta.get("completion_tokens", len(self._entries) + len(new))
        first = total - len(new) if len(new) < total else 0
        known = self._entries[first:]
        new = new[len(new) - (total - first) :]
        if first > len(self._entries) or _ids(known) != _ids(new[: len(known)]):
            raise BadAnswer(f"an event of {len(new)} tokens that leaves {total} after others")
        told = [] if _aborted(meta) else answer.get("output_ids") or []
        self._entries[first:] = new
        if told != _ids(self._entries[len(self._entries) - len(told) :]):
            raise BadAnswer(f"{len(told)} token ids beside log-probabilities of others")

    def answer(self) -> dict[str, Any]:
        """All that has come, as one answer; empty if nothing has.

        Raises:
            BadAnswer: it is not JSON.
        """
        answer = load_json(self._last) if self._last else {}
        if self._incremental and "meta_info" in answer:
            meta = {**answer["meta_info"], "output_token_logprobs": self._entries}
            answer = {**answer, "output_ids": _ids(self._entries), "meta_info": meta}
        return answer


def _ids(entries: Sequence[Any]) -> list[Any]:
    return [entry[1] for entry in entries]


def _aborted(meta: Mapping[str, Any]) -> bool:
    return (meta.get("finish_reason") or {}).get("type") == "abort"


@contextmanager
def _expected_shape() -> Iterator[None]:
    """JSON of another shape than expected is a `BadAnswer`, whatever stumbles over it."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise BadAnswer(f"an answer of another shape ({type(error).__name__}: {error})") from None


def load_json(text: bytes | str) -> dict[str, Any]:
    """Raises BadAnswer unless `text` is a JSON object."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as error:
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
    with _expected_shape():
        return _read_answer(answer, request, version, finished)


def _read_answer(
    answer: Mapping[str, Any], request: GenerateRequest, version: int, finished: bool
) -> Completion:
    if "error" in answer:
        error = answer["error"]
        code = as_int(error.get("code")) if isinstance(error, Mapping) else 0
        raise refusal(code, error_text(answer))
    meta = answer.get("meta_info")
    if not isinstance(meta, Mapping):
        raise BadAnswer("an answer without meta_info")
    reason = meta.get("finish_reason") or {}
    kind = reason.get("type") if isinstance(reason, Mapping) else reason
    status = as_int(reason.get("status_code")) if isinstance(reason, Mapping) else 0
    if kind == "abort" and status >= 400:
        raise refusal(status, error_text(reason))
    entries = meta.get("output_token_logprobs") or []
    given, counted = answer.get("output_ids"), meta.get("completion_tokens")
    if not finished:
        # Servers go on while they write an event down: its parts may be of different moments.
        told = [len(part) for part in (entries, given) if part is not None]
        whole = min([*told, *([] if counted is None else [counted])])
        entries, counted = entries[:whole], whole
        given = None if given is None else given[:whole]
    limit, stops = request.params.max_new_tokens, request.params.stop_token_ids
    if len(entries) > limit:
        raise BadAnswer(f"{len(entries)} tokens where {limit} were asked for")
    # Servers with a tokenizer give no output_ids before 0.5; with the log-probabilities ids come
    # always.
    if given is not None and list(given) != _ids(entries):
        raise BadAnswer(f"{len(given)} token ids beside log-probabilities of {len(entries)} others")
    if counted is not None and counted != len(entries):
        raise BadAnswer(f"{counted} tokens counted, {len(entries)} log-probabilities sent")
    ids, logprobs = _tokens(entries, version)
    versions = _token_versions(meta, len(ids), version)
    if not finished or kind == "abort":
        return Completion(ids, logprobs, CUT, versions)
    if kind == "stop" and ids:
        ended = "stop" if ids[-1] in stops else "length" if len(ids) == limit else CUT
        return Completion(ids, logprobs, ended, versions)
    if kind == "length" and len(ids) == limit:
        return Completion(ids, logprobs, "length", versions)
    raise BadAnswer(f"finish reason {kind!r} after {len(ids)} of {limit} tokens")


def _tokens(entries: Sequence[Any], version: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ids and log-probabilities of the entries of `output_token_logprobs`."""
    for entry in entries:
        logprob, token = entry[0], entry[1]
        if not isinstance(token, int) or isinstance(token, bool):
            raise BadAnswer(f"a token id that is none ({str(token)[:20]!r})")
        # JSON has no NaN: servers write null.
        if logprob is None or not math.isfinite(logprob):
            raise RolloutError(
                "rollout engine",
                f"weights of version {version} give non-finite probabilities",
                "restart from an earlier checkpoint with a lower learning rate",
            )
    return tuple(_ids(entries)), tuple(float(entry[0]) for entry in entries)


def _token_versions(meta: Mapping[str, Any], num_tokens: int, version: int) -> tuple[int, ...]:
    """The weight version of each token: from the spans of newer servers, else one for all."""
    spans = meta.get("weight_versions")
    if spans:
        versions: list[int] = []
        for span in spans:
            start, end = span["start"], span["end"]
            if start != len(versions) or not start <= end <= num_tokens:
                raise BadAnswer("weight versions that leave tokens out")
            versions += [parse_version(span["version"])] * (end - start)
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
