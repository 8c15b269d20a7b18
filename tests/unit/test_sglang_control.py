"""What a server is told besides requests, by version."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from megaopd.rollout.sglang.api import UpdateFailed
from megaopd.rollout.sglang.client import ServerClient
from megaopd.rollout.sglang.connection import new_session
from tests.helpers.fake_sglang import FakeServer


def talk(server: FakeServer, test: Callable[[ServerClient], Awaitable[None]]) -> None:
    async def run() -> None:
        await server.start()
        try:
            async with new_session() as session:
                client = ServerClient(server.url, session=session)
                await client.probe()
                await test(client)
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("release", ["0.4.10", "0.5.2", "0.5.22"])
def test_an_update(release):
    server = FakeServer(release=release)

    async def test(client: ServerClient) -> None:
        await client.pause("retract")
        assert client.paused
        await client.begin_update()
        await client.update_from_tensor(["a", "b"], version=3, load_format="flattened_bucket")
        await client.update_from_distributed(
            names=["w"], dtypes=["float32"], shapes=[(2, 3)], group_name="g", version=3
        )
        await client.end_update()
        await client.update_from_disk("/weights", version=3, flush_cache=False)
        await client.continue_()
        assert not client.paused

    talk(server, test)
    stamp = {} if release == "0.4.10" else {"weight_version": "3"}
    flush = {} if release == "0.4.10" else {"flush_cache": False}
    bracket = release == "0.5.22"
    tensor = {"serialized_named_tensors": ["a", "b"], "load_format": "flattened_bucket"}
    broadcast = {"names": ["w"], "dtypes": ["float32"], "shapes": [[2, 3]], "group_name": "g"}
    assert server.told == [
        ("/pause_generation", {"mode": "retract"}),
        *([("/begin_weight_update", {})] if bracket else []),
        ("/update_weights_from_tensor", {**tensor, "flush_cache": True, **stamp}),
        ("/update_weights_from_distributed", {**broadcast, "flush_cache": True, **stamp}),
        *([("/end_weight_update", {})] if bracket else []),
        ("/update_weights_from_disk", {"model_path": "/weights", **flush, **stamp}),
        ("/continue_generation", {}),
    ]


def test_groups_aborts_and_memory():
    server = FakeServer()

    async def test(client: ServerClient) -> None:
        place = {"master_address": "127.0.0.1", "master_port": 5, "rank_offset": 1}
        await client.init_group(**place, world_size=3, group_name="g", backend="gloo")
        await client.destroy_group("g")
        await client.abort("r1")
        await client.abort("")
        await client.flush_cache()
        await client.release_memory(["kv_cache"])
        await client.release_memory()
        assert client.released == {"kv_cache", "weights"}
        await client.resume_memory(["weights"])
        await client.resume_memory()
        await client.resume_memory()
        assert client.released == frozenset()
        assert await client.checksum() == {"success": True}

    talk(server, test)
    paths = [path for path, _ in server.told]
    bodies = [body for _, body in server.told]
    assert paths[:2] == ["/init_weights_update_group", "/destroy_weights_update_group"]
    assert bodies[0]["world_size"] == 3
    assert bodies[2:4] == [{"rid": "r1", "abort_all": False}, {"rid": "", "abort_all": True}]
    # What is not held is not given up, and the other way round.
    assert bodies[5:9] == [{"tags": [tag]} for tag in ("kv_cache", "weights")] + [
        {"tags": ["weights"]},
        {"tags": ["kv_cache"]},
    ]
    assert paths[9:] == ["/weights_checker"]


@pytest.mark.parametrize("status", [400, 404, 500])
def test_a_refusal_is_told(status):
    server = FakeServer()
    server.control = dict.fromkeys(server.control, status)

    async def test(client: ServerClient) -> None:
        for call in (
            client.begin_update(),
            client.update_from_disk("/weights", version=1),
            client.flush_cache(),
            client.release_memory(),
            client.checksum(),
        ):
            with pytest.raises(UpdateFailed, match=f"answers {status}"):
                await call
        assert client.released == frozenset()
        if status == 404:
            # Versions that know no such request leave the group when it ends.
            await client.destroy_group("g")

    talk(server, test)
