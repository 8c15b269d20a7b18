"""How often the student solves a prompt: an estimate that runs on across epochs and resumes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megaopd.batch import Sample

# Of a prompt that the student has never answered.
_UNKNOWN = 0.5


class PassRates:
    """Passes over trials of each prompt, of which older ones count less.

    When a prompt comes up again, what was counted is multiplied by `memory` first: 0 keeps the
    newest samples alone, 1 counts all that ever were.
    """

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self._counts: dict[str, tuple[float, float]] = {}

    def update(self, samples: Iterable[Sample], rewards: Iterable[float]) -> None:
        """Counts the student's own samples; a reward in [0, 1] is that share of a pass."""
        new: dict[str, list[float]] = {}
        for sample, reward in zip(samples, rewards, strict=True):
            if sample.source == "student":
                new.setdefault(sample.prompt.prompt_id, []).append(min(max(reward, 0.0), 1.0))
        for prompt_id, found in new.items():
            passes, trials = self._counts.get(prompt_id, (0.0, 0.0))
            self._counts[prompt_id] = (
                self.memory * passes + sum(found),
                self.memory * trials + len(found),
            )

    def __getitem__(self, prompt_id: str) -> float:
        passes, trials = self._counts.get(prompt_id, (_UNKNOWN, 1.0))
        return passes / trials

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers by prompt id: (passes, trials)."""
        return {"counts": {prompt_id: list(pair) for prompt_id, pair in self._counts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`'s; forgets what was counted here."""
        self._counts = {p: (float(a), float(b)) for p, (a, b) in state["counts"].items()}
