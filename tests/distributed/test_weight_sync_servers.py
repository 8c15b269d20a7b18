"""Weights on their way to real SGLang servers, by every transport: exact, all or nothing, and back
after a restart."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megaopd.batch import SamplingParams
from megaopd.config import Config
from megaopd.rollout.sglang.engine import SGLangEngine
from megaopd.rollout.sglang.fleet import ServerFleet
from megaopd.rollout.sglang.pool import Address
from megaopd.train_servers import TRANSPORTS
from megaopd.weight_sync.servers import ServerSync
from megaopd.weight_sync.transport import NoServerTookWeights
from tests.helpers.distributed import run_distributed
from tests.helpers.engine_contract import CONTRACT, GREEDY, PARAMS, PROMPTS, TOLERANCE, Case
from tests.helpers.sglang import START_TIMEOUT_S, make_fleet
from tests.helpers.tiny_models import make_tiny_model
from tests.helpers.weight_sync import Deadly, Files, Megatron, UpdateProxy, connect, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * START_TIMEOUT_S)]

WHOLE = replace(PARAMS, temperature=1.0, n=2)
LONG = SamplingParams(max_new_tokens=160, n=4, seed=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one shape; the servers start with the first."""
    folder = tmp_path_factory.mktemp("models")
    return [make_tiny_model(folder / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def fleet(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFleet]:
    """Two servers, with whatever weights the last test left."""
    logs = tmp_path_factory.mktemp("logs")
    fleet = make_fleet(models[0], logs, count=2, fleet={"first_delay_s": 0.001})
    fleet.start()
    yield fleet
    fleet.stop()


def train_and_sync(
    rank: int, world_size: int, config: Config, addresses: list[Address], models: list[Path]
) -> None:
    """The student takes on the weights of one model after the other. Before each sync, when the
    servers have those of the model before, and after it, they are compared with Megatron."""
    student = Megatron(world_size, models[0])
    engine = connect(addresses, config, rank=rank, world_size=world_size)
    sync = ServerSync()

    def check_samples(version: int) -> None:
        samples = engine.generate(PROMPTS, WHOLE)
        assert {s.weight_version for s in samples} == {version}
        assert student.compare(samples)[0] <= TOLERANCE
        error, likeliest = student.compare(engine.generate(PROMPTS, GREEDY))
        assert error <= TOLERANCE
        assert likeliest

    for version, model in enumerate(models):
        student.load(model)
        if version > 0:
            # The comparison can fail: these are the weights before the sync.
            assert student.compare(engine.generate(PROMPTS, WHOLE))[0] > 10 * TOLERANCE
        sync.sync(student, engine, version)
        if rank == 0:
            assert {client.version for client in engine.pool.clients} == {version}
            assert engine.run(engine.pool.clients[0].served_version()) == version
        check_samples(version)
    engine.close()


# What fails is taken out of the update in one way, whatever carries the weights.
ONE_KIND = [
    kind if kind == "distributed" else pytest.param(kind, marks=pytest.mark.long)
    for kind in TRANSPORTS
]
# The others are asked of the same engine in test_sglang_engine_servers.py.
CHECKS = [
    pytest.param(check, id=name, marks=[] if "weights" in name else pytest.mark.long)
    for name, check in CONTRACT.items()
]


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_samples_are_of_the_trainer_s_weights(kind, models, fleet):
    """Two servers, two tensor-parallel ranks, checksums verified; several updates in a row: of each
    the samples before and after it are those of the weights that they should be of."""
    config = settings(kind, colocated=kind == "tensor")
    addresses = [Address(s.url, s.api_key, s.admin_key) for s in fleet.servers]
    order = [models[1], models[2], models[0]]
    run_distributed(train_and_sync, 2, config, addresses, order, timeout_s=300)
    assert not list(Path("/dev/shm").glob("megaopd-weights-*"))


@pytest.mark.parametrize("check", CHECKS)
def test_contract(check, models, fleet):
    """What every engine does, here with weights that came from us."""
    engine = connect(fleet.servers, settings("disk"))
    ServerSync().sync(Files(models[1]), engine, 0)
    check(Case(engine, models[1], exact=False))
    engine.close()


# Servers that fail.


UPDATES = (
    "/update_weights_from_disk",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
)


@pytest.fixture
def proxy(fleet: ServerFleet) -> Iterator[UpdateProxy]:
    """Before the second server."""
    proxy = UpdateProxy(fleet.servers[1])
    yield proxy
    proxy.close()


def check(engine: SGLangEngine, model: Path, version: int) -> None:
    samples = engine.generate(PROMPTS, WHOLE)
    assert len(samples) == 10
    assert {v for s in samples for v in s.model_token_versions} == {version}
    assert Case(engine, model).max_error(samples, 1.0) <= TOLERANCE


@pytest.mark.parametrize("kind", ONE_KIND)
def test_an_update_that_fails_on_one_of_two(kind, models, fleet, proxy):
    """In the middle, once: repaired at once. Always: out until an update succeeds."""
    engine = connect([fleet.servers[0], proxy], settings(kind))
    sync = ServerSync()
    sync.sync(Files(models[1]), engine, 0)
    check(engine, models[1], 0)
    # The third bucket of the next update.
    proxy.paths, before = UPDATES, proxy.requests.copy()
    proxy.fails = lambda count: count == sum(before[path] for path in UPDATES) + 2
    sync.sync(Files(models[2]), engine, 1)
    assert [client.version for client in engine.pool.clients] == [1, 1]
    check(engine, models[2], 1)
    proxy.fails = lambda count: True
    asked = proxy.requests["/generate"]
    sync.sync(Files(models[1]), engine, 2)
    assert [client.version for client in engine.pool.clients] == [2, -1]
    check(engine, models[1], 2)
    assert proxy.requests["/generate"] == asked
    proxy.paths = ()
    sync.sync(Files(models[2]), engine, 3)
    assert [client.version for client in engine.pool.clients] == [3, 3]
    check(engine, models[2], 3)
    assert proxy.requests["/generate"] > asked
    engine.close()


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_an_update_that_nobody_takes(kind, models, fleet, proxy):
    engine = connect([proxy], settings(kind))
    sync = ServerSync()
    sync.sync(Files(models[1]), engine, 0)
    proxy.paths = ("/pause_generation",)
    began = time.monotonic()
    with pytest.raises(NoServerTookWeights, match="no server took version 1") as caught:
        sync.sync(Files(models[2]), engine, 1)
    assert caught.value.exit_status == 7
    assert time.monotonic() - began < 60
    proxy.paths = ()
    # What is told it may be told again.
    sync.sync(Files(models[2]), engine, 2)
    check(engine, models[2], 2)
    engine.close()


@pytest.mark.parametrize("partial", [True, False])
def test_an_update_in_mid_generation(partial, models, fleet):
    """Tokens before and after it, each under the weights that its version names; or none after."""
    engine = connect(fleet.servers, settings("tensor", partial=partial))
    sync = ServerSync()
    sync.sync(Files(models[1]), engine, 0)
    began = time.monotonic()
    rollout = engine.start(PROMPTS, LONG)
    # The first tokens; not the sync, which counts as a sign of life as well.
    while engine.pool.clients[0]._connection._last_progress < began:
        time.sleep(0.02)
    sync.sync(Files(models[2]), engine, 1)
    samples = rollout.result()
    assert len({s.sample_id for s in samples}) == 20
    assert {len(s.response_ids) for s in samples} == {160}
    assert any(s.token_versions for s in samples) == partial
    cases = [Case(engine, models[1]), Case(engine, models[2])]
    for sample in samples:
        versions = torch.tensor(sample.model_token_versions)
        expected = torch.where(versions == 0, *(case.logprobs(sample, 1.0) for case in cases))
        found = torch.tensor(sample.response_logprobs).double()
        assert float((found - expected).abs().max()) <= TOLERANCE
    check(engine, models[2], 1)
    engine.close()


def test_a_checksum_tells_what_is_wrong(models, fleet, proxy):
    """One server is given another tensor right after the update: it does not pass for current."""
    engine = connect([fleet.servers[0], proxy], settings("tensor"))
    sync = ServerSync()
    sync.sync(Files(models[1]), engine, 0)
    other = engine.pool.clients[1]
    checksum, times = other.checksum, []

    async def tampered():
        times.append(time.monotonic())
        if len(times) == 1:
            await other.update_from_disk(str(models[0]), version=None)
        return await checksum()

    other.checksum = tampered
    sync.sync(Files(models[2]), engine, 1)
    # Found, and repaired.
    assert len(times) == 2
    assert [client.version for client in engine.pool.clients] == [1, 1]
    check(engine, models[2], 1)
    engine.close()


def train_and_die(config: Config, addresses: list[Address], models: list[Path]) -> None:
    """A trainer of its own process that is killed in the middle of its second update."""
    engine, sync = connect(addresses, config), ServerSync()
    sync.sync(Files(models[1]), engine, 0)
    sync.sync(Deadly(models[2], lambda: os.kill(os.getpid(), signal.SIGKILL)), engine, 1)


@pytest.mark.parametrize("kind", ONE_KIND)
def test_a_trainer_that_dies_during_an_update(kind, models, fleet):
    """The servers are paused, in an open update, and wait in a group for a member that is gone;
    the next trainer finds them of use at once."""
    config = settings(kind)
    addresses = [Address(s.url, s.api_key, s.admin_key) for s in fleet.servers]
    trainer = multiprocessing.get_context("spawn").Process(
        target=train_and_die, args=(config, addresses, models)
    )
    trainer.start()
    trainer.join(120)
    assert trainer.exitcode == -signal.SIGKILL
    began = time.monotonic()
    engine = connect(addresses, config)
    ServerSync().sync(Files(models[0]), engine, 0)
    assert time.monotonic() - began < 60
    assert [client.version for client in engine.pool.clients] == [0, 0]
    check(engine, models[0], 0)
    engine.close()
    assert not list(Path("/dev/shm").glob("megaopd-weights-*"))


@pytest.mark.long
def test_a_server_that_dies_during_an_update(models, fleet):
    """By broadcast, where its end leaves the others in a group that no longer works. It is
    restarted, and has the current weights before its first request. What a server's end is to the
    other ways, a connection that breaks, `test_an_update_that_fails_on_one_of_two` shows."""
    config = settings("distributed")
    engine = connect(fleet.servers, config, restarter=Unstoppable(fleet))
    sync = ServerSync()
    sync.sync(Files(models[1]), engine, 0)
    kill = partial(os.killpg, fleet.servers[1].pid, signal.SIGKILL)
    began = time.monotonic()
    sync.sync(Deadly(models[2], kill), engine, 1)
    assert time.monotonic() - began < 60
    check(engine, models[2], 1)
    # The other one works while it starts; it is used again when it has the weights.
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (len(engine.pool.up()) == 2 and not engine.pool.stale()):
        assert time.monotonic() < deadline
        engine.generate(PROMPTS[:1], GREEDY)
        time.sleep(3)
    assert [client.version for client in engine.pool.clients] == [1, 1]
    # What it answers is of those weights, with those of its start nowhere in sight.
    alone = connect([fleet.servers[1]], config)
    alone.pool.clients[0].version = 1
    alone.pool.publish(1)
    alone.weight_version = 1
    check(alone, models[2], 1)
    alone.close()
    engine.close()


class Unstoppable:
    """A `Restarter` that outlives the engine."""

    def __init__(self, fleet: ServerFleet) -> None:
        self.retired = fleet.retired
        self.restart = fleet.restart

    def stop(self) -> None:
        pass


def test_nothing_is_left_behind():
    assert not [t for t in threading.enumerate() if t.name == "megaopd-weight-sync"]
