"""Where samples come from: the engines, the servers behind them, and the way of weights.

The part of `megaopd.train` that knows the classes of rollout and weight sync; an evaluation of a
model that is not in training asks here for an engine as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megaopd.config import Config, MixtureConfig, SGLangConfig, TeacherConfig
from megaopd.errors import ConfigError
from megaopd.inputs import Inputs, teacher_configs

if TYPE_CHECKING:
    import torch

    from megaopd.models.hf_io.source import WeightSource
    from megaopd.parallel.groups import ParallelGroups
    from megaopd.protocols import RolloutEngine, WeightSync
    from megaopd.rollout.conversation import Converse
    from megaopd.rollout.mixture import Mixture
    from megaopd.rollout.sglang.engine import WeightTransport
    from megaopd.rollout.sglang.fleet import ServerFleet
    from megaopd.rollout.sglang.health import Endpoint
    from megaopd.weight_sync.carrier import Carrier

# Ranks that wait for servers wait in a collective, which has a time limit: rank 0 gives a sign.
SIGN_OF_LIFE_S = 60.0


class World(Protocol):
    """The processes that call an engine together, and this one's device."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def conversation(config: Config, inputs: Inputs) -> Converse:
    """What an engine does with a prompt: sample one response, or let the student call tools."""
    from megaopd.rollout.agent import Agent
    from megaopd.rollout.conversation import single_turn

    agent = config.rollout.agent
    return Agent(agent, inputs.tokenizer) if agent else single_turn


def embedded_engine(config: Config, inputs: Inputs, groups: ParallelGroups) -> RolloutEngine:
    from megaopd.models.build import DTYPES
    from megaopd.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(
        config.student.path,
        device=groups.device,
        dtype=DTYPES[config.student.dtype],
        batch_size=config.rollout.batch_size,
        converse=conversation(config, inputs),
        rank=groups.rank,
        world_size=groups.world_size,
    )


def recorded_engine(config: Config, inputs: Inputs, groups: ParallelGroups) -> RolloutEngine:
    from megaopd.rollout.recorded import RecordedEngine

    return RecordedEngine(config.rollout.path)


def sglang_engine(config: Config, inputs: Inputs, groups: ParallelGroups) -> RolloutEngine:
    """Servers at `rollout.urls`, or of our own."""
    vocab_size = inputs.student_arch.vocab_size
    return servers_engine(config, vocab_size, conversation(config, inputs), groups)


def servers_engine(
    config: Config,
    vocab_size: int,
    converse: Converse,
    world: World,
    *,
    with_transport: bool = True,
) -> RolloutEngine:
    """An engine over the servers at `rollout.urls`, or of our own; collective.

    Args:
        with_transport: weights come by `load_weights`; without it the servers keep theirs.
    """
    from megaopd.rollout.sglang.engine import SGLangEngine
    from megaopd.rollout.sglang.pool import Address

    rollout, servers = config.rollout, config.rollout.sglang
    fleet: ServerFleet | None = None
    endpoints: Sequence[Endpoint] = ()
    if rollout.launch:
        fleet = _start_servers(config, world)
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


def weight_sync(engine: RolloutEngine) -> WeightSync:
    """What keeps the weights of `engine` those of the student."""
    from megaopd.rollout.sglang.engine import SGLangEngine
    from megaopd.weight_sync.in_process import InProcessSync
    from megaopd.weight_sync.servers import ServerSync

    return ServerSync() if isinstance(engine, SGLangEngine) else InProcessSync()


# By rollout.kind. Collective.
ENGINES: dict[str, Callable[[Config, Inputs, ParallelGroups], RolloutEngine]] = {
    "embedded": embedded_engine,
    "recorded": recorded_engine,
    "sglang": sglang_engine,
}


def teacher_engine(
    own: TeacherConfig, config: Config, inputs: Inputs, groups: ParallelGroups
) -> RolloutEngine:
    """An engine that samples from a teacher, with the weights that it has at the start."""
    if own.kind == "sglang":
        from megaopd.rollout.sglang.engine import SGLangEngine
        from megaopd.rollout.sglang.pool import Address

        api_key = os.environ.get(own.api_key_env, "")
        return SGLangEngine(
            [Address(url.rstrip("/"), api_key, api_key) for url in own.urls],
            config=config.rollout.sglang,
            vocab_size=inputs.vocab_size,
            converse=conversation(config, inputs),
            rank=groups.rank,
            world_size=groups.world_size,
        )
    from megaopd.models.build import DTYPES

    return own_weights_engine(
        own.path or config.student.path,
        DTYPES[own.dtype],
        config.rollout.batch_size,
        conversation(config, inputs),
        groups,
    )


def mixture(
    config: Config, inputs: Inputs, groups: ParallelGroups, student: RolloutEngine
) -> Mixture:
    """Who answers the training prompts, with engines for the teachers among them; collective."""
    from megaopd.rollout.mixture import Mixture

    shares = config.rollout.mixture or MixtureConfig()
    asked = {prompt.teacher for prompt in inputs.train_prompts} if shares.teacher else set()
    with ExitStack() as started:
        teachers = {}
        for name in sorted(asked):
            engine = teacher_engine(teacher_configs(config)[name], config, inputs, groups)
            teachers[name] = started.enter_context(closing(engine))
        started.pop_all()
    return Mixture(shares, config.run.seed, student, teachers, inputs.responses)


def own_weights_engine(
    path: str, dtype: torch.dtype, batch_size: int, converse: Converse, world: World
) -> RolloutEngine:
    """An embedded engine with the weights of a directory of either format; collective.

    Raises:
        CheckpointError: they are damaged.
    """
    from megaopd.checkpoint.loading import verify_together
    from megaopd.rollout.embedded import EmbeddedEngine

    source, names = _source(path)
    verify_together(source.path)
    engine = EmbeddedEngine(
        path,
        device=world.device,
        dtype=dtype,
        batch_size=batch_size,
        converse=converse,
        rank=world.rank,
        world_size=world.world_size,
    )
    engine.load_weights(((name, source.read(name)) for name in names), version=0)
    return engine


def own_weights_servers(
    config: Config, vocab_size: int, converse: Converse, world: World
) -> RolloutEngine:
    """Servers with the weights of student.path; collective.

    Servers that are there already keep theirs, and so do ours that read them from a Hugging Face
    directory; they are sent those of a Megatron checkpoint.
    """
    from megaopd.storage.steps import is_megatron

    path = config.student.path
    sent = config.rollout.launch and is_megatron(path)
    engine = servers_engine(config, vocab_size, converse, world, with_transport=sent)
    if sent:
        source, names = _source(path)
        try:
            engine.load_weights(((name, source.read(name)) for name in names), version=0)
        except BaseException:
            engine.close()
            raise
    return engine


def _source(path: str) -> tuple[WeightSource, Sequence[str]]:
    """The weights at `path`, and their names."""
    from megaopd.checkpoint import open_weights
    from megaopd.models.arch import read_arch
    from megaopd.models.families import hf_shapes
    from megaopd.storage.steps import hf_directory

    return open_weights(path), list(hf_shapes(read_arch(hf_directory(path))))


def _start_servers(config: Config, world: World) -> ServerFleet | None:
    """Starts rank 0's servers and waits until they answer; collective. None on other ranks.

    Raises:
        RolloutError: on every rank alike: one of them did not start.
    """
    from megaopd.rollout.sglang.ranks import Ranks

    ranks = Ranks(world.rank, world.world_size)
    fleet = _fleet(config, world) if world.rank == 0 else None
    with ThreadPoolExecutor(max_workers=1) as starter:
        start = starter.submit(fleet.start) if fleet else None
        try:
            while not ranks.on_rank_0(lambda: start is not None and _is_done(start)):
                pass
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


def _fleet(config: Config, world: World) -> ServerFleet:
    """The servers of this host, not started yet.

    Raises:
        ConfigError: there are not so many GPUs.
    """
    from megaopd.rollout.sglang.flags import ServerSpec
    from megaopd.rollout.sglang.fleet import ServerFleet
    from megaopd.rollout.sglang.server import SGLangServer
    from megaopd.storage.steps import hf_directory

    servers = config.rollout.sglang
    # Beside the trainer's ranks of this host, or on the same devices.
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
