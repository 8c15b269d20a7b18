"""The engine over servers in this process: what ranks agree on, what is set aside or stale."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import Tensor

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.config import SGLangConfig
from megaopd.errors import RolloutError, StopRequested
from megaopd.interruption import Interruption
from megaopd.rollout.conversation import Conversation
from megaopd.rollout.sglang import engine as engine_module
from megaopd.rollout.sglang import health, pool
from megaopd.rollout.sglang.engine import SGLangEngine
from megaopd.rollout.sglang.loop import EventLoopThread
from megaopd.rollout.sglang.sampler import Sampler, sample_seed
from tests.helpers.distributed import run_distributed
from tests.helpers.fake_sglang import VOCAB, FakeServer, logprob_of, response_to

PARAMS = SamplingParams(max_new_tokens=6, n=2)
PROMPTS = [Prompt(f"p{i}", (i, 7, 3)) for i in range(5)]
CONFIG = SGLangConfig(progress_timeout_s=1.0, health_interval_s=0.1)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(pool, "FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(health, "HEALTH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(health, "ALL_DOWN_S", 0.5)
    monkeypatch.setattr(engine_module, "ALL_DOWN_S", 0.5)
    monkeypatch.setattr(engine_module, "REFRESH_EVERY_S", 0.2)


class StampAll:
    """A transport that gives every server that is up the version alone."""

    def __init__(self, servers: Sequence[FakeServer]) -> None:
        self.servers = servers
        self.names: list[str] = []

    def send(
        self, engine: SGLangEngine, weights: Iterator[tuple[str, Tensor]], version: int
    ) -> None:
        self.names += [name for name, _ in weights]
        assert engine.pool is not None
        urls = {client.url for client in engine.pool.up()}
        for server in self.servers:
            if server.url in urls:
                server.version = str(version)
        for client in engine.pool.up():
            client.version = version
        engine.pool.publish(version)

    def close(self, engine: SGLangEngine) -> None:
        pass


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    loop = EventLoopThread("fake-servers")
    yield loop
    loop.close()


@pytest.fixture
def servers(loop) -> Iterator[list[FakeServer]]:
    servers = [FakeServer(), FakeServer()]
    for server in servers:
        loop.run(server.start())
    yield servers
    for server in servers:
        loop.run(server.stop())


@pytest.fixture
def engine(servers) -> Iterator[SGLangEngine]:
    engine = SGLangEngine(servers, config=CONFIG, vocab_size=VOCAB, transport=StampAll(servers))
    yield engine
    engine.close()


def assert_right(samples: list[Sample], prompts: Sequence[Prompt] = PROMPTS, n: int = 2) -> None:
    assert [s.sample_id for s in samples] == [
        f"{p.prompt_id}/{i}" for p in prompts for i in range(n)
    ]
    for sample in samples:
        expected = response_to(sample.prompt.token_ids, 6)
        assert sample.response_ids == expected
        assert sample.response_logprobs == tuple(map(logprob_of, expected))


def test_weights_come_before_samples(engine, servers):
    with pytest.raises(RolloutError, match="no complete weights"):
        engine.generate(PROMPTS, PARAMS)
    engine.load_weights(iter([("w", None)]), version=4)
    samples = engine.generate(PROMPTS, PARAMS)
    assert_right(samples)
    assert {(s.weight_version, s.token_versions) for s in samples} == {(4, ())}
    assert servers[0].requests
    assert servers[1].requests
    keeps = SGLangEngine(servers, config=CONFIG, vocab_size=VOCAB)
    assert {s.weight_version for s in keeps.generate(PROMPTS, PARAMS)} == {0}
    with pytest.raises(RolloutError, match="no way to send weights"):
        keeps.load_weights(iter([]), 1)
    keeps.close()


def test_what_became_of_the_servers_is_told_since_the_last_rollout():
    servers = SimpleNamespace(
        counters=Counter(servers_lost=2, servers_back=1), up=lambda: [1, 2, 3]
    )
    sampler = Sampler(servers, None, None)
    for lost, back in ((2, 1), (0, 1)):
        metrics = sampler.metrics([], PARAMS)
        assert metrics["rollout/servers_lost"] == lost
        assert metrics["rollout/servers_back"] == back
        assert metrics["rollout/servers_up"] == 3
        servers.counters["servers_back"] += 1


def test_a_rejected_prompt_is_set_aside(engine, servers):
    engine.load_weights(iter([]), version=0)
    servers[0].faults = servers[1].faults = [400]
    samples = engine.generate(PROMPTS, PARAMS)
    aside = {p.prompt_id for p in PROMPTS} - {s.prompt.prompt_id for s in samples}
    assert 1 <= len(aside) <= 2
    assert_right(samples, [p for p in PROMPTS if p.prompt_id not in aside])
    assert engine.metrics["rollout/set_aside"] == len(aside)
    assert engine.metrics["rollout/retries"] == 0
    servers[0].faults = [500]
    assert_right(engine.generate(PROMPTS, PARAMS))
    # Of this rollout alone.
    assert engine.metrics["rollout/set_aside"] == 0
    assert engine.metrics["rollout/retries"] == 1


def test_bad_token_ids_name_their_prompt(engine, servers):
    engine.load_weights(iter([]), version=0)
    with pytest.raises(RolloutError, match="prompt bad: token id 512 is outside the vocabulary"):
        engine.start([Prompt("bad", (1, VOCAB))], PARAMS)
    assert not servers[0].requests


def test_rollouts_in_the_background(engine, servers):
    engine.load_weights(iter([]), version=1)
    for server in servers:
        server.delay_s = 0.02
    began = time.monotonic()
    pending = [engine.start([prompt], PARAMS) for prompt in PROMPTS]
    assert time.monotonic() - began < 0.1
    for prompt, rollout in zip(PROMPTS, pending, strict=True):
        assert_right(rollout.result(), [prompt])


def test_samples_are_taken_when_all_are_there(engine, servers):
    engine.load_weights(iter([]), version=1)
    for server in servers:
        server.delay_s = 0.03
    first, second = (engine.start(prompts, PARAMS) for prompts in (PROMPTS[:2], PROMPTS))
    assert first.take() is None
    assert_right(first.result(), PROMPTS[:2])
    # Of the result, however often it is taken; the counters do not count twice.
    metrics = dict(engine.metrics)
    engine.metrics = {}
    assert_right(first.take(), PROMPTS[:2])
    assert engine.metrics == metrics
    until = time.monotonic() + 10
    while (taken := second.take()) is None and time.monotonic() < until:
        time.sleep(0.01)
    assert_right(taken)
    assert second.result() == taken


def test_a_failed_rollout_has_nothing_to_take(engine, servers):
    engine.load_weights(iter([]), version=1)
    servers[0].always = servers[1].always = "nan"
    rollout = engine.start(PROMPTS, PARAMS)
    with pytest.raises(RolloutError, match="non-finite"):
        rollout.result()
    assert rollout.take() is None


def test_a_rollout_that_is_given_up_leaves_its_servers(engine, servers):
    engine.load_weights(iter([]), version=1)
    for server in servers:
        server.always = "hang"
    rollout, other = (engine.start(PROMPTS, PARAMS) for _ in range(2))
    until = time.monotonic() + 10
    while servers[0].running + servers[1].running < 20 and time.monotonic() < until:
        time.sleep(0.01)
    rollout.give_up()
    while servers[0].running + servers[1].running > 10 and time.monotonic() < until:
        time.sleep(0.01)
    # Those of the other one run on.
    assert servers[0].running + servers[1].running == 10
    assert rollout.take() is None
    other.give_up()
    for server in servers:
        server.always = None
    assert_right(engine.generate(PROMPTS, PARAMS))


def test_a_rollout_ends_when_the_run_is_to_stop(servers):
    told = Interruption()
    arguments = {"config": CONFIG, "vocab_size": VOCAB, "transport": StampAll(servers)}
    engine = SGLangEngine(servers, **arguments, stop_reason=lambda: told.reason)
    engine.load_weights(iter([]), version=1)
    done = engine.start(PROMPTS, PARAMS)
    assert_right(done.result())
    for server in servers:
        server.always = "hang"
    rollout = engine.start(PROMPTS, PARAMS)
    told.install()
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(StopRequested, match="run: SIGUSR1 during a rollout; start it again"):
            rollout.result()
    finally:
        told.restore()
    until = time.monotonic() + 10
    while servers[0].running + servers[1].running and time.monotonic() < until:
        time.sleep(0.01)
    assert servers[0].running + servers[1].running == 0
    # What is there already stays there.
    assert_right(done.take())
    engine.close()


def test_tokens_of_two_versions(engine, servers, loop):
    engine.load_weights(iter([]), version=1)
    for server in servers:
        server.delay_s = 0.1
    rollout = engine.start(PROMPTS, PARAMS)
    while any(client.silent_s > 1 for client in engine.pool.clients):
        time.sleep(0.01)
    for server in servers:
        loop.run(server.stop())
        server.delay_s, server.version = 0.0, "2"
        loop.run(server.start())

    async def update():
        for client in engine.pool.clients:
            client.version = 2
        engine.pool.publish(2)

    engine.run(update())
    samples = rollout.result()
    assert_right(samples)
    mixed = [s for s in samples if s.token_versions]
    assert mixed
    for sample in mixed:
        assert set(sample.token_versions) == {1, 2}
        assert list(sample.token_versions) == sorted(sample.token_versions)
        assert sample.weight_version == 1


async def two_turns(complete, prompt, index, params) -> Conversation:
    """Half of the tokens, one of a tool, the other half."""
    first = await complete(prompt.token_ids, 3)
    seen = (*prompt.token_ids, *first.ids, 11)
    second = await complete(seen, 2)
    return Conversation(
        (*first.ids, 11, *second.ids),
        (*first.logprobs, 0.0, *second.logprobs),
        (True, True, True, False, True, True),
        (*first.versions, -1, *second.versions),
        second.finish_reason,
        {"agent/num_turns": 2.0 + index},
    )


def test_conversations(servers):
    engine = SGLangEngine(
        servers,
        config=CONFIG,
        vocab_size=VOCAB,
        transport=StampAll(servers),
        converse=two_turns,
    )
    engine.load_weights(iter([]), version=3)
    for sample in engine.generate(PROMPTS, PARAMS):
        ids = sample.prompt.token_ids
        first = response_to(ids, 3)
        assert sample.response_ids == (*first, 11, *response_to((*ids, *first, 11), 2))
        # The version of a token that the model did not produce means nothing.
        assert (sample.weight_version, sample.token_versions) == (3, ())
    assert engine.metrics["agent/num_turns"] == 2.5
    # All turns of a prompt's samples go to one server.
    prompts = [{tuple(body["input_ids"][:3]) for body in server.requests} for server in servers]
    assert not prompts[0] & prompts[1]
    engine.close()


@pytest.mark.parametrize("keeps_weights", [False, True])
def test_colocated_servers_have_memory_only_while_they_generate(servers, keeps_weights):
    for server in servers:
        server.info = {"enable_weights_cpu_backup": keeps_weights}
    config = replace(CONFIG, colocated=True)
    transport = StampAll(servers)
    engine = SGLangEngine(servers, config=config, vocab_size=VOCAB, transport=transport)
    engine.load_weights(iter([]), version=0)
    for _ in range(2):
        assert_right(engine.generate(PROMPTS, PARAMS))
    engine.load_weights(iter([]), version=1)
    given_up = ["kv_cache", "weights"] if keeps_weights else ["kv_cache"]
    # Nothing may run on a server that gives memory up; it refuses to flush as long as it does.
    release = [("/flush_cache", {}), ("/release_memory_occupation", {"tags": given_up})]
    resume = [("/resume_memory_occupation", {"tags": given_up})]
    # Weights that were given up are taken again for an update, and the rest for generation.
    weights, cache = (
        [("/resume_memory_occupation", {"tags": [tag]})] for tag in ("weights", "kv_cache")
    )
    first = [*weights, *cache] if keeps_weights else resume
    last = weights if keeps_weights else []
    for server in servers:
        assert server.told == [*release, *first, *release, *resume, *release, *last]
    # A server that cannot do it is not trusted.
    servers[0].control["/resume_memory_occupation"] = 500
    assert_right(engine.generate(PROMPTS, PARAMS))
    assert [client.url for client in engine.pool.stale()] == [servers[0].url]
    engine.close()


def test_colocated_servers_give_their_memory_up_with_a_rollout(servers):
    config = replace(CONFIG, colocated=True)
    engine = SGLangEngine(servers, config=config, vocab_size=VOCAB, transport=StampAll(servers))
    engine.load_weights(iter([]), version=0)
    for server in servers:
        server.always = "hang"
        server.told.clear()
    rollout = engine.start(PROMPTS, PARAMS)
    until = time.monotonic() + 10
    while not all(server.running for server in servers) and time.monotonic() < until:
        time.sleep(0.01)
    rollout.give_up()
    paths = ["/resume_memory_occupation", "/flush_cache", "/release_memory_occupation"]
    assert [path for path, _ in servers[0].told] == paths
    assert [path for path, _ in servers[1].told] == paths
    engine.close()


def test_colocated_servers_keep_their_memory_until_the_last_rollout_ends(servers):
    config = replace(CONFIG, colocated=True)
    engine = SGLangEngine(servers, config=config, vocab_size=VOCAB, transport=StampAll(servers))
    engine.load_weights(iter([]), version=0)
    for server in servers:
        server.delay_s = 0.03
        server.told.clear()
    pending = [engine.start(PROMPTS[:k], PARAMS) for k in (1, 5)]
    assert_right(pending[0].result(), PROMPTS[:1])
    assert_right(pending[1].result())
    paths = ["/resume_memory_occupation", "/flush_cache", "/release_memory_occupation"]
    assert [path for path, _ in servers[0].told] == paths
    engine.close()


def test_a_teacher_s_servers_keep_their_memory(servers):
    """The configuration is the student's; who sends no weights does not own the servers."""
    engine = SGLangEngine(servers, config=replace(CONFIG, colocated=True), vocab_size=VOCAB)
    assert_right(engine.generate(PROMPTS, PARAMS))
    engine.close()
    assert servers[0].told == []


def test_a_server_that_comes_back_is_refreshed(engine, servers, loop):
    engine.load_weights(iter([]), version=5)
    refreshed = []

    def refresh():
        refreshed.append([client.url for client in engine.pool.stale()])
        StampAll(servers).send(engine, iter([]), 5)

    # All of it happens while a result is waited for; without a refresh there is no way out.
    for server in servers:
        server.always = "hang"
    rollout = engine.start(PROMPTS, PARAMS)
    for server in servers:
        loop.run(server.stop())
        server.always, server.version = None, "default"
        loop.run(server.start())
    with pytest.raises(RolloutError, match="none that is up has the weights of version 5"):
        rollout.result()
    engine.refresh = refresh
    samples = engine.generate(PROMPTS, PARAMS)
    assert_right(samples)
    assert {s.weight_version for s in samples} == {5}
    assert refreshed == [[server.url for server in servers]]


def test_all_servers_dead(engine, servers, loop):
    engine.load_weights(iter([]), version=0)
    for server in servers:
        loop.run(server.stop())
    with pytest.raises(RolloutError, match="all are down") as caught:
        engine.generate(PROMPTS, PARAMS)
    assert caught.value.exit_status == 7


def test_seeds_of_samples():
    seeds = {sample_seed(seed, f"p{i}/{j}") for seed in (0, 1) for i in range(50) for j in (0, 1)}
    assert len(seeds) == 200
    assert all(0 <= seed < 1 << 31 for seed in seeds)
    assert sample_seed(3, "p/1") == sample_seed(3, "p/1")


def on_rank(rank: int, world_size: int) -> list:
    """What every rank sees of a few rollouts; rank 0 has the servers."""
    pool.FIRST_BACKOFF_S, engine_module.SIGN_OF_LIFE_S = 0.02, 0.1
    loop = EventLoopThread("fake-servers")
    server = FakeServer()
    if rank == 0:
        loop.run(server.start())
    arguments = {"config": CONFIG, "vocab_size": VOCAB, "rank": rank, "world_size": world_size}
    seen: list = []
    try:
        SGLangEngine([FakeServer()], **arguments)
    except RolloutError as error:
        seen.append(str(error).split(";")[1])
    engine = SGLangEngine([server] if rank == 0 else [], **arguments)
    seen.append(engine.generate(PROMPTS, PARAMS))
    server.delay_s = 0.1  # long enough for signs of life
    seen += [engine.start(PROMPTS[:2], PARAMS).result(), engine.metrics]
    server.delay_s = 0.0
    for prompts in ([Prompt("long", (1,) * 1020)], PROMPTS):
        server.always = "nan"
        try:
            engine.generate(prompts, replace(PARAMS, n=1))
        except RolloutError as error:
            seen.append(str(error))
    server.always = "hang"
    engine._stop_reason = lambda: "SIGTERM" if rank == 1 else None
    try:
        engine.generate(PROMPTS, PARAMS)
    except StopRequested as stop:
        seen.append(str(stop))
    engine.close()
    loop.run(server.stop())
    loop.close()
    return seen


@pytest.mark.slow
def test_all_ranks_see_the_same():
    first, second = run_distributed(on_rank, 2, timeout_s=120)
    assert first == second
    refused, samples, later, metrics, too_long, broken, stop = first
    assert refused == " start it, or correct rollout.urls"
    assert_right(samples)
    assert_right(later, PROMPTS[:2])
    assert metrics["rollout/retries"] == 0
    assert "prompt long: 1020 + 6 new tokens exceed the context 1022" in too_long
    assert "non-finite" in broken
    assert stop == "run: SIGTERM during a rollout; start it again to go on"
