"""The rollout engine on SGLang servers.

Rank 0 alone talks to the servers, from an event loop in a thread of its own, so that generation
goes on while the trainer computes; results, or the error, are broadcast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.config import SGLangConfig
from megaopd.errors import RolloutError
from megaopd.interruption import never, stopped
from megaopd.rollout.conversation import Conversation, Converse, single_turn
from megaopd.rollout.sampling import check_sampling_params
from megaopd.rollout.sglang.api import check_token_ids
from megaopd.rollout.sglang.colocated import ColocatedMemory
from megaopd.rollout.sglang.health import ALL_DOWN_S, Endpoint, Restarter
from megaopd.rollout.sglang.loop import EventLoopThread
from megaopd.rollout.sglang.pool import ServerPool
from megaopd.rollout.sglang.ranks import Ranks
from megaopd.rollout.sglang.sampler import Answer, Sampler

T = TypeVar("T")

POLL_S = 0.2
# Other ranks wait in a collective, which has a time limit of its own: they hear from rank 0. One
# that was told to stop can say so then.
SIGN_OF_LIFE_S = 5.0
# Between two attempts to bring servers that were restarted up to date.
REFRESH_EVERY_S = 10.0


class WeightTransport(Protocol):
    """Carries weights to the servers of an engine; see `pool` for the steps."""

    def send(
        self, engine: SGLangEngine, weights: Iterator[tuple[str, Tensor]], version: int
    ) -> None:
        """Collective: all ranks consume `weights`; afterwards the servers that took them carry
        `version`, and the pool's version is `version`.

        Raises:
            RolloutError: on all ranks alike: no server took them.
        """
        ...

    def close(self, engine: SGLangEngine) -> None:
        """Gives up what is shared with servers; on rank 0."""
        ...


@dataclass
class PendingSamples:
    """A rollout under way; implements `megaopd.protocols.PendingRollout`.

    Attributes:
        work, future: rank 0's: what samples, and what becomes of it.
        answered: all answers and the metrics of the rollout, once the ranks have heard of them.
    """

    engine: SGLangEngine
    prompts: Sequence[Prompt]
    params: SamplingParams
    work: Coroutine[Any, Any, list[Answer]] | None
    future: Future[list[Answer]] | None
    answered: tuple[list[Answer], dict[str, float]] | None = None

    def result(self) -> list[Sample]:
        return self.engine.finish(self)

    def take(self) -> list[Sample] | None:
        return self.engine.take(self)

    def give_up(self) -> None:
        self.engine.give_up(self)


class SGLangEngine:
    """A `RolloutEngine` over servers that run already.

    Args:
        endpoints: the servers; other ranks than 0 do not look at them.
        config: how to talk to them.
        vocab_size: of the model.
        converse: what is done with a prompt; by default one response is sampled.
        partial: see `ServerPool`.
        transport: how `load_weights` brings weights to them; None: they keep those they have, which
            are version 0.
        stop_reason: why this process is to stop; while a result is waited for, a reason on some
            rank makes all of them give the rollout up.
        restarter: of servers that this run started; also stops them at the end.
        rank, world_size, group: of the processes that call the engine together.

    Attributes:
        ranks: the processes that call the engine together.
        transport: see the argument.
        pool: rank 0's servers, None on other ranks; it belongs to the event loop, see `run`.
        refresh: collective; brings the current weights to `pool.stale()`. It is called while a
            result is waited for, when a server came back without them. None: such a server
            samples nothing before the next `load_weights`.

    Raises:
        RolloutError: on all ranks alike: a server does not answer, or refuses our key.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        config: SGLangConfig,
        vocab_size: int,
        converse: Converse = single_turn,
        partial: bool = True,
        transport: WeightTransport | None = None,
        restarter: Restarter | None = None,
        stop_reason: Callable[[], str | None] = never,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.weight_version = 0 if transport is None else -1
        self.metrics: dict[str, float] = {}
        self.refresh: Callable[[], None] | None = None
        self.pool: ServerPool | None = None
        self.ranks = Ranks(rank, world_size, group)
        self._config = config
        self._vocab_size = vocab_size
        self._converse = converse
        self.transport = transport
        self._restarter = restarter
        self._stop_reason = stop_reason
        self._refresh_at = 0.0
        self._loop: EventLoopThread | None = None
        # Servers that keep their weights are another's; their memory is none of our business.
        colocated = config.colocated and transport is not None
        self._memory = ColocatedMemory() if colocated else None
        self._sampler: Sampler | None = None
        self._max_request_tokens = self.ranks.on_rank_0(
            lambda: self._connect(endpoints, partial, restarter)
        )

    def _connect(
        self, endpoints: Sequence[Endpoint], partial: bool, restarter: Restarter | None
    ) -> int:
        config = self._config
        self._loop = EventLoopThread()
        self.pool = ServerPool(
            endpoints,
            vocab_size=self._vocab_size,
            restarter=restarter,
            max_tokens_in_flight=config.max_tokens_in_flight,
            progress_timeout_s=config.progress_timeout_s,
            health_interval_s=config.health_interval_s,
            max_retries=config.max_retries,
            partial=partial,
            settle=self._memory.settle if self._memory else None,
        )
        self._sampler = Sampler(self.pool, self._converse, self._memory)
        try:
            self.run(self.pool.start())
        except RolloutError:
            self._loop.close()
            raise
        return self.pool.max_request_tokens

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Waits for a coroutine that uses `pool`; on rank 0 alone."""
        assert self._loop is not None
        return self._loop.run(coroutine)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine that uses `pool`; on rank 0 alone."""
        assert self._loop is not None
        return self._loop.submit(coroutine)

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Brings (Hugging Face name, full tensor) pairs to the servers; collective.

        Raises:
            RolloutError: no server took them, or this engine has no transport.
        """
        if self.transport is None:
            raise RolloutError("rollout engine", "it has no way to send weights", "give it one")
        self.weight_version = -1
        if self._memory is not None and self.pool is not None:
            self.run(self._memory.for_weights(self.pool))
        self.transport.send(self, weights, version)
        self.weight_version = version

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        """Samples `params.n` responses per prompt; collective.

        A prompt that a server rejects is set aside: it has no samples, and is counted in
        `metrics`.

        Raises:
            RolloutError: on every rank alike: bad parameters or prompts, no weights yet, all
                servers down, a request that failed too often, or a model whose probabilities are
                not finite.
            StopRequested: on every rank alike: one of them was told to stop.
        """
        return self.start(prompts, params).result()

    def start(self, prompts: Sequence[Prompt], params: SamplingParams) -> PendingSamples:
        """Begins to sample in the background; `result` of what it returns is collective.

        Raises:
            RolloutError: on every rank alike: bad parameters or prompts, no weights yet.
        """
        self._check(prompts, params)
        work = future = None
        if self._sampler is not None:
            work = self._sampler.sample_all(prompts, params)
            future = self.submit(work)
        return PendingSamples(self, prompts, params, work, future)

    def finish(self, pending: PendingSamples) -> list[Sample]:
        """`PendingSamples.result`."""
        while pending.answered is None:
            kind, value = self.ranks.broadcast(self._await_news(pending))
            if kind == "refresh":
                assert self.refresh is not None
                self.refresh()
            elif kind == "failed":
                raise value
            elif kind == "done":
                pending.answered = value
            elif (reason := self.ranks.first(self._stop_reason())) is not None:
                self.give_up(pending)
                raise stopped(reason, "a rollout")
        return self._samples(pending)

    def take(self, pending: PendingSamples) -> list[Sample] | None:
        """`PendingSamples.take`."""
        if pending.answered is None:
            pending.answered = self.ranks.broadcast(self._answers_there(pending))
        return None if pending.answered is None else self._samples(pending)

    def give_up(self, pending: PendingSamples) -> None:
        """`PendingSamples.give_up`."""
        self.ranks.on_rank_0(lambda: self._end(pending))

    def close(self) -> None:
        """Gives up what is under way, closes the connections, stops servers that we started."""
        try:
            if self._loop is not None and self.pool is not None:
                if self.transport is not None:
                    self.transport.close(self)
                self.run(self.pool.close())
                self._loop.close()
                self._loop = None
        finally:
            if self._restarter is not None:
                self._restarter.stop()

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        check_sampling_params(params)
        if self.weight_version < 0:
            raise RolloutError(
                "rollout engine", "it has no complete weights", "load weights before generating"
            )
        limit = self._max_request_tokens
        for prompt in prompts:
            where, length = f"prompt {prompt.prompt_id}", len(prompt.token_ids)
            check_token_ids(prompt.token_ids, self._vocab_size, where)
            if limit and length + params.max_new_tokens > limit:
                found = f"{length} + {params.max_new_tokens} new tokens exceed the context {limit}"
                raise RolloutError(where, found, "shorten the prompt or the response")

    # On rank 0.

    def _await_news(self, pending: PendingSamples) -> tuple[str, Any]:
        """Waits until the other ranks have something to hear: (kind, value)."""
        future, pool = pending.future, self.pool
        if future is None or pool is None or self._sampler is None:
            return "", None
        until = time.monotonic() + SIGN_OF_LIFE_S
        fed_at = time.monotonic()
        while time.monotonic() < until:
            if future.done() or not _times_out(future):
                try:
                    future.result()
                except RolloutError as error:
                    return "failed", error
                return "done", self._answers_there(pending)
            if self._stop_reason() is not None:
                break
            if self.refresh is not None and pool.stale() and time.monotonic() >= self._refresh_at:
                self._refresh_at = time.monotonic() + REFRESH_EVERY_S
                return "refresh", None
            if not pool.starved():
                fed_at = time.monotonic()
            elif time.monotonic() - fed_at > ALL_DOWN_S:
                found = f"none that is up has the weights of version {pool.version}"
                return "failed", RolloutError("rollout servers", found, "look at their logs")
        return "wait", None

    def _answers_there(
        self, pending: PendingSamples
    ) -> tuple[list[Answer], dict[str, float]] | None:
        """All answers and their metrics; None where some are not there, or there are none."""
        future = pending.future
        if future is None or self._sampler is None or not future.done() or future.cancelled():
            return None
        if future.exception() is not None:
            return None
        answers = future.result()
        return answers, self._sampler.metrics(answers, pending.params)

    def _end(self, pending: PendingSamples) -> None:
        if self._loop is not None and pending.work is not None:
            self._loop.give_up(pending.work)

    # On every rank.

    def _samples(self, pending: PendingSamples) -> list[Sample]:
        assert pending.answered is not None
        answers, self.metrics = pending.answered
        samples, n = [], pending.params.n
        version = self.weight_version if self.transport is None else None
        for p, prompt in enumerate(pending.prompts):
            group = answers[p * n : (p + 1) * n]
            good = [answer for answer in group if isinstance(answer, Conversation)]
            if len(good) == n:
                samples += [c.sample(prompt, i, version) for i, c in enumerate(good)]
        return samples


def _times_out(future: Future[Any]) -> bool:
    """Whether a future is still not done after a moment."""
    try:
        future.exception(timeout=POLL_S)
    except TimeoutError:
        return True
    return False
