"""A teacher on servers: what answers are believed, and what becomes of those that are not. Servers
here misbehave on request; tests/distributed/test_sglang_teacher.py has a real one."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aiohttp import web

from megaopd.batch import Prompt, Sample, TokenSignal, TopKSignal
from megaopd.config import ParallelConfig, SGLangConfig, TeacherConfig
from megaopd.data.packing import Batching, Packing
from megaopd.errors import RolloutError
from megaopd.parallel.layout import Layout
from megaopd.rollout.sglang.loop import EventLoopThread
from megaopd.teacher.scores import read_scores, score_body
from megaopd.teacher.sglang import SGLangTeacher
from tests.helpers.fake_sglang import FakeServer

VOCAB, K = 32, 4


def logprobs_after(ids: list[int]) -> torch.Tensor:
    """The fake teacher: log-probabilities of the next token, from all before."""
    generator = torch.Generator().manual_seed(sum((i + 1) * t for i, t in enumerate(ids)))
    return torch.randn(VOCAB, generator=generator).log_softmax(0)


def honest(body: dict[str, Any]) -> dict[str, Any]:
    """What a server that behaves answers."""
    ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
    own: list[Any] = [[None, ids[start], None]]
    top: list[Any] = [None]
    for i in range(start + 1, len(ids)):
        logprobs = logprobs_after(ids[:i])
        own.append([float(logprobs[ids[i]]), ids[i], None])
        values, tokens = logprobs.topk(k)
        pairs = zip(values.tolist(), tokens.tolist(), strict=True)
        top.append([[value, token, None] for value, token in pairs])
    meta = {"prompt_tokens": len(ids), "input_token_logprobs": own}
    return {"output_ids": [], "meta_info": meta | ({"input_top_logprobs": top} if k else {})}


class ScoringServer(FakeServer):
    """Attributes:
    spoil: what is done to every answer.
    statuses: of the next requests, one each, instead of an answer.
    hang: nothing is answered.
    """

    spoil: Callable[[dict[str, Any]], None] | None = None
    hang = False

    def __init__(self) -> None:
        super().__init__()
        self.statuses: list[int] = []

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.requests.append(body)
        if self.hang:
            await asyncio.sleep(3600)
        if self.statuses:
            return web.json_response({"error": "as asked for"}, status=self.statuses.pop(0))
        answer = honest(body)
        if self.spoil is not None:
            self.spoil(answer)
        return web.Response(text=json.dumps(answer), content_type="application/json")


def make_sample(name: str, prompt: tuple[int, ...], response: tuple[int, ...], mask="", **fields):
    flags = tuple(c == "x" for c in mask) or (True,) * len(response)
    zeros = (0.0,) * len(response)
    return Sample(Prompt(name, prompt, **fields), 0, response, zeros, flags, "stop", 0)


SAMPLES = [
    make_sample("a", (3, 1), (5, 6, 7)),
    make_sample("b", (4,), (8, 9, 10, 11), mask="x..x"),
    make_sample("c", (2, 2), (1, 2), teacher="other"),
    make_sample("d", (2, 2, 5), ()),
    make_sample("e", (9, 9), (12, 13), teacher_token_ids=(20, 21, 22)),
    make_sample("f", (1, 2), (3,), mask="."),
]


@pytest.fixture
def loop():
    thread = EventLoopThread()
    yield thread
    thread.close()


@pytest.fixture
def server(loop):
    server = loop.run(ScoringServer().start())
    yield server
    loop.run(server.stop())


@pytest.fixture
def make_teacher(server):
    made = []

    def make(top_k: int = K, urls: tuple[str, ...] = (), vocab_size: int = VOCAB, **servers: Any):
        config = TeacherConfig(kind="sglang", urls=urls or (server.url,), top_k=top_k)
        batching = Batching(Layout(ParallelConfig(), 1), Packing(micro_batch_size=2))
        made.append(
            SGLangTeacher(
                config, SGLangConfig(**servers), vocab_size, batching, device=torch.device("cpu")
            )
        )
        return made[-1], batching

    yield make
    for teacher in made:
        teacher.close()


def expected_rows(top_k: int, name: str = "") -> dict[int, Any]:
    """By row: what the fake teacher says about a loss token of `name`'s samples."""
    found: dict[int, Any] = {}
    row = 0
    for sample in SAMPLES:
        context = list(sample.prompt.teacher_token_ids or sample.prompt.token_ids)
        for token, counts in zip(sample.response_ids, sample.response_mask, strict=True):
            logprobs = logprobs_after(context)
            if counts and sample.prompt.teacher == name:
                found[row] = logprobs.topk(top_k) if top_k else logprobs[token]
            context.append(token)
            row += 1
    return found


@pytest.mark.parametrize("top_k", [K, 0])
def test_every_loss_token_has_the_teachers_word_on_it(make_teacher, server, top_k):
    teacher, batching = make_teacher(top_k)
    wanted = expected_rows(top_k)
    found = {}
    batches = batching.micro_batches(SAMPLES, batching.assign(SAMPLES), 0)
    for batch, signal in zip(batches, teacher.score(SAMPLES), strict=True):
        rows = batch.rows_T[batch.loss_mask_T].tolist() if batch.teacher == "" else []
        if top_k:
            assert isinstance(signal, TopKSignal)
            assert signal.logprobs_LK.dtype == torch.float32
            values = list(zip(signal.logprobs_LK, signal.ids_LK, strict=True))
        else:
            assert isinstance(signal, TokenSignal)
            values = list(signal.logprobs_L)
        found.update(zip(rows, values, strict=True))
    assert found.keys() == wanted.keys()
    for row, value in wanted.items():
        for ours, theirs in zip(
            found[row] if top_k else [found[row]], value if top_k else [value], strict=True
        ):
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=0, atol=1e-6)
    # Only samples with a loss token of this teacher's are sent, as the teacher sees them.
    sent = sorted(tuple(body["input_ids"]) for body in server.requests)
    assert sent == [(3, 1, 5, 6, 7), (4, 8, 9, 10, 11), (20, 21, 22, 12, 13)]
    assert {body["sampling_params"]["max_new_tokens"] for body in server.requests} == {0}
    assert teacher.metrics == {"teacher/retries": 0.0}


def one_less(answer):
    answer["meta_info"]["input_token_logprobs"].pop()


def off_by_one(answer):
    top = answer["meta_info"]["input_top_logprobs"]
    top[1:] = [top[-1], *top[1:-1]]


def shifted_ids(answer):
    entries = answer["meta_info"]["input_token_logprobs"]
    for entry, other in zip(entries[1:], [*entries[2:], entries[1]], strict=True):
        entry[1] = (other[1] + 1) % VOCAB


def set_in(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(answer: dict[str, Any]) -> None:
        *keys, last = (int(key) if key.isdecimal() else key for key in path.split("."))
        target: Any = answer["meta_info"]
        for key in keys:
            target = target[key]
        target[last] = value

    return spoil


SPOILT = {
    "log-probs of 3 tokens where 4 were asked": one_less,
    "log-probs of other tokens than those that were sent": shifted_ids,
    "6 tokens counted where 5 were scored": set_in("prompt_tokens", 6),
    "log-probs that are not finite numbers": set_in("input_token_logprobs.2.0", None),
    "log-probs that are no lists of entries": set_in("input_token_logprobs", None),
    "2 rows of candidates for 4 tokens": set_in("input_top_logprobs", [None, []]),
    "rows of [3, 4] candidates where 4 were asked for": lambda a: a["meta_info"][
        "input_top_logprobs"
    ][2].pop(),
    "candidates with log-probs that are not finite": set_in("input_top_logprobs.1.0.0", None),
    "a candidate that is there twice": lambda a: set_in(
        "input_top_logprobs.1.0.1", a["meta_info"]["input_top_logprobs"][1][1][1]
    )(a),
    "candidates that are no token ids": set_in("input_top_logprobs.1.0.1", 2**40),
    "candidates of more than all probability": set_in("input_top_logprobs.1.0.0", 0.1),
}


@pytest.mark.parametrize("found", SPOILT)
def test_an_answer_that_is_not_about_the_sample_names_it(make_teacher, server, found):
    teacher, _ = make_teacher()

    def spoil(answer):
        if answer["meta_info"]["input_token_logprobs"][0][1] == 1:  # sample a's last prompt token
            SPOILT[found](answer)

    server.spoil = spoil
    with pytest.raises(RolloutError) as raised:
        teacher.score(SAMPLES)
    assert str(raised.value).startswith(f"teacher's scores of sample a/0: {found}")


def test_candidates_of_the_next_place_are_noticed():
    """They are lists of the right lengths; but they contradict the log-probs of the sampled tokens:
    of those that they hold, and of those that they leave out."""
    ids = [3, 1, 5, 6, 7]
    for k, found in (
        (VOCAB, "not those of the same tokens in the other list"),
        (1, "likelier than candidates, and is none itself"),
    ):
        # The likeliest tokens, so that one candidate is enough.
        ids = ids[:2] if k == 1 else ids
        while len(ids) < 5:
            ids.append(int(logprobs_after(ids).argmax()))
        answer = honest(score_body(ids, 2, k))
        read_scores(answer, ids, 2, k, VOCAB, "here")
        off_by_one(answer)
        with pytest.raises(RolloutError, match=found):
            read_scores(answer, ids, 2, k, VOCAB, "here")


def test_servers_call_the_last_token_of_the_vocabulary_0():
    """In the list of the sampled tokens; the log-probability is that of the token."""
    ids = [3, 1, VOCAB - 1, 6]
    answer = honest(score_body(ids, 2, VOCAB))
    wanted = read_scores(answer, ids, 2, VOCAB, VOCAB, "here")
    entries = answer["meta_info"]["input_token_logprobs"]
    entries[1][1] = 0
    found = read_scores(answer, ids, 2, VOCAB, VOCAB, "here")
    assert torch.equal(found.logprobs_R, wanted.logprobs_R)
    entries[2][1] = 0
    with pytest.raises(RolloutError, match="log-probs of other tokens"):
        read_scores(answer, ids, 2, VOCAB, VOCAB, "here")


def test_candidates_that_the_student_does_not_have_are_left_out():
    ids, vocab = [3, 1, 5, 6, 7], 16
    scores = read_scores(honest(score_body(ids, 2, VOCAB)), ids, 2, VOCAB, vocab, "here")
    for row in range(3):
        logprobs = logprobs_after(ids[: 2 + row])
        inside = scores.ids_RK[row] >= 0
        assert sorted(scores.ids_RK[row][inside].tolist()) == list(range(vocab))
        wanted = logprobs[:vocab].log_softmax(0)[scores.ids_RK[row][inside].long()]
        torch.testing.assert_close(scores.top_logprobs_RK[row][inside], wanted)


def test_a_server_that_is_busy_is_asked_again(make_teacher, server):
    teacher, _ = make_teacher()
    server.statuses = [500, 429]
    signals = teacher.score(SAMPLES[:1])
    assert len(signals[0].ids_LK) == 3
    assert teacher.metrics == {"teacher/retries": 2.0}


def test_a_request_that_is_rejected_names_the_sample(make_teacher, server):
    teacher, _ = make_teacher()
    server.statuses = [400]
    with pytest.raises(RolloutError, match=r"sample a/0: the server rejects it \(status 400"):
        teacher.score(SAMPLES[:1])


def test_tokens_and_lengths_are_checked_before_they_are_sent(make_teacher, server):
    teacher, _ = make_teacher()
    for response, found in (
        ((5, VOCAB), f"token id {VOCAB} is outside the vocabulary"),
        ((5,) * 1100, "1102 tokens exceed the servers' context 1022"),
    ):
        with pytest.raises(RolloutError, match=f"sample z/0: {found}"):
            teacher.score([make_sample("z", (1, 2), response)])
    assert server.requests == []


def test_a_server_that_hangs_hands_over_to_another(make_teacher, server, loop):
    other = loop.run(ScoringServer().start())
    other.hang = True
    teacher, _ = make_teacher(urls=(other.url, server.url), progress_timeout_s=0.5)
    (signal, *_) = teacher.score(SAMPLES[:1])
    wanted = [value.values for row, value in sorted(expected_rows(K).items()) if row < 3]
    torch.testing.assert_close(signal.logprobs_LK, torch.stack(wanted), rtol=0, atol=1e-6)
    loop.run(other.stop())


def test_no_server_at_its_address(make_teacher):
    with pytest.raises(RolloutError, match=r"^teacher\.urls: .*no answer"):
        make_teacher(urls=("http://127.0.0.1:9",))


def test_top_k_never_exceeds_the_vocabulary(make_teacher, server):
    teacher, _ = make_teacher(top_k=100)
    (signal, *_) = teacher.score(copy.deepcopy(SAMPLES[:1]))
    assert signal.ids_LK.shape == (3, VOCAB)
