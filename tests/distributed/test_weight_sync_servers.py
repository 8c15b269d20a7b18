"""Weights on their way to real SGLang servers, by every transport: exact, all or nothing, and back
after a restart."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from aiohttp import web
from safetensors.torch import load_file
from torch import Tensor

from megaopd.batch import Sample, SamplingParams
from megaopd.config import Config, ParallelConfig, RolloutConfig, SGLangConfig
from megaopd.data.packing import pack
from megaopd.rollout.sglang.engine import SGLangEngine
from megaopd.rollout.sglang.fleet import ServerFleet
from megaopd.rollout.sglang.pool import Address
from megaopd.train_rollout import TRANSPORTS
from megaopd.weight_sync.servers import ServerSync
from megaopd.weight_sync.transport import NoServerTookWeights
from tests.helpers.distributed import run_distributed
from tests.helpers.engine_contract import CONTRACT, GREEDY, PARAMS, PROMPTS, TOLERANCE, VOCAB, Case
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.sglang import START_TIMEOUT_S, make_fleet
from tests.helpers.tiny_models import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * START_TIMEOUT_S)]

WHOLE = replace(PARAMS, temperature=1.0, n=2)
# Small buckets: the tiny model, of 0.9 MB, takes several.
BUCKET_BYTES = 200_000
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


def settings(kind: str, *, partial: bool = True, colocated: bool = False) -> Config:
    servers = SGLangConfig(
        sync=kind,  # type: ignore[arg-type]
        bucket_bytes=BUCKET_BYTES,
        verify=True,
        colocated=colocated,
    )
    return Config(rollout=RolloutConfig(kind="sglang", partial=partial, sglang=servers))


class OneRank:
    """What a transport is told of the process groups."""

    device = torch.device("cpu")


class Files:
    """A `Student` whose weights are those of a directory."""

    def __init__(self, model: Path) -> None:
        self.model = model

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        yield from load_file(self.model / "model.safetensors").items()


def connect(endpoints, config: Config, **others) -> SGLangEngine:
    return SGLangEngine(
        endpoints,
        config=config.rollout.sglang,
        vocab_size=VOCAB,
        partial=config.rollout.partial,
        transport=TRANSPORTS[config.rollout.sglang.sync](config, OneRank()),  # type: ignore[arg-type]
        **others,
    )


# The trainer's side, tensor-parallel.


class Megatron:
    """A `Student` over all ranks, with a forward pass to compare with."""

    def __init__(self, world_size: int, path: Path) -> None:
        from megaopd.models.arch import read_arch
        from megaopd.models.build import build_model
        from megaopd.models.mapping import padded_vocab_size
        from megaopd.parallel import groups as parallel_groups

        parallel = ParallelConfig(tensor=world_size)
        self.groups = parallel_groups.initialize(parallel, torch.device("cpu"), seed=1)
        self.arch = read_arch(path)
        rows = padded_vocab_size(self.arch.vocab_size, world_size)
        self.chunks = build_model(self.arch, parallel, self.groups, "fp32", rows)
        self.chunks[0].eval()

    def load(self, path: Path) -> None:
        from megaopd.models import weights

        with torch.no_grad():
            weights.load_weights(self.chunks, self.arch, path)

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        from megaopd.models import weights

        return weights.export_weights(self.chunks, self.arch, self.groups)

    def max_error(self, samples: list[Sample]) -> float:
        from megaopd.engine.schedule import forward_only

        size = self.groups.tp.size()
        batch = pack(samples, pad_to_multiple=size)
        (logits_TV,) = forward_only(
            self.chunks, [batch], self.groups, lambda i, b, hidden: hidden @ self.chunks[-1].head.T
        )
        shards = [torch.empty_like(logits_TV) for _ in range(size)]
        dist.all_gather(shards, logits_TV.contiguous(), group=self.groups.tp)
        logprobs_TV = torch.cat(shards, -1)[:, : self.arch.vocab_size].log_softmax(-1)
        ours_T = logprobs_TV.gather(1, batch.labels_T[:, None])[:, 0]
        mask_T = batch.loss_mask_T
        assert int(mask_T.sum()) == sum(len(s.response_ids) for s in samples)
        return float((ours_T - batch.rollout_logprobs_T)[mask_T].abs().max())


Seen = tuple[float, list[Sample]]


def train_and_sync(
    rank: int, world_size: int, config: Config, addresses: list[Address], models: list[Path]
) -> list[Seen]:
    """Per model, whose weights the student takes on: the error of samples, and greedy ones."""
    student = Megatron(world_size, models[0])
    engine = connect(addresses, config, rank=rank, world_size=world_size)
    sync, seen = ServerSync(), []
    for version, model in enumerate(models):
        student.load(model)
        sync.sync(student, engine, version)
        samples = engine.generate(PROMPTS, WHOLE)
        assert {s.weight_version for s in samples} == {version}
        if rank == 0:
            assert {client.version for client in engine.pool.clients} == {version}
            assert engine.run(engine.pool.clients[0].served_version()) == version
        seen.append((student.max_error(samples), engine.generate(PROMPTS, GREEDY)))
    engine.close()
    return seen


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_samples_are_of_the_trainer_s_weights(kind, models, fleet):
    """Two servers, two tensor-parallel ranks, checksums verified; several updates in a row."""
    config = settings(kind, colocated=kind == "tensor")
    addresses = [Address(s.url, s.api_key, s.admin_key) for s in fleet.servers]
    order = [models[1], models[2], models[0]]
    for seen in run_distributed(train_and_sync, 2, config, addresses, order, timeout_s=300):
        for (error, greedy), model in zip(seen, order, strict=True):
            assert error <= TOLERANCE
            case = Case(None, model)
            expected = [case.greedy(prompt, GREEDY) for prompt in PROMPTS]
            assert [list(s.response_ids) for s in greedy] == expected
    assert not list(Path("/dev/shm").glob("megaopd-weights-*"))


@pytest.mark.parametrize("check", CONTRACT.values(), ids=CONTRACT)
def test_contract(check, models, fleet):
    """What every engine does, here with weights that came from us."""
    engine = connect(fleet.servers, settings("disk"))
    ServerSync().sync(Files(models[1]), engine, 0)
    check(Case(engine, models[1]))
    engine.close()


# Servers that fail.


class UpdateProxy(FaultProxy):
    """Answers 500 to some requests for `paths`: the n-th (from 0) if `fails(n)`.

    Attributes:
        paths: what it spoils.
    """

    paths: tuple[str, ...] = ()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path in self.paths and self.fails(self.requests[request.path]):
            self.requests[request.path] += 1
            await request.read()
            return web.json_response({"message": "spoiled"}, status=500)
        return await super()._answer(request)

    def fails(self, count: int) -> bool:
        return True


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


@pytest.mark.parametrize("kind", TRANSPORTS)
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
    rollout = engine.start(PROMPTS, LONG)
    while engine.pool.clients[0].silent_s > 1:
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


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_server_that_dies_during_an_update(kind, models, fleet):
    """It is restarted, and has the current weights before its first request."""
    config = settings(kind)
    engine = connect(fleet.servers, config, restarter=Unstoppable(fleet))
    sync = ServerSync()
    sync.sync(Files(models[1]), engine, 0)

    class Deadly(Files):
        """Its weights come while the second server dies."""

        def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
            for i, item in enumerate(super().export_weights()):
                if i == 10 and not self.done:
                    os.killpg(fleet.servers[1].pid, signal.SIGKILL)
                    self.done = True
                yield item

        done = False

    began = time.monotonic()
    sync.sync(Deadly(models[2]), engine, 1)
    assert time.monotonic() - began < 60
    check(engine, models[2], 1)
    # The other one works while it starts; it is used again when it has the weights.
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (len(engine.pool.up()) == 2 and not engine.pool.stale()):
        assert time.monotonic() < deadline
        check(engine, models[2], 1)
        time.sleep(1)
    assert [client.version for client in engine.pool.clients] == [1, 1]
    # What it answers is of those weights, with those of its start nowhere in sight.
    alone = connect([fleet.servers[1]], replace(config))
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
