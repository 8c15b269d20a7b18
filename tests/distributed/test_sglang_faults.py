"""What goes wrong with servers at scale, done to real ones: nothing is lost, doubled or waited for
in vain."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megaopd.batch import Completion, SamplingParams
from megaopd.errors import RolloutError
from megaopd.rollout.sglang.api import GenerateRequest, RequestRejected
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.fleet import ServerFleet
from megaopd.rollout.sglang.health import Endpoint
from megaopd.rollout.sglang.loop import EventLoopThread
from megaopd.rollout.sglang.pool import Address, ServerPool
from tests.helpers.fault_proxy import RETRIED, FaultProxy
from tests.helpers.sglang import START_TIMEOUT_S, family_of, http_status, is_alive, make_fleet
from tests.helpers.tiny_models import TINY_CONFIG, make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * START_TIMEOUT_S)]

VOCAB_SIZE = TINY_CONFIG["vocab_size"]
NUM_PROMPTS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFleet]:
    """Two servers; every test but the last leaves them running."""
    restarts = {"max_restarts": 10, "first_delay_s": 0.001}
    fleet = make_fleet(model, tmp_path_factory.mktemp("logs"), count=2, fleet=restarts)
    fleet.start()
    yield fleet
    fleet.stop()


@pytest.fixture
def proxy(fleet: ServerFleet) -> Iterator[FaultProxy]:
    """Before the first server."""
    proxy = FaultProxy(fleet.servers[0])
    yield proxy
    proxy.close()


@dataclass
class Running:
    """A pool and the loop that it lives in."""

    pool: ServerPool
    loop: EventLoopThread

    def submit(self, requests: Sequence[GenerateRequest]) -> list[Future[Completion]]:
        return [self.loop.submit(self.pool.complete(request)) for request in requests]

    def load(self, client: ServerClient, model: Path, version: int) -> None:
        """Gives a server weights, as a weight sync does."""
        self.loop.run(client.update_from_disk(str(model), version=version))
        client.version = version

    def counted(self, name: str, timeout_s: float) -> float:
        """Seconds until the pool has counted one of `name`."""
        return seconds_until(lambda: self.pool.counters[name] > 0, timeout_s)


@contextmanager
def running(endpoints: Sequence[Endpoint], **settings: Any) -> Iterator[Running]:
    loop = EventLoopThread()
    pool = ServerPool(endpoints, vocab_size=VOCAB_SIZE, **settings)
    try:
        loop.run(pool.start())
        yield Running(pool, loop)
    finally:
        loop.run(pool.close())
        loop.close()


def make_requests(count: int = NUM_PROMPTS, num_tokens: int = 0) -> list[GenerateRequest]:
    """Requests of which none is like another and, without `num_tokens`, none as long."""
    return [
        GenerateRequest(
            input_ids=(1, 2, 3, 10 + i),
            params=SamplingParams(max_new_tokens=num_tokens or 60 + 4 * i),
            seed=i,
            name=f"prompt{i}/0",
        )
        for i in range(count)
    ]


def seconds_until(happened: Callable[[], bool], timeout_s: float) -> float:
    start = time.monotonic()
    while not happened():
        assert time.monotonic() - start < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - start


def check_all_there(
    model: Path, requests: Sequence[GenerateRequest], futures: Sequence[Future[Completion]]
) -> None:
    """Every response is as long as asked for, and its log-probabilities are those of its tokens:
    what was continued elsewhere was continued from the right ones."""
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for request, future in zip(requests, futures, strict=True):
        completion = future.result(timeout=START_TIMEOUT_S)
        assert completion.finish_reason == "length"
        assert len(completion.ids) == request.params.max_new_tokens
        tokens = torch.tensor([[*request.input_ids, *completion.ids]])
        with torch.no_grad():
            logprobs = weights(tokens).logits[0].log_softmax(-1)
        start = len(request.input_ids) - 1
        rows = logprobs[start:-1].gather(1, tokens[0, start + 1 :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), rows, atol=1e-4, rtol=0)


def num_prefills(log: Path) -> int:
    """Batches of prompts that a server has worked on, by its log."""
    return log.read_text().count("Prefill batch")


# What any process of this user can read of another.
PUBLIC = ("cmdline", "environ")


def test_a_server_keeps_its_keys(fleet: ServerFleet) -> None:
    server = fleet.servers[0]
    family = family_of(server)
    assert len(family) >= 3
    assert {os.getpgid(member.pid) for member in family} == {server.pid}
    assert server.version.startswith("0.")
    assert server.api_key != server.admin_key
    statuses = {
        (path, key): http_status(server.url + path, key)
        for path in ("/model_info", "/flush_cache")
        for key in ("", "wrong", server.api_key, server.admin_key)
    }
    assert statuses == {
        ("/model_info", ""): 401,
        ("/model_info", "wrong"): 401,
        ("/model_info", server.api_key): 200,
        ("/model_info", server.admin_key): 401,
        ("/flush_cache", ""): 401,
        ("/flush_cache", "wrong"): 401,
        ("/flush_cache", server.api_key): 401,
        ("/flush_cache", server.admin_key): 200,
    }
    log = server.log.read_text()
    assert "***" in log
    assert stat.S_IMODE(server.log.stat().st_mode) == 0o600
    places = [log.encode()]
    for member in family:
        places += [Path(f"/proc/{member.pid}/{name}").read_bytes() for name in PUBLIC]
    for place in places:
        assert server.api_key.encode() not in place
        assert server.admin_key.encode() not in place
    assert stat.S_IMODE(Path(family[0].environ()["TMPDIR"]).stat().st_mode) == 0o700


def left_by(family: Sequence[psutil.Process]) -> list[Path]:
    """The files that a running server has on this host."""
    files = {region.path for member in family for region in member.memory_maps()}
    shared = [Path(file) for file in files if file.startswith("/dev/shm/sglang_")]
    assert [file for file in shared if file.exists()]
    return [Path(family[0].environ()["TMPDIR"]), *shared]


def test_a_killed_server_loses_and_doubles_nothing_and_comes_back(
    model: Path, fleet: ServerFleet
) -> None:
    requests = make_requests()
    with running(fleet.servers, restarter=fleet) as run:
        for client in run.pool.clients:
            run.load(client, model, version=3)
        run.pool.publish(3)
        futures = run.submit(requests)
        seconds_until(lambda: any(future.done() for future in futures), START_TIMEOUT_S)
        killed, url = fleet.servers[0], fleet.servers[0].url
        os.kill(killed.pid or 0, signal.SIGKILL)
        assert run.counted("servers_lost", 15) < 15
        check_all_there(model, requests, futures)
        assert run.pool.counters["retries"] > 0
        run.counted("servers_back", START_TIMEOUT_S)
        assert killed.url != url
        # It started from its first weights, so it samples nothing until it has the current ones.
        [stale] = run.pool.stale()
        assert stale.url == killed.url
        before = num_prefills(killed.log)
        more = make_requests(8, num_tokens=8)
        check_all_there(model, more, run.submit(more))
        assert num_prefills(killed.log) == before
        run.load(stale, model, version=3)
        more = make_requests(16, num_tokens=8)
        check_all_there(model, more, run.submit(more))
        assert num_prefills(killed.log) > before


@pytest.mark.long
def test_a_stopped_server_is_noticed_and_taken_back(model: Path, fleet: ServerFleet) -> None:
    requests = make_requests()
    stopped = fleet.servers[1].pid or 0
    with running(fleet.servers) as run:
        futures = run.submit(requests)
        seconds_until(lambda: any(future.done() for future in futures), START_TIMEOUT_S)
        os.killpg(stopped, signal.SIGSTOP)
        try:
            assert run.counted("servers_lost", 15) < 15
            check_all_there(model, requests, futures)
        finally:
            os.killpg(stopped, signal.SIGCONT)
        run.counted("servers_back", 60)
        more = make_requests(16, num_tokens=8)
        check_all_there(model, more, run.submit(more))


@pytest.mark.long
def test_generation_that_hangs_behind_a_healthy_front_end(
    model: Path, fleet: ServerFleet, proxy: FaultProxy
) -> None:
    proxy.spoil_all("hang")
    requests = make_requests(16, num_tokens=32)
    with running([proxy, fleet.servers[1]], progress_timeout_s=20.0) as run:
        futures = run.submit(requests)
        seconds_until(lambda: proxy.spoiled["hang"] > 0, 30)
        assert run.counted("servers_lost", 30) < 30
        check_all_there(model, requests, futures)
        # Its front end answers all the time; only tokens convince.
        time.sleep(4)
        assert run.pool.counters["servers_back"] == 0
        proxy.spoil_all("")
        run.counted("servers_back", 60)


@pytest.mark.parametrize("fault", RETRIED)
def test_faults_that_pass_are_retried(model: Path, proxy: FaultProxy, fault: str) -> None:
    requests = make_requests(4, num_tokens=16)
    with running([proxy]) as run:
        proxy.spoil(fault, fault, fault)
        check_all_there(model, requests, run.submit(requests))
        assert proxy.spoiled[fault] == 3
        assert run.pool.counters["retries"] == 3
        assert proxy.requests["/generate"] == 7


@pytest.mark.long
def test_a_request_is_retried_five_times_with_growing_waits(proxy: FaultProxy) -> None:
    [request] = make_requests(1, num_tokens=4)
    with running([proxy]) as run:
        proxy.spoil_all("500")
        start = time.monotonic()
        [future] = run.submit([request])
        with pytest.raises(RolloutError, match=r"^prompt0/0: failed 6 times, at last: .*500"):
            future.result(timeout=120)
        assert time.monotonic() - start > 0.5 * (0.5 + 1 + 2 + 4 + 8)
        assert proxy.requests["/generate"] == 6


def test_a_rejected_request_is_not_sent_again(model: Path, proxy: FaultProxy) -> None:
    requests = make_requests(4, num_tokens=8)
    with running([proxy]) as run:
        proxy.spoil("400", only=lambda body: body["input_ids"] == list(requests[2].input_ids))
        futures = run.submit(requests)
        with pytest.raises(RequestRejected, match="spoiled as 400"):
            futures[2].result(timeout=60)
        check_all_there(model, requests[:2] + requests[3:], futures[:2] + futures[3:])
        assert run.pool.counters["retries"] == 0
        assert proxy.prompts.count(requests[2].input_ids) == 1


def test_a_wrong_key_is_one_line(fleet: ServerFleet) -> None:
    address = Address(fleet.servers[0].url, "not-the-key")
    with pytest.raises(RolloutError, match="the server refuses the key"), running([address]):
        pass


def test_an_endpoint_without_a_server_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = Address(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RolloutError, match="no answer") as caught, running([address]):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_when_servers_that_are_not_ours_are_dead_nobody_waits(fleet: ServerFleet) -> None:
    proxies = [FaultProxy(server) for server in fleet.servers]
    try:
        with running(proxies) as run:
            futures = run.submit(make_requests(num_tokens=1000))
            seconds_until(lambda: all(proxy.prompts for proxy in proxies), 30)
            for proxy in proxies:
                proxy.close()
            start = time.monotonic()
            for future in futures:
                with pytest.raises(RolloutError, match="all are down"):
                    future.result(timeout=60)
            assert time.monotonic() - start < 60
    finally:
        for proxy in proxies:
            proxy.close()


def test_when_all_are_dead_nobody_waits(fleet: ServerFleet) -> None:
    """Restarts that fail, ten in a row, retire a server; with the last one all requests end. It
    leaves no server to other tests, so it is the last; and nothing else."""
    families = [family_of(server) for server in fleet.servers]
    files = [file for family in families for file in left_by(family)]
    with running(fleet.servers, restarter=fleet) as run:
        futures = run.submit(make_requests(8))
        for server in fleet.servers:
            server.spec = replace(server.spec, python="/bin/false")
            os.kill(server.pid or 0, signal.SIGKILL)
        start = time.monotonic()
        for future in futures:
            with pytest.raises(RolloutError, match="all are down"):
                future.result(timeout=60)
        assert time.monotonic() - start < 60
        assert fleet.retired == {0, 1}
        [late] = run.submit(make_requests(1))
        with pytest.raises(RolloutError, match="all are down"):
            late.result(timeout=5)
    fleet.stop()
    assert [member for family in families for member in family if is_alive(member)] == []
    assert [file for file in files if file.exists()] == []
