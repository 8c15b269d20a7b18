"""The pending rollout of an engine that can do nothing in the background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.protocols import RolloutEngine


@dataclass(frozen=True)
class DeferredRollout:
    """Implements `megaopd.protocols.PendingRollout`: sampled when the result is asked for, with the
    weights that the engine has then."""

    engine: RolloutEngine
    prompts: Sequence[Prompt]
    params: SamplingParams

    def result(self) -> list[Sample]:
        return self.engine.generate(self.prompts, self.params)

    def take(self) -> None:
        """Nothing is there before the result is asked for."""

    def give_up(self) -> None:
        """Nothing is under way."""
