"""Buckets, files, checksums, and the course of an update at servers that fail on request; what real
ones make of it is in tests/distributed/test_weight_sync_servers.py."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megaopd.config import SGLangConfig
from megaopd.errors import RolloutError
from megaopd.rollout.sglang.api import Capabilities, ServerDown, UpdateFailed
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.engine import SGLangEngine
from megaopd.rollout.sglang.loop import EventLoopThread
from megaopd.weight_sync import transport as transport_module
from megaopd.weight_sync.buckets import Bucket, buckets, on_host
from megaopd.weight_sync.checksum import Checksums, disagreement, server_name
from megaopd.weight_sync.disk import PREFIX, DiskCarrier
from megaopd.weight_sync.distributed import address_towards
from megaopd.weight_sync.servers import ServerSync
from megaopd.weight_sync.tensor import MAX_VALUE_BYTES, TensorCarrier, is_this_host
from megaopd.weight_sync.transport import MAX_ATTEMPTS, NoServerTookWeights, ServerTransport
from tests.helpers.fake_sglang import VOCAB, FakeServer

WEIGHTS = {f"w{i}": torch.full((i + 1,), float(i)) for i in range(6)}
TENSOR = "/update_weights_from_tensor"


def names(parts: Iterator[Bucket]) -> list[list[str]]:
    return [[name for name, _ in part.tensors] for part in parts]


def test_buckets_are_as_full_as_they_may_be_and_the_last_one_says_so():
    # Tensors of 4, 8, .. 24 bytes.
    parts = list(buckets(iter(WEIGHTS.items()), 20))
    assert names(iter(parts)) == [["w0", "w1"], ["w2"], ["w3"], ["w4"], ["w5"]]
    assert [part.num_bytes for part in parts] == [12, 12, 16, 20, 24]
    assert [part.is_last for part in parts] == [False] * 4 + [True]
    assert list(buckets(iter([]), 20)) == []
    (whole,) = buckets(iter(WEIGHTS.items()), 1000)
    assert whole.is_last


def test_buckets_ask_for_no_more_than_one_tensor_ahead():
    asked = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for item in WEIGHTS.items():
            asked.append(item[0])
            yield item

    next(buckets(weights(), 12))
    assert asked == ["w0", "w1", "w2"]


def test_what_leaves_holds_nothing_else():
    whole = torch.arange(1000.0)
    part = on_host(whole[10:20])
    assert torch.equal(part, whole[10:20])
    assert part.untyped_storage().nbytes() == 40
    assert on_host(whole) is not None
    assert on_host(whole).data_ptr() == whole.data_ptr()
    turned = on_host(torch.arange(6.0).reshape(2, 3).T)
    assert turned.is_contiguous()
    assert len(pickle.dumps(part)) < 1000


# The course of an update.


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    loop = EventLoopThread("fake-sglang")
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


def make_engine(servers: list[FakeServer], **settings) -> SGLangEngine:
    carrier = settings.pop("carrier", TensorCarrier(by_value=True))
    transport = ServerTransport(carrier, TensorCarrier(by_value=True), bucket_bytes=20, **settings)
    return SGLangEngine(servers, config=SGLangConfig(), vocab_size=VOCAB, transport=transport)


class Student:
    """Counts how often its weights are asked for."""

    def __init__(self) -> None:
        self.exports = 0

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        assert not only_trainable
        self.exports += 1
        yield from WEIGHTS.items()


def paths(server: FakeServer) -> list[str]:
    return [path for path, _ in server.told]


BRACKET = ["/begin_weight_update", *[TENSOR] * 5, "/end_weight_update"]


def test_the_course_of_an_update(servers):
    engine, student = make_engine(servers), Student()
    ServerSync().sync(student, engine, 7)
    assert student.exports == 1
    assert engine.weight_version == engine.pool.version == 7
    assert [client.version for client in engine.pool.clients] == [7, 7]
    for server in servers:
        assert paths(server) == ["/pause_generation", *BRACKET, "/continue_generation"]
        assert server.told[0][1] == {"mode": "retract"}
        bodies = [body for path, body in server.told if path == TENSOR]
        # The version and the end of old prefixes come with the last bucket.
        assert [body.get("weight_version") for body in bodies] == [None] * 4 + ["7"]
        assert [body["flush_cache"] for body in bodies] == [False] * 4 + [True]
        sent = [pickle.loads(base64.b64decode(b["serialized_named_tensors"][0])) for b in bodies]
        received = {name: tensor for part in sent for name, tensor in part}
        assert list(received) == list(WEIGHTS)
        assert all(torch.equal(received[name], WEIGHTS[name]) for name in WEIGHTS)
    engine.close()


def test_servers_without_brackets_or_modes(servers):
    for server in servers:
        server.release = "0.5.3"
    engine = make_engine(servers)
    ServerSync().sync(Student(), engine, 0)
    assert paths(servers[0]) == ["/pause_generation", *[TENSOR] * 5, "/continue_generation"]
    assert [client.version for client in engine.pool.clients] == [0, 0]
    engine.close()


@pytest.mark.parametrize(
    "path", ["/pause_generation", "/begin_weight_update", TENSOR, "/end_weight_update"]
)
def test_a_server_that_fails_any_part_is_out_until_it_has_taken_a_whole_update(servers, path):
    engine, student, sync = make_engine(servers), Student(), ServerSync()
    sync.sync(student, engine, 0)
    servers[1].control[path] = 500
    student.exports = 0
    sync.sync(student, engine, 1)
    # Once, and two attempts to repair it; the server that is well is asked once.
    assert student.exports == 3
    assert [client.version for client in engine.pool.clients] == [1, -1]
    assert paths(servers[0]).count("/begin_weight_update") == 2
    assert engine.weight_version == engine.pool.version == 1
    assert [client.url for client in engine.pool.stale()] == [servers[1].url]
    # Of the same version it is sent so many and no more.
    for _ in range(3):
        engine.refresh()
    assert student.exports == MAX_ATTEMPTS
    servers[1].control[path] = 200
    engine.refresh()
    assert student.exports == MAX_ATTEMPTS
    sync.sync(student, engine, 2)
    assert [client.version for client in engine.pool.clients] == [2, 2]
    engine.close()


def test_a_server_that_does_not_go_on_is_out(servers):
    engine = make_engine(servers)
    servers[1].control["/continue_generation"] = 500
    ServerSync().sync(Student(), engine, 0)
    assert [client.version for client in engine.pool.clients] == [0, -1]
    engine.close()


def test_an_update_that_was_left_open_is_closed(servers):
    """As by a trainer that died over it."""
    engine = make_engine(servers[:1])
    server = servers[0]
    client = engine.pool.clients[0]
    begin, tries = client.begin_update, []

    async def begin_update():
        tries.append(1)
        if len(tries) == 1:
            raise UpdateFailed("a weight-update session is already open")
        await begin()

    client.begin_update = begin_update
    ServerSync().sync(Student(), engine, 0)
    assert paths(server)[:3] == [
        "/pause_generation", "/end_weight_update", "/begin_weight_update",
    ]  # fmt: skip
    assert client.version == 0
    engine.close()


def test_nobody_takes_it(servers):
    engine, student = make_engine(servers), Student()
    ServerSync().sync(student, engine, 0)
    for server in servers:
        server.control[TENSOR] = 500
    with pytest.raises(NoServerTookWeights, match="no server took version 1"):
        ServerSync().sync(student, engine, 1)
    # The weights of all are in doubt, and nobody samples.
    assert engine.weight_version == -1
    assert len(engine.pool.stale()) == 2
    engine.close()


def test_servers_that_cannot_be_reached(servers, monkeypatch):
    """The pool has not seen yet that they are dead: it is asked, and may have them restarted."""
    engine = make_engine(servers)

    async def unreachable(*args, **kwargs):
        raise ServerDown("no connection")

    for client in engine.pool.up():
        monkeypatch.setattr(client, "pause", unreachable)
    ServerSync().sync(Student(), engine, 3)
    assert engine.weight_version == engine.pool.version == 3
    assert len(engine.pool.stale()) == 2
    engine.close()


def test_no_server_is_up(servers, loop):
    """They may be on their way back: it is the pool that gives up."""
    engine = make_engine(servers)
    for server in engine.pool._placement.servers:
        engine.pool._health.down(server, "for the test")
    ServerSync().sync(Student(), engine, 3)
    assert engine.weight_version == engine.pool.version == 3
    engine.close()


def test_a_server_that_goes_down_is_not_waited_for(servers, monkeypatch):
    monkeypatch.setattr("megaopd.weight_sync.carrier.WATCH_EVERY_S", 0.05)
    engine = make_engine(servers)
    client = engine.pool.clients[1]

    async def forever(*args, **kwargs):
        server = engine.pool._placement.servers[1]
        engine.pool._health.down(server, "for the test")
        await asyncio.sleep(3600)

    client.update_from_tensor = forever
    ServerSync().sync(Student(), engine, 0)
    assert engine.pool.clients[0].version == 0
    assert client.version == -1
    engine.close()


def test_a_server_that_does_not_answer_is_not_waited_for_longer(servers, monkeypatch):
    """Although its front end lives: the other ranks wait in a collective meanwhile."""
    monkeypatch.setattr("megaopd.weight_sync.carrier.WATCH_EVERY_S", 0.02)
    monkeypatch.setattr("megaopd.weight_sync.carrier.ANSWER_TIMEOUT_S", 0.1)
    engine = make_engine(servers)
    update, calls = engine.pool.clients[1].update_from_tensor, []

    async def late_once(*args, **kwargs):
        calls.append(1)
        await (asyncio.sleep(3600) if len(calls) == 1 else update(*args, **kwargs))

    engine.pool.clients[1].update_from_tensor = late_once
    ServerSync().sync(Student(), engine, 0)
    assert len(calls) == 6
    assert [client.version for client in engine.pool.clients] == [0, 0]
    engine.close()


def test_a_server_that_was_away_between_two_buckets_does_not_pass(servers, tmp_path):
    """By files nothing tells it from one that had all of them: it answers every request."""
    engine = make_engine(servers, carrier=(carrier := KeptFiles(tmp_path)))
    server, health, write = engine.pool._placement.servers[1], engine.pool._health, carrier._write

    async def away():
        health.down(server, "for the test")
        await health._revive(server)
        assert server.client in engine.pool.up()

    def away_before_the_third(bucket):
        if len(carrier.seen) == 2:
            engine.run(away())
        return write(bucket)

    carrier._write = away_before_the_third
    student = Student()
    ServerSync().sync(student, engine, 0)
    # Noticed, and given all of it once more.
    assert student.exports == 2
    updates = [path for path in paths(servers[1]) if path == "/update_weights_from_disk"]
    assert len(updates) == 10
    assert [client.version for client in engine.pool.clients] == [0, 0]
    engine.close()


def test_a_restarted_server_that_fails_once_more_ends_nothing(servers):
    """Only when all that are up have had their attempts in vain there is nothing to wait for."""
    engine, student, sync = make_engine(servers[:1]), Student(), ServerSync()
    sync.sync(student, engine, 0)
    client = engine.pool.clients[0]
    engine.pool.quarantine(client, "for the test")
    servers[0].control[TENSOR] = 500
    for _ in range(MAX_ATTEMPTS - 2):
        engine.refresh()
        assert engine.pool.stale() == [client]
    with pytest.raises(NoServerTookWeights, match="no server that is up could be given version 0"):
        engine.refresh()
    assert student.exports == MAX_ATTEMPTS
    with pytest.raises(NoServerTookWeights):
        engine.refresh()
    assert student.exports == MAX_ATTEMPTS
    engine.close()


def test_a_request_with_copies_for_many_ranks_is_no_larger(servers):
    for server, tp_size in zip(servers, (2, 8), strict=True):
        server.info = {"tp_size": tp_size}
    engine, carrier = make_engine(servers), TensorCarrier(by_value=True)
    one, other = engine.pool.clients
    assert carrier.max_bytes([one, other]) == MAX_VALUE_BYTES // 8
    assert carrier.max_bytes([one]) == MAX_VALUE_BYTES // 2
    assert carrier.max_bytes([]) is None
    engine.close()


def test_whoever_waits_for_responses_says_so(servers, monkeypatch):
    """Without partial rollouts nothing is sent before all that runs has ended."""
    monkeypatch.setattr(transport_module, "SIGN_OF_LIFE_S", 0.05)
    engine = make_engine(servers, partial=False)
    order = []
    idle, pause = engine.pool.idle, engine.pool.clients[0].pause

    async def slow_idle():
        await asyncio.sleep(0.3)
        await idle()
        order.append("idle")

    async def noted_pause(mode):
        order.append(mode)
        await pause(mode)

    engine.pool.idle, engine.pool.clients[0].pause = slow_idle, noted_pause
    ServerSync().sync(Student(), engine, 0)
    assert order == ["idle", "abort"]
    engine.close()


# Files.


class KeptFiles(DiskCarrier):
    """Looks at the bucket's directory while servers read it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: list[dict[str, Tensor]] = []

    def _write(self, bucket: Bucket) -> Path:
        path = super()._write(bucket)
        self.seen.append(load_file(path / "model.safetensors"))
        assert path.parent == self._folder
        return path


def test_files_are_those_of_a_bucket_and_gone_afterwards(servers, tmp_path):
    carrier = KeptFiles(tmp_path)
    dead = tmp_path / f"{PREFIX}{2**30}-x"
    dead.mkdir()
    mine = tmp_path / f"{PREFIX}{os.getpid()}-x"
    mine.mkdir()
    engine = make_engine(servers, carrier=carrier)
    ServerSync().sync(Student(), engine, 4)
    assert [list(part) for part in carrier.seen] == [["w0", "w1"], ["w2"], ["w3"], ["w4"], ["w5"]]
    assert torch.equal(carrier.seen[2]["w3"], WEIGHTS["w3"])
    # Only what a dead trainer left behind is removed.
    assert list(tmp_path.iterdir()) == [mine]
    bodies = [body for path, body in servers[0].told if path == "/update_weights_from_disk"]
    assert [body["flush_cache"] for body in bodies] == [False] * 4 + [True]
    assert bodies[-1]["weight_version"] == "4"
    assert "/begin_weight_update" not in paths(servers[0])
    engine.close()


def test_a_directory_that_cannot_be_written(servers, tmp_path):
    engine = make_engine(servers, carrier=DiskCarrier(tmp_path / "missing"))
    with pytest.raises(RolloutError, match=r"rollout\.sglang\.sync_dir: .* cannot be written"):
        ServerSync().sync(Student(), engine, 0)
    assert not engine.pool._placement.held
    engine.close()


# Checksums.


def test_names_of_servers():
    layer = "model.layers.3."
    assert server_name(layer + "self_attn.k_proj.bias") == (layer + "self_attn.qkv_proj.bias", 1)
    assert server_name(layer + "mlp.up_proj.weight") == (layer + "mlp.gate_up_proj.weight", 1)
    assert server_name(layer + "mlp.down_proj.weight") == (layer + "mlp.down_proj.weight", 0)
    expert = layer + "mlp.experts.5.up_proj.weight"
    assert server_name(expert) == (expert, 0)


def sha(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:16]


def test_checksums_of_what_was_sent():
    q, k, v, gate, up = (torch.randn(3, 4) for _ in range(5))
    embedding = torch.randn(70, 2)
    sums = Checksums()
    sums.add(Bucket((("a.q_proj.weight", q), ("a.k_proj.weight", k)), is_last=False))
    sums.add(Bucket((("a.v_proj.weight", v), ("m.up_proj.weight", up)), is_last=False))
    sums.add(Bucket((("m.gate_proj.weight", gate), ("embed_tokens.weight", embedding)), True))
    assert sums.of("a.qkv_proj.weight") == {sha(q, k, v)}
    padding = torch.zeros(58, 2)
    assert sums.of("embed_tokens.weight") == {sha(embedding), sha(embedding, padding)}
    # Up before gate: a running hash cannot tell.
    assert sums.of("m.gate_up_proj.weight") == set()
    assert sums.of("other") == set()


def client(name: str, device: str = "cpu") -> ServerClient:
    client = ServerClient(f"http://{name}:1", session=None)
    client.capabilities = Capabilities((0, 5, 23), device=device)
    return client


def answer(*ranks: dict[str, str]) -> dict:
    return {"ranks": [{"checksums": rank} for rank in ranks]}


def test_who_holds_something_else():
    sums = Checksums()
    sums.add(Bucket((("w", torch.ones(2)),), is_last=True))
    right, wrong = sha(torch.ones(2)), "0" * 16
    a, b, c = client("a"), client("b"), client("c")
    assert disagreement(sums, {a: answer({"w": right}), b: answer({"w": right})}) == {}
    assert set(disagreement(sums, {a: answer({"w": right}), b: answer({"w": wrong})})) == {b}
    assert set(disagreement(sums, {a: answer({"x": right})})) == {a}
    assert set(disagreement(sums, {a: {}})) == {a}
    # What is not ours is compared with the others.
    votes = {a: answer({"w": right, "e": "1"}), b: answer({"w": right, "e": "1"})}
    assert set(disagreement(sums, {**votes, c: answer({"w": right, "e": "2"})})) == {c}
    # On GPUs the hash is another one; of two nobody knows which is right.
    a, b, c = client("a", "cuda"), client("b", "cuda"), client("c", "cuda")
    assert disagreement(sums, {a: answer({"w": "1"}), b: answer({"w": "1"})}) == {}
    assert set(disagreement(sums, {a: answer({"w": "1"}), b: answer({"w": "2"})})) == {a, b}
    # Ranks of another layout hold other shards.
    assert disagreement(sums, {a: answer({"w": "1"}), b: answer({"w": "2"}, {"w": "3"})}) == {}


# Addresses.


def test_addresses():
    assert address_towards("http://127.0.0.1:30000") == "127.0.0.1"
    assert is_this_host("http://localhost:1")
    assert is_this_host(f"http://{address_towards('http://127.0.0.1:1')}:1")
    # Documentation's own network: nobody's.
    assert not is_this_host("http://192.0.2.1:1")
    with pytest.raises(RolloutError, match="no way to it"):
        address_towards("http://nowhere.invalid:1")
