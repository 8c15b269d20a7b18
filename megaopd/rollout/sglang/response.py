"""One response under way: the pieces it has so far, and how it goes on after a cut."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from megaopd.batch import Completion
from megaopd.rollout.sglang.answers import append, is_whole, settled
from megaopd.rollout.sglang.api import (
    CUT,
    UNKNOWN_VERSION,
    BadAnswer,
    GenerateRequest,
    ServerFault,
)
from megaopd.rollout.sglang.client import ServerClient

# After a cut without one token: somebody aborts all there is.
CUT_PAUSE_S = 0.5


class Response:
    """Grows by what servers answer, piece by piece, until it is whole.

    Args:
        request: what is asked for.
        vocab_size: ids from this on are no tokens.
        published: tells the version of the weights that samples must come from; None takes any.
        partial: whether a response that was cut may go on under other weights; if not, it starts
            again.
        counters: "cuts" are counted here.

    Attributes:
        done: what there is so far, None if nothing.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        vocab_size: int,
        published: Callable[[], int | None],
        partial: bool,
        counters: Counter[str],
    ) -> None:
        self.done: Completion | None = None
        self._request = request
        self._vocab_size = vocab_size
        self._published = published
        self._partial = partial
        self._counters = counters

    async def go_on(self, client: ServerClient) -> None:
        """Has one server continue it.

        Raises:
            RequestRejected, RolloutError: see `ServerClient.generate`.
            ServerFault: no whole piece came; what did come and can be trusted is kept.
        """
        if is_whole(self.done):
            return
        # Only now is it known which weights go on with it.
        if self.done is not None and not self._may_be_continued(self.done):
            self.done = None
        expected = client.version
        try:
            part = await client.generate(self._request.rest(self.done))
            self._check(part, client, expected)
        except ServerFault as fault:
            if fault.partial is not None and self._is_trusted(fault.partial, client, expected):
                self._append(fault.partial)
            raise
        self._append(part)
        if part.finish_reason == CUT:
            self._counters["cuts"] += 1
            if not part.ids:
                await asyncio.sleep(CUT_PAUSE_S)

    def _append(self, part: Completion) -> None:
        self.done = settled(append(self.done, part), self._request)

    def _may_be_continued(self, done: Completion) -> bool:
        return self._partial or set(done.versions) <= {self._published()}

    def _check(self, part: Completion, client: ServerClient, expected: int) -> None:
        """What a server says must be of our vocabulary, and of the weights that it should have.

        Raises:
            BadAnswer: it is not; one with other weights samples no more.
        """
        oldest = min(part.versions, default=expected)
        if self._published() is not None and oldest < expected:
            # Somebody restarted it, say.
            client.version = UNKNOWN_VERSION
            raise BadAnswer(f"{client.url}: version {oldest} sampled, not {expected}")
        if max(part.ids, default=0) >= self._vocab_size or min(part.ids, default=0) < 0:
            raise BadAnswer(f"{client.url}: token ids outside the vocabulary")

    def _is_trusted(self, part: Completion, client: ServerClient, expected: int) -> bool:
        try:
            self._check(part, client, expected)
        except BadAnswer:
            return False
        return True
