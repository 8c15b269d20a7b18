"""Many conversations over a model that answers batches.

The model is asked when every conversation that has not ended waits for it: what is batched
together, and with it the last bits of log-probabilities, does not depend on how long tools take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megaopd.batch import Completion, Prompt, SamplingParams
from megaopd.rollout.conversation import Conversation, Converse

Job = tuple[Prompt, int]
"""A prompt and the index of one of its samples."""


@dataclass(frozen=True)
class Request:
    """What a conversation asks the model for.

    Attributes:
        prompt, index: of the sample.
        token_ids: the prompt and the response so far.
        max_new_tokens: longest completion.
    """

    prompt: Prompt
    index: int
    token_ids: tuple[int, ...]
    max_new_tokens: int

    @property
    def position(self) -> int:
        """In the response, of the first new token."""
        return len(self.token_ids) - len(self.prompt.token_ids)


Answer = Callable[[Sequence[Request]], Sequence[Completion]]
"""One completion per request, in order."""


def hold_conversations(
    converse: Converse, jobs: Sequence[Job], params: SamplingParams, answer: Answer
) -> list[Conversation]:
    """Holds all conversations of `jobs` at once and returns them in order.

    Whatever `converse` or `answer` raises ends them all and is raised.
    """
    return asyncio.run(_hold_all(converse, jobs, params, answer))


async def _hold_all(
    converse: Converse, jobs: Sequence[Job], params: SamplingParams, answer: Answer
) -> list[Conversation]:
    waiting: list[tuple[Request, asyncio.Future[Completion]]] = []
    num_going_on = len(jobs)

    def answer_if_all_wait() -> None:
        if not waiting or len(waiting) < num_going_on:
            return
        batch = waiting.copy()
        waiting.clear()
        completions = answer([request for request, _ in batch])
        for (_, future), completion in zip(batch, completions, strict=True):
            future.set_result(completion)

    async def hold(prompt: Prompt, index: int) -> Conversation:
        nonlocal num_going_on

        async def complete(token_ids: tuple[int, ...], max_new_tokens: int) -> Completion:
            future = asyncio.get_running_loop().create_future()
            waiting.append((Request(prompt, index, token_ids, max_new_tokens), future))
            answer_if_all_wait()
            return await future

        conversation = await converse(complete, prompt, index, params)
        num_going_on -= 1
        answer_if_all_wait()
        return conversation

    tasks = [asyncio.create_task(hold(prompt, index)) for prompt, index in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
