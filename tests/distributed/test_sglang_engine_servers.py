"""The engine on a real SGLang: the contract, Megatron's log-probabilities, cuts and updates on the
way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megaopd.batch import Sample, SamplingParams
from megaopd.config import ParallelConfig, SGLangConfig
from megaopd.data.packing import pack
from megaopd.errors import RolloutError
from megaopd.rollout.embedded import EmbeddedEngine
from megaopd.rollout.sglang.api import GenerateRequest, RequestRejected, ServerFault
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.connection import new_session
from megaopd.rollout.sglang.engine import SGLangEngine
from megaopd.rollout.sglang.pool import Address
from megaopd.rollout.sglang.server import SGLangServer
from tests.helpers.distributed import run_distributed
from tests.helpers.engine_contract import CONTRACT, GREEDY, PARAMS, PROMPTS, TOLERANCE, VOCAB, Case
from tests.helpers.tiny_models import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = SamplingParams(max_new_tokens=160, temperature=1.0, n=4, seed=1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(sglang_servers, model_dir) -> SGLangServer:
    return sglang_servers(model_dir)[0]


@pytest.fixture
def case(server, model_dir) -> Iterator[Case]:
    """An engine that takes the server's weights as they are; weight sync has tests of its own."""
    engine = SGLangEngine([server], config=SGLangConfig(), vocab_size=VOCAB)
    yield Case(engine, model_dir, can_load=False, exact=False)
    engine.close()


@pytest.mark.parametrize("check", CONTRACT.values(), ids=CONTRACT)
def test_contract(case, check):
    check(case)


def test_greedy_tokens_are_those_of_the_embedded_engine(case, model_dir):
    embedded = EmbeddedEngine.from_pretrained(
        str(model_dir), device="cpu", dtype=torch.float32, batch_size=8
    )
    stops = replace(GREEDY, max_new_tokens=64, stop_token_ids=tuple(range(0, VOCAB, 64)))
    for params in (GREEDY, stops):
        ours, theirs = (e.generate(PROMPTS, params) for e in (case.engine, embedded))
        for one, other in zip(ours, theirs, strict=True):
            assert one.response_ids == other.response_ids
            assert one.finish_reason == other.finish_reason
            torch.testing.assert_close(
                torch.tensor(one.response_logprobs),
                torch.tensor(other.response_logprobs),
                atol=TOLERANCE,
                rtol=0,
            )


def megatron_error(rank: int, world_size: int, path: str, samples: list[Sample]) -> float:
    """The largest difference between samples' log-probabilities and those of Megatron's forward,
    tensor-parallel over all ranks."""
    from megaopd.engine.schedule import forward_only
    from megaopd.models import weights
    from megaopd.models.arch import read_arch
    from megaopd.models.build import build_model
    from megaopd.models.mapping import padded_vocab_size
    from megaopd.parallel import groups as parallel_groups

    parallel = ParallelConfig(tensor=world_size)
    groups = parallel_groups.initialize(parallel, torch.device("cpu"), seed=1)
    arch = read_arch(path)
    rows = padded_vocab_size(arch.vocab_size, world_size)
    chunks = build_model(arch, parallel, groups, "fp32", rows)
    weights.load_weights(chunks, arch, path)
    chunks[0].eval()
    batch = pack(samples, pad_to_multiple=world_size)
    (logits_TV,) = forward_only(
        chunks, [batch], groups, lambda i, b, hidden: hidden @ chunks[-1].head.T
    )
    shards = [torch.empty_like(logits_TV) for _ in range(world_size)]
    dist.all_gather(shards, logits_TV.contiguous(), group=groups.tp)
    logprobs_TV = torch.cat(shards, -1)[:, : arch.vocab_size].log_softmax(-1)
    ours_T = logprobs_TV.gather(1, batch.labels_T[:, None])[:, 0]
    mask_T = batch.loss_mask_T
    assert int(mask_T.sum()) == sum(len(s.response_ids) for s in samples)
    return float((ours_T - batch.rollout_logprobs_T)[mask_T].abs().max())


def test_logprobs_are_those_of_megatron(case, model_dir):
    samples = case.engine.generate(PROMPTS, replace(PARAMS, temperature=1.0, n=2))
    for error in run_distributed(megatron_error, 2, str(model_dir), samples, timeout_s=240):
        assert error <= TOLERANCE


def in_mid_generation(engine: SGLangEngine, act) -> list[Sample]:
    """Runs the coroutine function `act(client)` while a rollout of 20 long responses is under
    way."""
    rollout = engine.start(PROMPTS, LONG)
    client = engine.pool.clients[0]
    while client.silent_s > 1:
        time.sleep(0.02)
    engine.run(act(client))
    samples = rollout.result()
    assert len({s.sample_id for s in samples}) == 20
    assert {len(s.response_ids) for s in samples} == {160}
    return samples


@pytest.mark.parametrize(
    "mode", ["retract", *(pytest.param(m, marks=pytest.mark.long) for m in ("abort", "in_place"))]
)
def test_a_pause_in_mid_generation(case, mode):
    async def pause(client: ServerClient) -> None:
        await client.pause(mode)
        await asyncio.sleep(1)
        await client.continue_()

    samples = in_mid_generation(case.engine, pause)
    assert case.max_error(samples, 1.0) <= TOLERANCE
    # Only an abort cuts; what was cut goes on from its tokens.
    assert (case.engine.metrics["rollout/cuts"] > 0) == (mode == "abort")
    assert case.engine.metrics["rollout/retries"] == 0


@pytest.mark.long
def test_a_pause_longer_than_the_time_limit_is_no_hang(server, model_dir):
    config = SGLangConfig(progress_timeout_s=2.0)
    engine = SGLangEngine([server], config=config, vocab_size=VOCAB)

    async def pause(client: ServerClient) -> None:
        await client.pause("in_place")
        await asyncio.sleep(4)
        await client.continue_()

    in_mid_generation(engine, pause)
    assert engine.metrics["rollout/retries"] == 0
    engine.close()


def test_new_weights_in_mid_generation(server, model_dir, tmp_path):
    """Tokens before and after an update, each under the weights that its version names."""
    other = Case(None, make_tiny_model(tmp_path / "other", seed=9))
    engine = SGLangEngine([server], config=SGLangConfig(), vocab_size=VOCAB, transport=Stamp())
    case = Case(engine, model_dir)
    engine.load_weights(iter([]), version=1)
    engine.run(engine.pool.clients[0].update_from_disk(str(model_dir), version=1))

    async def update(client: ServerClient) -> None:
        engine.pool.hold()
        await client.pause("retract")
        await client.update_from_disk(str(other.model_dir), version=2)
        client.version = 2
        engine.pool.publish(2)
        await client.continue_()
        engine.pool.resume()

    samples = in_mid_generation(engine, update)
    mixed = [s for s in samples if s.token_versions]
    assert mixed
    for sample in samples:
        versions = torch.tensor(sample.model_token_versions)
        assert versions.tolist() == sorted(versions.tolist())
        expected = torch.where(
            versions == 1, case.logprobs(sample, 1.0), other.logprobs(sample, 1.0)
        )
        found = torch.tensor(sample.response_logprobs).double()
        assert float((found - expected).abs().max()) <= TOLERANCE
    engine.run(engine.pool.clients[0].update_from_disk(str(model_dir), version=3))
    engine.close()


class Stamp:
    """A transport for servers that have the weights already."""

    def send(self, engine, weights, version):
        for client in engine.pool.clients:
            client.version = version
        engine.pool.publish(version)

    def close(self, engine):
        pass


def test_a_server_s_refusals(server):
    async def test() -> None:
        async with new_session() as session:
            wrong = ServerClient(server.url, api_key="wrong", session=session)
            with pytest.raises(RolloutError, match="refuses the key"):
                await wrong.probe()
            keys = {"api_key": server.api_key, "admin_key": server.admin_key}
            client = ServerClient(server.url, **keys, session=session)
            able = await client.probe()
            assert able.version >= (0, 5, 22)
            assert (able.max_request_tokens, able.num_ranks) == (254, 1)
            # The largest request that it answers in full, and one token more.
            ids = (5,) * 200
            whole = GenerateRequest(ids, replace(GREEDY, max_new_tokens=54))
            assert len((await client.generate(whole)).ids) == 54
            for bad in (
                replace(whole, params=replace(GREEDY, max_new_tokens=57)),
                replace(whole, params=replace(GREEDY, temperature=-1.0)),
            ):
                with pytest.raises(RequestRejected):
                    await client.generate(bad)
            assert await client.alive(5)
            assert await client.generates(20)
            checksums = await client.checksum()
            assert checksums["success"]
            await client.flush_cache()
            with pytest.raises(ServerFault, match="answers 400"):
                await client.update_from_disk("/nonexistent", version=1)
            await client.begin_update()
            await client.end_update()
            # Without the admin key no weights can be changed.
            plain = ServerClient(server.url, api_key=server.api_key, session=session)
            plain.capabilities = able
            with pytest.raises(RolloutError, match="refuses the key"):
                await plain.begin_update()

    asyncio.run(test())


def test_an_address_where_nothing_listens():
    began = time.monotonic()
    with pytest.raises(RolloutError, match="http://127.0.0.1:9: no answer") as caught:
        SGLangEngine([Address("http://127.0.0.1:9")], config=SGLangConfig(), vocab_size=VOCAB)
    assert caught.value.exit_status == 7
    assert time.monotonic() - began < 10
    assert not [t for t in threading.enumerate() if t.name == "megaopd-rollout"]
