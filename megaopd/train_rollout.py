"""Where samples come from: the engines of student and teachers, by configuration.

The part of `megaopd.train` that knows the classes of rollout and weight sync; an evaluation of a
model that is not in training asks here for an engine as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from megaopd.config import Config, MixtureConfig, TeacherConfig
from megaopd.inputs import Inputs, teacher_configs
from megaopd.interruption import reason_to_stop
from megaopd.train_servers import World, servers_engine

if TYPE_CHECKING:
    import torch

    from megaopd.models.hf_io.source import WeightSource
    from megaopd.parallel.groups import ParallelGroups
    from megaopd.protocols import RolloutEngine, WeightSync
    from megaopd.rollout.conversation import Converse
    from megaopd.rollout.mixture import Mixture


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
        stop_reason=reason_to_stop,
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
            stop_reason=reason_to_stop,
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
        stop_reason=reason_to_stop,
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
    # Nothing of ours runs on a GPU: all of them are the servers'.
    engine = servers_engine(config, vocab_size, converse, world, with_transport=sent, first_gpu=0)
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
