"""The client and the pool against a server in this process that misbehaves on request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from megaopd.batch import Completion, SamplingParams
from megaopd.errors import RolloutError
from megaopd.rollout.sglang import health, placement, pool, response
from megaopd.rollout.sglang.api import GenerateRequest, RequestRejected, ServerBusy
from megaopd.rollout.sglang.pool import Address, ServerPool
from tests.helpers.fake_sglang import VOCAB, FakeServer, logprob_of, response_to

PROMPT = (3, 1, 4, 1, 5)
PARAMS = SamplingParams(max_new_tokens=12)
REQUEST = GenerateRequest(PROMPT, PARAMS, name="sample p/0")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """The same waits, twenty times as fast."""
    monkeypatch.setattr(pool, "FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(pool, "MAX_BACKOFF_S", 0.2)
    monkeypatch.setattr(response, "CUT_PAUSE_S", 0.02)
    monkeypatch.setattr(health, "HEALTH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(health, "PROOF_OF_LIFE_S", 0.1)
    monkeypatch.setattr(health, "REVIVAL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(health, "ALL_DOWN_S", 0.5)


@asynccontextmanager
async def serving(*servers: FakeServer, version: int | None = None, **arguments):
    """A pool over fake servers, all started; with a `version` they have its weights."""
    options = {"vocab_size": VOCAB, "progress_timeout_s": 1.0, "health_interval_s": 0.15}
    for server in servers:
        await server.start()
    servers_pool = ServerPool(servers, **(options | arguments))
    try:
        await servers_pool.start()
        if version is not None:
            for client in servers_pool.clients:
                client.version = version
            servers_pool.publish(version)
        yield servers_pool
    finally:
        await servers_pool.close()
        for server in servers:
            await server.stop()


def run(test: Callable[[], Awaitable[None]], limit_s: float = 30) -> None:
    asyncio.run(asyncio.wait_for(test(), limit_s))


async def until(condition: Callable[[], object]) -> None:
    """However slow the machine is; what never comes to be meets the test's own limit."""
    while not condition():
        await asyncio.sleep(0.01)


def assert_right(done: Completion, request: GenerateRequest = REQUEST) -> None:
    expected = response_to(request.input_ids, request.params.max_new_tokens)
    assert done.ids == expected
    assert done.logprobs == tuple(map(logprob_of, expected))
    assert done.finish_reason == "length"
    assert len(done.versions) == len(done.ids)


def streams(server: FakeServer) -> list[dict]:
    """What it was asked to generate, without what the pool asks to see whether it is back."""
    return [body for body in server.requests if body.get("stream")]


def requests(
    count: int, params: SamplingParams = PARAMS, rollout: int = 0
) -> list[GenerateRequest]:
    return [
        GenerateRequest((i % 7, i, 2), params, name=f"sample p{i}/0", affinity=(rollout, i))
        for i in range(count)
    ]


@pytest.mark.parametrize("release", ["0.4.10", "0.5.2", "0.5.23"])
@pytest.mark.parametrize("incremental", [False, True])
def test_a_request_and_its_answer(release, incremental):
    async def test():
        server = FakeServer(release=release)
        server.info = {
            "enable_deterministic_inference": release != "0.4.10",
            "incremental_streaming_output": incremental,
        }
        async with serving(server) as servers:
            request = replace(REQUEST, params=replace(PARAMS, top_k=7, top_p=0.5), seed=9)
            assert_right(await servers.complete(request))
            stop = response_to(PROMPT, 12)[4]
            stopping = replace(PARAMS, stop_token_ids=(stop,))
            done = await servers.complete(replace(REQUEST, params=stopping))
        assert done.ids == response_to(PROMPT, 5)
        assert done.finish_reason == "stop"
        first, second = (body["sampling_params"] for body in server.requests)
        assert (first["top_k"], first["top_p"], first["ignore_eos"]) == (7, 0.5, True)
        assert first.get("sampling_seed") == (None if release == "0.4.10" else 9)
        assert (second["top_k"], second["stop_token_ids"]) == (-1, [stop])
        assert second["ignore_eos"] is False
        assert len({body["rid"] for body in server.requests}) == 2

    run(test)


@pytest.mark.parametrize(
    "fault", [429, 500, 503, "truncated", "reset", "extra_logprob", "alien id", "abort", "hang"]
)
def test_faults_that_pass(fault):
    async def test():
        server = FakeServer()
        server.faults = [fault, fault]
        async with serving(server, progress_timeout_s=0.3) as servers:
            assert_right(await servers.complete(REQUEST))
            assert servers.counters["retries"] == (0 if fault == "abort" else 2)
            assert servers.counters["cuts"] == (2 if fault == "abort" else 0)
        assert len(streams(server)) == 3
        if fault in ("reset", "abort"):
            # What had come is not sampled again: half of 12 tokens, then half of 6.
            lengths = [len(body["input_ids"]) for body in streams(server)]
            assert lengths == [5, 5 + 6, 5 + 9] if fault == "abort" else lengths[1] > 5

    run(test)


def test_a_request_is_sent_again_five_times_at_most():
    async def test():
        server = FakeServer()
        server.always = 500
        async with serving(server) as servers:
            with pytest.raises(
                RolloutError, match="sample p/0: failed 6 times, at last: status 500"
            ):
                await servers.complete(REQUEST)
        assert len(streams(server)) == 6

    run(test)


@pytest.mark.parametrize("fault", [400, "error event"])
def test_a_rejected_request_is_not_sent_again(fault):
    async def test():
        server = FakeServer()
        server.faults = [fault]
        async with serving(server) as servers:
            with pytest.raises(RequestRejected):
                await servers.complete(REQUEST)
            assert len(server.requests) == 1
            assert_right(await servers.complete(REQUEST))

    run(test)


def test_broken_weights_are_found_out():
    async def test():
        server = FakeServer()
        server.faults = ["nan"]
        async with serving(server) as servers:
            with pytest.raises(RolloutError, match="non-finite"):
                await servers.complete(REQUEST)

    run(test)


def test_token_ids_are_checked_before_they_are_sent():
    async def test():
        server = FakeServer()
        async with serving(server) as servers:
            for ids, found in {(1, VOCAB): "512", (-1, 2): "-1", (): "empty"}.items():
                with pytest.raises(RolloutError, match=f"sample p/0: .*{found}"):
                    await servers.complete(replace(REQUEST, input_ids=ids))
            with pytest.raises(RolloutError, match="1011 \\+ 12 new tokens exceed .* 1022"):
                await servers.complete(replace(REQUEST, input_ids=(1,) * 1011))
        assert server.requests == []

    run(test)


def test_keys_and_addresses():
    async def test():
        server = await FakeServer(key="right").start()
        wrong = ServerPool([Address(server.url, "wrong")], vocab_size=VOCAB)
        with pytest.raises(RolloutError, match="refuses the key") as caught:
            await wrong.start()
        assert caught.value.exit_status == 7
        assert "wrong" not in str(caught.value)
        async with serving(server) as servers:
            assert_right(await servers.complete(REQUEST))
        nobody = ServerPool([Address(server.url)], vocab_size=VOCAB)
        with pytest.raises(RolloutError, match=f"{server.url}: no answer"):
            await nobody.start()
        old = await FakeServer(release="0.4.6").start()
        with pytest.raises(RolloutError, match="SGLang 0.4.6; use 0.4.10 or newer"):
            await ServerPool([old], vocab_size=VOCAB).start()
        await old.stop()

    run(test)


def test_load_is_shared_and_prefixes_stay_together():
    async def test():
        one, other = FakeServer(), FakeServer()
        one.delay_s = other.delay_s = 0.01
        async with serving(one, other) as servers:
            groups = [
                replace(request, name=f"sample p{p}/{i}", affinity=p)
                for p, request in enumerate(requests(8))
                for i in range(4)
            ]
            for request, done in zip(
                groups, await asyncio.gather(*map(servers.complete, groups)), strict=True
            ):
                assert_right(done, request)
        shares = [[tuple(body["input_ids"]) for body in s.requests] for s in (one, other)]
        assert list(map(len, shares)) == [16, 16]
        assert not set(shares[0]) & set(shares[1])

    run(test)


def test_tokens_in_flight_are_bounded():
    async def test():
        server = FakeServer()
        server.delay_s = 0.002
        async with serving(server, max_tokens_in_flight=50) as servers:
            done = await asyncio.gather(*map(servers.complete, requests(12)))
            assert server.most_running == 3  # of 3 + 12 tokens each
            for request, answer in zip(requests(12), done, strict=True):
                assert_right(answer, request)
            # What is larger than the bound goes alone.
            large = replace(PARAMS, max_new_tokens=60)
            server.most_running = 0
            await asyncio.gather(*map(servers.complete, requests(3, large)))
            assert server.most_running == 1

    run(test)


def test_a_fast_failing_server_does_not_draw_all_requests():
    async def test():
        bad, good = FakeServer(), FakeServer()
        bad.always = 500
        good.delay_s = 0.005
        async with serving(bad, good) as servers:
            done = await asyncio.gather(*map(servers.complete, requests(40)))
            for request, answer in zip(requests(40), done, strict=True):
                assert_right(answer, request)
            assert servers.counters["servers_lost"] == 1

    run(test)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_server_that_dies_in_the_middle(how):
    async def test():
        one, other = FakeServer(), FakeServer()
        one.delay_s = other.delay_s = 0.03
        # Found by its front end, long before anybody misses a token.
        async with serving(one, other, version=3, progress_timeout_s=60.0) as servers:
            one.version = other.version = "3"
            wanted = requests(64)
            asked = [asyncio.create_task(servers.complete(request)) for request in wanted]
            await until(lambda: one.running and other.running)
            began = time.monotonic()
            if how == "killed":
                await one.stop()
            else:
                one.frozen = True
                one.delay_s = 3600.0
            while len(servers.up()) == 2:
                await asyncio.sleep(0.01)
            noticed_s = time.monotonic() - began
            # 15 s with the waits as they are: the interval and twice the time limit, 0.55 s here.
            assert noticed_s < (3 + 2 * 4) / 20 + 0.5
            done = await asyncio.gather(*asked)
            for request, answer in zip(wanted, done, strict=True):
                assert_right(answer, request)
            # It comes back, with the weights that it was started with, and is not asked.
            one.frozen, one.delay_s, one.version = False, 0.0, "default"
            if how == "killed":
                await one.start()
            while len(servers.up()) < 2:
                await asyncio.sleep(0.01)
            assert servers.stale() == [servers.clients[0]]
            before = len(one.requests)
            await asyncio.gather(*map(servers.complete, requests(8)))
            assert len(one.requests) == before
            # An update brings it back in.
            servers.clients[0].version, one.version = 3, "3"
            servers.publish(3)
            assert servers.stale() == []
            await asyncio.gather(*map(servers.complete, requests(8, rollout=1)))
            assert len(one.requests) > before

    run(test)


def test_a_server_that_says_healthy_and_hangs():
    async def test():
        one, other = FakeServer(), FakeServer()
        one.always = "hang"
        async with serving(one, other, progress_timeout_s=0.5) as servers:
            began = time.monotonic()
            done = await asyncio.gather(*map(servers.complete, requests(8)))
            assert 0.5 < time.monotonic() - began < 3
            for request, answer in zip(requests(8), done, strict=True):
                assert_right(answer, request)
            # Its front end answers all the while; that is not enough to be asked again.
            await asyncio.sleep(0.5)
            assert servers.up() == [servers.clients[1]]
            one.always = None
            while len(servers.up()) < 2:
                await asyncio.sleep(0.01)

    run(test)


def test_a_queued_request_is_not_taken_for_hung():
    async def test():
        server = FakeServer()
        server.delay_s = 0.1
        async with serving(server, progress_timeout_s=0.7) as servers:
            slow = asyncio.create_task(servers.complete(REQUEST))  # 1.2 s
            while not server.requests:
                await asyncio.sleep(0.01)
            server.faults = [1.0]
            assert_right(await servers.complete(replace(REQUEST, name="sample q/0")))
            await slow
            assert servers.counters["retries"] == 0

    run(test)


def test_all_servers_dead():
    async def test():
        one, other = FakeServer(), FakeServer()
        one.delay_s = other.delay_s = 0.1
        async with serving(one, other, max_retries=100) as servers:
            asked = [asyncio.create_task(servers.complete(r)) for r in requests(8)]
            await until(lambda: one.running and other.running)
            began = time.monotonic()
            await one.stop()
            await other.stop()
            for request in asked:
                with pytest.raises(RolloutError, match="rollout servers: all are down"):
                    await request
            # 60 s with the waits as they are.
            assert time.monotonic() - began < 60 / 20 + 0.5
            with pytest.raises(RolloutError, match="all are down"):
                await servers.complete(REQUEST)
            await one.start()
            while not servers.up():
                await asyncio.sleep(0.01)
            assert_right(await servers.complete(REQUEST))

    run(test)


class Restarts:
    """Starts fake servers again, `failures` times in vain."""

    def __init__(self, servers: list[FakeServer], failures: int, limit: int = 10) -> None:
        self.servers, self.failures, self.limit = servers, failures, limit
        self.retired: set[int] = set()
        self.calls: list[int] = []
        self.loop = asyncio.get_running_loop()

    def restart(self, index: int) -> FakeServer:
        self.calls.append(index)
        if len(self.calls) <= self.failures:
            if len(self.calls) == self.limit:
                self.retired.add(index)
            raise RolloutError("server", "did not start", "look at its log")
        server = self.servers[index]
        asyncio.run_coroutine_threadsafe(server.start(), self.loop).result()
        return server

    def stop(self) -> None: ...


def test_restarts():
    async def test():
        one, other = FakeServer(), FakeServer()
        one.delay_s = other.delay_s = 0.03
        restarts = Restarts([one, other], failures=2)
        async with serving(one, other, version=1, restarter=restarts) as servers:
            one.version = other.version = "1"
            asked = [asyncio.create_task(servers.complete(r)) for r in requests(16)]
            await until(lambda: one.running and other.running)
            await one.stop()
            one.version = "default"
            await asyncio.gather(*asked)
            while len(servers.up()) < 2:
                await asyncio.sleep(0.01)
            assert restarts.calls == [0, 0, 0]
            assert len(servers.stale()) == 1
            assert servers.counters["servers_lost"] == servers.counters["servers_back"] == 1

    run(test)


def test_ten_restarts_in_a_row_retire_a_server():
    async def test():
        server = FakeServer()
        restarts = Restarts([server], failures=100)
        async with serving(server, restarter=restarts) as servers:
            await server.stop()
            with pytest.raises(RolloutError, match="all are down"):
                await servers.complete(REQUEST)
            assert len(restarts.calls) == 10

    run(test)


def test_no_sample_of_other_weights():
    """A server that was restarted behind our back says so in its answers."""

    async def test():
        one, other = FakeServer("4"), FakeServer("4")
        async with serving(one, other, version=4) as servers:
            one.version = "default"
            done = await asyncio.gather(*map(servers.complete, requests(8)))
            assert {version for answer in done for version in answer.versions} == {4}
            assert servers.stale() == [servers.clients[0]]

    run(test)


@pytest.mark.parametrize("partial", [True, False])
def test_a_weight_update_in_mid_generation(partial):
    async def test():
        one, other = FakeServer("1"), FakeServer("1")
        one.delay_s = other.delay_s = 0.05
        async with serving(one, other, version=1, partial=partial) as servers:
            asked = [asyncio.create_task(servers.complete(r)) for r in requests(8)]
            await asyncio.sleep(0.2)
            servers.hold()
            late = asyncio.create_task(servers.complete(REQUEST))
            # One server fails the update, and with it every request that it works on.
            servers.quarantine(servers.clients[0], "half an update")
            if not partial:
                await servers.idle()
            servers.clients[1].version, other.version = 2, "2"
            servers.publish(2)
            num_before = len(one.requests), len(other.requests)
            await asyncio.sleep(0.1)
            assert (len(one.requests), len(other.requests)) == num_before
            assert not late.done()
            servers.resume()
            done = await asyncio.gather(*asked)
            assert len(one.requests) == num_before[0]
            for request, answer in zip(requests(8), done, strict=True):
                assert_right(answer, request)
            assert set((await late).versions) == {2}
            mixed = [set(answer.versions) for answer in done]
            # Those of the failed server go on where they were, or begin again.
            assert mixed.count({1, 2}) == (4 if partial else 0)
            assert mixed.count({2}) == (0 if partial else 4)

    run(test)


def test_a_quarantined_server_is_not_down():
    """However many requests it had, and whatever it was given meanwhile."""

    async def test():
        one, other = FakeServer("1"), FakeServer("1")
        one.delay_s = other.delay_s = 0.03
        async with serving(one, other, version=1, max_tokens_in_flight=400) as servers:
            wanted = requests(60)
            asked = [asyncio.create_task(servers.complete(r)) for r in wanted]
            await until(lambda: one.running > pool.MAX_FAULTS)
            first = servers.clients[0]
            # A place that is given and not yet taken: the request must not go there any more.
            late = asyncio.create_task(servers.complete(REQUEST))
            servers._placement.leave(servers._placement.servers[0], 300)
            servers.quarantine(first, "half an update")
            before = len(one.requests)
            for request, answer in zip(wanted, await asyncio.gather(*asked), strict=True):
                assert_right(answer, request)
            assert_right(await late)
            assert len(one.requests) == before
            assert servers.stale() == [first]
            assert servers.counters["servers_lost"] == 0

    run(test)


def test_a_busy_server_is_not_down():
    async def test():
        server = FakeServer()
        server.faults = [429] * 30
        async with serving(server) as servers:
            asked = requests(30)
            done = await asyncio.gather(*map(servers.complete, asked))
            for request, answer in zip(asked, done, strict=True):
                assert_right(answer, request)
            assert servers.counters["servers_lost"] == 0
            assert servers.counters["retries"] == 30

    run(test)


def test_nobody_is_aborted_for_ever():
    async def test():
        server = FakeServer()
        server.always = "abort first"
        async with serving(server) as servers:
            with pytest.raises(RolloutError, match="p/0: was aborted 6 times in a row before"):
                await servers.complete(REQUEST)
            assert len(server.requests) == 6
            # One that gets on is never too old.
            server.always, server.faults = None, ["abort"] * 3
            assert_right(await servers.complete(REQUEST))

    run(test)


def test_what_a_broken_stream_holds_is_checked_too():
    """Tokens of other weights, of a server that was restarted behind our back and then died."""

    async def test():
        server = FakeServer("4")
        async with serving(server, version=4) as servers:
            server.version, server.faults = "3", ["reset"]
            asked = asyncio.create_task(servers.complete(REQUEST))
            while not servers.stale():
                await asyncio.sleep(0.01)
            server.version, servers.clients[0].version = "4", 4
            servers.publish(4)
            done = await asked
            assert_right(done)
            assert set(done.versions) == {4}

    run(test)


def test_a_server_that_was_paused_when_it_went_down_comes_back():
    async def test():
        server = FakeServer()
        async with serving(server) as servers:
            await servers.clients[0].pause("retract")
            await server.stop()
            while servers.up():
                await asyncio.sleep(0.01)
            server.always = "hang"  # as long as it is paused
            await server.start()
            while ("/continue_generation", {}) not in server.told:
                await asyncio.sleep(0.01)
            server.always = None
            while not servers.up():
                await asyncio.sleep(0.01)
            assert_right(await servers.complete(REQUEST))

    run(test)


def test_work_of_another_kind_is_placed_too():
    async def test():
        one, other = FakeServer(), FakeServer()
        one.always = 503
        async with serving(one, other) as servers:

            async def work(client):
                return await client.generate_once({"input_ids": [1]}, 1.0)

            with pytest.raises(ServerBusy) as caught:
                await servers.run(work, tokens=1)
            assert caught.value.url == one.url
            assert (await servers.run(work, tokens=1, avoid=one.url))["output_ids"] == [1]

    run(test)


def test_whoever_stops_waiting_leaves_nothing_behind():
    async def test():
        server = FakeServer()
        server.delay_s = 0.05
        async with serving(server, max_tokens_in_flight=40) as servers:
            asked = [asyncio.create_task(servers.complete(r)) for r in requests(6)]
            await asyncio.sleep(0.1)
            for task in asked:
                task.cancel()
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(error, asyncio.CancelledError) for error in found)
            await asyncio.wait_for(servers.idle(), 1)
            while server.running:
                await asyncio.sleep(0.01)
            server.delay_s = 0
            assert_right(await servers.complete(REQUEST))
            assert placement.OVERCOMMIT == 4

    run(test)
