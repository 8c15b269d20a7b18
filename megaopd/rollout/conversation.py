"""What an engine samples for one prompt, and the one way of it that needs no tools.

A conversation is made by a coroutine function that asks the model as often as it wants through
`complete`, and adds tokens of its own in between. Engines run it; they do not know what it does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megaopd.batch import Completion, Prompt, Sample, SamplingParams

Complete = Callable[[tuple[int, ...], int], Awaitable[Completion]]
"""`await complete(token_ids, max_new_tokens)`: what the model adds to `token_ids`, with the
temperature and the stop tokens of the rollout."""


@dataclass(frozen=True)
class Conversation:
    """Everything after the prompt.

    Attributes:
        ids: R token ids.
        logprobs: R log-probabilities, 0 where the model did not produce the token.
        mask: R flags, False there.
        versions: R weight versions; off the mask they mean nothing.
        finish_reason: "stop" or "length".
        metrics: name -> value; engines report the means over a rollout.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    mask: tuple[bool, ...]
    versions: tuple[int, ...]
    finish_reason: str
    metrics: Mapping[str, float] = field(default_factory=dict)

    def sample(self, prompt: Prompt, index: int, weight_version: int | None = None) -> Sample:
        """As a sample of `prompt`; a `weight_version` replaces those of the tokens."""
        own = {v for v, mine in zip(self.versions, self.mask, strict=True) if mine}
        if weight_version is not None:
            own = {weight_version}
        return Sample(
            prompt=prompt,
            index=index,
            response_ids=self.ids,
            response_logprobs=self.logprobs,
            response_mask=self.mask,
            finish_reason=self.finish_reason,
            weight_version=min(own, default=0),
            token_versions=self.versions if len(own) > 1 else (),
        )


class Converse(Protocol):
    """Holds the conversation of sample `index` of `prompt`; at most `params.max_new_tokens`."""

    async def __call__(
        self, complete: Complete, prompt: Prompt, index: int, params: SamplingParams
    ) -> Conversation: ...


async def single_turn(
    complete: Complete, prompt: Prompt, index: int, params: SamplingParams
) -> Conversation:
    """One response, and no more."""
    done = await complete(prompt.token_ids, params.max_new_tokens)
    mask = (True,) * len(done.ids)
    return Conversation(done.ids, done.logprobs, mask, done.versions, done.finish_reason)


def mean_metrics(conversations: Sequence[Conversation]) -> dict[str, float]:
    """The mean of each metric over the conversations that have it."""
    values: dict[str, list[float]] = {}
    for conversation in conversations:
        for name, value in conversation.metrics.items():
            values.setdefault(name, []).append(value)
    return {name: sum(of_one) / len(of_one) for name, of_one in values.items()}
