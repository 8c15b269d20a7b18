"""SGLang's protocol as data: what versions differ in, and answers that do not add up."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from megaopd.batch import Completion, SamplingParams
from megaopd.errors import RolloutError
from megaopd.rollout.sglang.answers import StreamedAnswer, append, error_text, read_answer, settled
from megaopd.rollout.sglang.api import (
    CUT,
    UNKNOWN_VERSION,
    BadAnswer,
    Capabilities,
    GenerateRequest,
    RequestRejected,
    ServerBusy,
    generate_body,
    parse_version,
    read_capabilities,
)

REQUEST = GenerateRequest((1, 2), SamplingParams(max_new_tokens=4, stop_token_ids=(9,)))


def answer(ids: list[int], reason: Any = None, **meta: Any) -> dict[str, Any]:
    logprobs = [[-token / 8, token, None] for token in ids]
    fields = {"finish_reason": reason, "output_token_logprobs": logprobs} | meta
    return {"output_ids": ids, "meta_info": fields}


LENGTH = {"type": "length", "length": 4}


# Version -> (stamps versions, flushes on update, pause modes, brackets, path of its description).
VERSIONS = {
    "0.4.10": (False, False, False, False, "/get_model_info"),
    "0.4.10.post2": (False, False, False, False, "/get_model_info"),
    "0.5.2": (True, True, False, False, "/get_model_info"),
    "0.5.8": (True, True, True, False, "/model_info"),
    "0.5.22rc1": (True, True, True, True, "/model_info"),
    "v0.5.23": (True, True, True, True, "/model_info"),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_versions_can_do(version):
    able = read_capabilities({"version": version})
    assert VERSIONS[version] == (
        able.stamps_versions,
        able.flushes_on_disk_update,
        able.pause_modes,
        able.bracketed_updates,
        able.info_path,
    )


def test_what_a_server_says_of_itself():
    info = {
        "version": "0.5.23",
        "max_total_num_tokens": 8192,
        "max_req_input_len": 250,
        "tp_size": 2,
        "pp_size": 1,
        "dp_size": 4,
        "stream_output": True,
        "enable_deterministic_inference": True,
        "enable_weights_cpu_backup": True,
    }
    expected = Capabilities((0, 5, 23), 8192, 254, 8, True, True, True)
    assert read_capabilities(info) == expected
    assert read_capabilities(info | {"enable_dp_attention": True}).num_ranks == 2
    assert read_capabilities({"version": "0.5.0"}) == Capabilities((0, 5, 0))
    with pytest.raises(RolloutError, match="SGLang 0.4.9; use 0.4.10 or newer"):
        read_capabilities({"version": "0.4.9"})
    with pytest.raises(RolloutError, match="names no version"):
        read_capabilities({"model": "another server"})


def test_versions_of_weights():
    assert [parse_version(text) for text in ("7", 12, "default", None, "-1", "1.5")] == [
        7,
        12,
        *[UNKNOWN_VERSION] * 4,
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (answer([5, 6, 7, 8], LENGTH), "length"),
        (answer([5, 9], {"type": "stop", "matched": 9}), "stop"),
        (answer([5, 6, 7, 9], {"type": "stop", "matched": 9}), "stop"),
        # A token that the model's files call the end, and the request does not.
        (answer([5, 6], {"type": "stop", "matched": 6}), CUT),
        (answer([5, 6, 7, 8], {"type": "stop", "matched": 8}), "length"),
        (answer([5], {"type": "abort", "message": "Aborted"}), CUT),
        (answer([], {"type": "abort", "status_code": None}), CUT),
    ],
)
def test_how_a_response_ends(given, expected):
    completion = read_answer(given, REQUEST, version=3)
    ids = tuple(given["output_ids"])
    versions = (3,) * len(ids)
    assert completion == Completion(ids, tuple(-t / 8 for t in ids), expected, versions)
    del given["output_ids"]  # servers with a tokenizer give text instead
    assert read_answer(given, REQUEST, version=3) == completion


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"error": {"message": "too long", "code": 400}}, RequestRejected, "too long"),
        ({"error": "too long"}, RequestRejected, "too long"),
        ({"error": {"message": "full", "code": 503}}, ServerBusy, "full"),
        (answer([], {"type": "abort", "status_code": 400, "message": "m"}), RequestRejected, "m"),
        (answer([], {"type": "abort", "status_code": 503, "message": "m"}), ServerBusy, "m"),
        ({}, BadAnswer, "without meta_info"),
        (answer([5, 6], LENGTH), BadAnswer, "'length' after 2 of 4"),
        (answer([5, 6]), BadAnswer, "None after 2 of 4"),
        (answer([1, 2, 3, 4, 5], LENGTH), BadAnswer, "5 tokens where 4"),
        (answer([5, 6, 7, 8], LENGTH) | {"output_ids": [5, 6, 7]}, BadAnswer, "3 token ids"),
        (answer([5, 6, 7, 8], LENGTH) | {"output_ids": [5, 6, 7, 9]}, BadAnswer, "4 token ids"),
        (answer([5, 6, 7, 8], LENGTH, completion_tokens=3), BadAnswer, "3 tokens counted"),
        (answer([5], LENGTH, output_token_logprobs=[7]), BadAnswer, "another shape"),
        (
            answer([5, 9], {"type": "stop"}, output_token_logprobs=[[None, 5], [0.0, 9]]),
            RolloutError,
            "version 3 give non-finite",
        ),
    ],
)
def test_answers_that_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        read_answer(given, REQUEST, version=3)


def test_versions_of_tokens():
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 4}]

    def versions(**meta: Any) -> tuple[int, ...]:
        return read_answer(answer([5, 6, 7, 8], LENGTH, **meta), REQUEST, version=3).versions

    assert versions(weight_versions=spans, weight_version="4") == (3, 4, 4, 4)
    # The stamp is that of the end: the beginning may be older, and is called so.
    assert versions(weight_version="4") == (3, 3, 3, 3)
    assert versions(weight_version="2") == (2, 2, 2, 2)
    assert versions(weight_version="default") == (UNKNOWN_VERSION,) * 4
    assert versions() == (3, 3, 3, 3)
    for bad in (spans[1:], spans[:1], [*spans, {"version": "5", "start": 4, "end": 5}]):
        with pytest.raises(BadAnswer, match="weight versions"):
            versions(weight_versions=bad)


def test_streams():
    whole = answer([5, 6, 7, 8], LENGTH)
    cumulative = [b"not looked at", str(whole).replace("'", '"').replace("None", "null").encode()]
    streamed = StreamedAnswer(incremental=False)
    assert streamed.answer() == {}
    for event in cumulative:
        streamed.feed(event)
    assert read_answer(streamed.answer(), REQUEST, 0).ids == (5, 6, 7, 8)


ABORT = {"type": "abort", "message": "Aborted"}


@pytest.mark.parametrize(
    ("last", "told", "reason"),
    [
        ([7, 8], [7, 8], LENGTH),
        # Some versions leave the log-probabilities cumulative beside incremental ids.
        ([7, 8], [5, 6, 7, 8], LENGTH),
        ([7, 8], [7, 8], ABORT),
        # Aborted while it queues: the last id once more, and all log-probabilities.
        ([6], [5, 6], ABORT),
        # The same, put together with an event before it.
        ([7, 7], [7, 5, 6, 7], ABORT),
    ],
)
def test_incremental_streams(last, told, reason):
    count = len(told) if told[0] == 5 else 4
    count = 3 if len(told) == 4 and reason is ABORT else count
    streamed = StreamedAnswer(incremental=True)
    streamed.feed(json.dumps(answer([5, 6], completion_tokens=2)).encode())
    final = answer(told, reason, completion_tokens=count) | {"output_ids": last}
    streamed.feed(json.dumps(final).encode())
    completion = read_answer(streamed.answer(), REQUEST, 0)
    assert completion.ids == (5, 6, 7, 8)[:count]
    assert completion.logprobs == tuple(-token / 8 for token in completion.ids)
    assert completion.finish_reason == ("length" if reason is LENGTH else CUT)


@pytest.mark.parametrize(
    ("ids", "count"),
    [([8], 4), ([7], 2), ([7, 8, 9], 4)],
    ids=["a gap", "one too many", "another token than before"],
)
def test_incremental_streams_that_do_not_fit(ids, count):
    streamed = StreamedAnswer(incremental=True)
    streamed.feed(json.dumps(answer([5, 6], completion_tokens=2)).encode())
    with pytest.raises(BadAnswer):
        streamed.feed(json.dumps(answer(ids, LENGTH, completion_tokens=count)).encode())


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("text", [b'{"output_ids": [1', b"[" * 100_000, b"[]", b"\xff"])
def test_events_that_are_no_json(incremental, text):
    def read() -> None:
        streamed = StreamedAnswer(incremental)
        streamed.feed(text)
        streamed.answer()

    with pytest.raises(BadAnswer, match="JSON"):
        read()


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a JSON value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [path, *(p for key, item in items for p in places(item, (*path, key)))]


def test_answers_of_any_shape_are_refused_and_nothing_else():
    """A server that is broken, or wants to break us: every value of a right answer is replaced by
    values of every kind."""
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 4}]
    right = answer([5, 6, 7, 8], LENGTH, completion_tokens=4, weight_versions=spans)
    others: list[Any] = [None, True, -1, 3, 10**12, 1.5, 1e308 * 10, "a", [], [1], {}, {"a": 1}]
    num_refused = 0
    for path in places(right):
        for other in others:
            changed = json.loads(json.dumps(right))
            where = changed
            for key in path[:-1]:
                where = where[key]
            if path:
                where[path[-1]] = other
            for incremental in (False, True):
                for finished in (False, True):
                    streamed = StreamedAnswer(incremental)
                    try:
                        streamed.feed(json.dumps(changed if path else other).encode())
                        done = read_answer(streamed.answer(), REQUEST, 3, finished)
                    except (BadAnswer, RequestRejected, ServerBusy, RolloutError):
                        num_refused += 1
                        continue
                    assert all(type(token) is int for token in done.ids)
                    assert all(type(logprob) is float for logprob in done.logprobs)
                    assert len(done.ids) == len(done.logprobs) == len(done.versions) <= 4
    assert num_refused > 1000


def test_partial_answers_are_cut_to_what_all_their_parts_hold():
    """Servers make tokens while they write an event down."""
    moving = answer([5, 6, 7], completion_tokens=2) | {"output_ids": [5, 6, 7, 8]}
    partial = read_answer(moving, REQUEST, 3, finished=False)
    assert partial == Completion((5, 6), (-5 / 8, -6 / 8), CUT, (3, 3))
    with pytest.raises(BadAnswer):
        read_answer(moving, REQUEST, 3)


def test_continued_completions():
    cut = Completion((5,), (-1.0,), CUT, (1,))
    rest = Completion((6, 9), (-2.0, -3.0), "stop", (2, 2))
    assert append(cut, rest) == Completion((5, 6, 9), (-1.0, -2.0, -3.0), "stop", (1, 2, 2))
    assert append(None, rest) is rest
    assert append(rest, None) is rest
    assert settled(cut, REQUEST) is cut
    ended = replace(rest, finish_reason=CUT)
    assert settled(ended, REQUEST) == rest
    full = Completion((5, 6, 7, 8), (0.0,) * 4, CUT, (1,) * 4)
    assert settled(full, REQUEST) == replace(full, finish_reason="length")
    assert settled(Completion((), (), CUT, ()), REQUEST).finish_reason == CUT


def test_a_body():
    body = generate_body(replace(REQUEST, seed=5), "r1", Capabilities((0, 5, 23)), 16)
    assert body["input_ids"] == [1, 2]
    assert (body["rid"], body["stream"], body["return_logprob"]) == ("r1", True, True)
    sampling = body["sampling_params"]
    assert sampling["stream_interval"] == 16
    assert sampling["stop_token_ids"] == [9]
    # Older versions refuse sampling parameters that they do not know.
    assert "sampling_seed" not in sampling
    seeded = generate_body(replace(REQUEST, seed=5), "r1", Capabilities((0, 5, 23), seeded=True), 1)
    assert seeded["sampling_params"]["sampling_seed"] == 5


def test_what_a_server_says_is_wrong():
    assert error_text({"error": {"message": "a\n b", "code": 1}}) == "a b"
    assert error_text({"success": False, "message": "no"}) == "no"
    assert error_text({"detail": "Not Found"}) == "Not Found"
    assert error_text("x" * 1000) == "x" * 300
