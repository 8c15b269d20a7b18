"""The servers that samples come from: their start, the engine over them, the way of weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megaopd.config import Config, SGLangConfig
from megaopd.errors import ConfigError
from megaopd.interruption import reason_to_stop, stopped

if TYPE_CHECKING:
    import torch

    from megaopd.protocols import RolloutEngine
    from megaopd.rollout.conversation import Converse
    from megaopd.rollout.sglang.engine import WeightTransport
    from megaopd.rollout.sglang.fleet import ServerFleet
    from megaopd.rollout.sglang.health import Endpoint
    from megaopd.weight_sync.carrier import Carrier

# Ranks that wait for servers wait in a collective, which has a time limit: rank 0 gives a sign, and
# any of them can say that it was told to stop.
SIGN_OF_LIFE_S = 5.0


class World(Protocol):
    """The processes that call an engine together, and this one's device."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def servers_engine(
    config: Config,
    vocab_size: int,
    converse: Converse,
    world: World,
    *,
    with_transport: bool = True,
    first_gpu: int | None = None,
) -> RolloutEngine:
    """An engine over the servers at `rollout.urls`, or of our own; collective.

    Args:
        with_transport: weights come by `load_weights`; without it the servers keep theirs.
        first_gpu: of those that the servers we start may take; None leaves each rank of this host
            its own, unless they share them.
    """
    from megaopd.rollout.sglang.engine import SGLangEngine
    from megaopd.rollout.sglang.pool import Address

    rollout, servers = config.rollout, config.rollout.sglang
    fleet: ServerFleet | None = None
    endpoints: Sequence[Endpoint] = ()
    if rollout.launch:
        fleet = _start_servers(config, world, first_gpu)
        endpoints = fleet.servers if fleet else ()
    else:
        api_key = os.environ.get(servers.api_key_env, "")
        admin_key = os.environ.get(servers.admin_key_env, "") or api_key
        endpoints = [Address(url.rstrip("/"), api_key, admin_key) for url in rollout.urls]
    try:
        return SGLangEngine(
            endpoints,
            config=servers,
            vocab_size=vocab_size,
            converse=converse,
            partial=rollout.partial,
            transport=TRANSPORTS[servers.sync](config, world) if with_transport else None,
            restarter=fleet,
            stop_reason=reason_to_stop,
            rank=world.rank,
            world_size=world.world_size,
        )
    except BaseException:
        # Nobody else knows of them yet.
        if fleet is not None:
            fleet.stop()
        raise


def _transport(config: Config, carrier: Carrier) -> WeightTransport:
    from megaopd.weight_sync.tensor import TensorCarrier
    from megaopd.weight_sync.transport import ServerTransport

    servers = config.rollout.sglang
    return ServerTransport(
        carrier,
        # The way that needs nothing but HTTP.
        TensorCarrier(by_value=True),
        bucket_bytes=servers.bucket_bytes,
        partial=config.rollout.partial,
        verify=servers.verify,
    )


def disk_transport(config: Config, world: World) -> WeightTransport:
    from megaopd.weight_sync.disk import DiskCarrier

    return _transport(config, DiskCarrier(config.rollout.sglang.sync_dir))


def tensor_transport(config: Config, world: World) -> WeightTransport:
    from megaopd.weight_sync.tensor import TensorCarrier

    return _transport(config, TensorCarrier(by_value=world.device.type != "cuda"))


def distributed_transport(config: Config, world: World) -> WeightTransport:
    from megaopd.weight_sync.distributed import DistributedCarrier

    return _transport(config, DistributedCarrier("nccl" if world.device.type == "cuda" else "gloo"))


# By rollout.sglang.sync: how `SGLangEngine.load_weights` brings weights to its servers.
TRANSPORTS: dict[str, Callable[[Config, World], WeightTransport]] = {
    "disk": disk_transport,
    "tensor": tensor_transport,
    "distributed": distributed_transport,
}


def _start_servers(config: Config, world: World, first_gpu: int | None) -> ServerFleet | None:
    """Starts rank 0's servers and waits until they answer; collective. None on other ranks.

    Raises:
        RolloutError: on every rank alike: one of them did not start.
        StopRequested: on every rank alike: one of them was told to stop.
    """
    from megaopd.rollout.sglang.ranks import Ranks

    ranks = Ranks(world.rank, world.world_size)
    fleet = server_fleet(config, world, first_gpu) if world.rank == 0 else None
    with ThreadPoolExecutor(max_workers=1) as starter:
        start = starter.submit(fleet.start) if fleet else None
        try:
            while not ranks.on_rank_0(lambda: start is not None and _is_done(start)):
                if (reason := ranks.first(reason_to_stop())) is not None:
                    raise stopped(reason, "the start of the rollout servers")
        except BaseException:
            # Ctrl-C, say: who waits for a server is told that there is none any more.
            if fleet is not None:
                fleet.stop()
            raise
    return fleet


def _is_done(start: Future[None]) -> bool:
    """Whether it has ended, asked with patience; raises what it raised."""
    try:
        start.result(timeout=SIGN_OF_LIFE_S)
    except TimeoutError:
        return False
    return True


def server_fleet(config: Config, world: World, first_gpu: int | None = None) -> ServerFleet:
    """The servers of this host, not started yet.

    Raises:
        ConfigError: there are not so many GPUs.
    """
    from megaopd.rollout.sglang.flags import ServerSpec
    from megaopd.rollout.sglang.fleet import ServerFleet
    from megaopd.rollout.sglang.server import SGLangServer
    from megaopd.storage.steps import hf_directory

    servers = config.rollout.sglang
    if first_gpu is None:
        first_gpu = 0 if servers.colocated else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world.device.type == "cuda":
        _check_gpus(servers, first_gpu)
    # The weights of a Megatron checkpoint arrive like those of every step, before a first request.
    model = hf_directory(config.student.path)
    specs = [
        ServerSpec(
            model_path=str(model),
            has_weights=model == Path(config.student.path),
            python=servers.python or sys.executable,
            device=world.device.type,
            dtype=config.student.dtype,
            host=servers.host,
            tensor=servers.tensor,
            first_gpu=first_gpu + index * servers.tensor,
            colocated=servers.colocated,
            seed=config.run.seed,
            args=servers.args,
        )
        for index in range(servers.num_servers)
    ]
    keys = {
        "api_key": os.environ.get(servers.api_key_env, ""),
        "admin_key": os.environ.get(servers.admin_key_env, ""),
    }
    logs = Path(config.run.dir) / "servers"
    return ServerFleet(
        [
            SGLangServer(spec, index, logs, start_timeout_s=servers.start_timeout_s, **keys)
            for index, spec in enumerate(specs)
        ],
        max_restarts=servers.max_restarts,
    )


def _check_gpus(servers: SGLangConfig, first_gpu: int) -> None:
    import torch

    wanted, present = servers.num_servers * servers.tensor, torch.cuda.device_count()
    if first_gpu + wanted > present:
        raise ConfigError(
            "rollout.sglang.num_servers",
            f"{servers.num_servers} x rollout.sglang.tensor {servers.tensor} GPUs from number "
            f"{first_gpu} on, and this host has {present}",
            "start fewer servers or fewer ranks, or share the GPUs (rollout.sglang.colocated)",
        )
