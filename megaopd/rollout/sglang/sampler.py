"""Rank 0's part of a rollout: the responses to all of its prompts, and what happened on the way."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from megaopd.batch import Completion, Prompt, SamplingParams
from megaopd.logger import get_logger
from megaopd.rollout.conversation import Conversation, Converse, mean_metrics
from megaopd.rollout.sglang.api import GenerateRequest, RequestRejected
from megaopd.rollout.sglang.colocated import ColocatedMemory
from megaopd.rollout.sglang.pool import ServerPool

logger = get_logger(__name__)


@dataclass(frozen=True)
class Rejected:
    """Instead of a conversation: a server says that the prompt is wrong in itself."""

    why: str


Answer = Conversation | Rejected


class Sampler:
    """Holds conversations over a pool. Coroutines belong to its event loop.

    Args:
        converse: what is done with a prompt.
        memory: of colocated servers; None if they are not.
    """

    def __init__(
        self, pool: ServerPool, converse: Converse, memory: ColocatedMemory | None
    ) -> None:
        self._pool = pool
        self._converse = converse
        self._memory = memory
        self._num_rollouts = 0
        self._counted: dict[str, int] = {}

    async def sample_all(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Answer]:
        """All responses, ordered by prompt then index.

        Raises:
            RolloutError: see `ServerPool.complete`.
        """
        self._num_rollouts += 1
        rollout = self._num_rollouts
        async with self._memory.lent(self._pool) if self._memory else nullcontext():
            tasks = [
                asyncio.create_task(self._sample(prompt, index, params, rollout))
                for prompt in prompts
                for index in range(params.n)
            ]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    async def _sample(
        self, prompt: Prompt, index: int, params: SamplingParams, rollout: int
    ) -> Answer:
        name = f"{prompt.prompt_id}/{index}"
        whole = GenerateRequest(
            input_ids=prompt.token_ids,
            params=params,
            seed=sample_seed(params.seed, name),
            name=f"sample {name}",
            affinity=(rollout, prompt.prompt_id),
        )

        async def complete(token_ids: tuple[int, ...], max_new_tokens: int) -> Completion:
            asked = replace(params, max_new_tokens=max_new_tokens)
            return await self._pool.complete(replace(whole, input_ids=token_ids, params=asked))

        try:
            return await self._converse(complete, prompt, index, params)
        except RequestRejected as rejected:
            logger.warning("prompt %s is set aside: %s", prompt.prompt_id, rejected)
            return Rejected(str(rejected))

    def metrics(self, answers: Sequence[Answer], params: SamplingParams) -> dict[str, float]:
        """What there is to tell of a rollout; counters are those since the last call."""
        counters, before = dict(self._pool.counters), self._counted
        self._counted = counters
        metrics = {
            f"rollout/{name}": float(counters.get(name, 0) - before.get(name, 0))
            for name in ("retries", "cuts", "servers_lost", "servers_back")
        }
        metrics["rollout/servers_up"] = float(len(self._pool.up()))
        aside = {i // params.n for i, answer in enumerate(answers) if isinstance(answer, Rejected)}
        good = [answer for answer in answers if isinstance(answer, Conversation)]
        return {**metrics, **mean_metrics(good), "rollout/set_aside": float(len(aside))}


def sample_seed(seed: int, name: str) -> int:
    """The seed of one sample: 31 bits of the rollout's seed and the sample's name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
