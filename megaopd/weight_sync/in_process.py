"""Weight sync to an engine in the trainer's own process: one gathered tensor at a time, no copy
kept."""

from __future__ import annotations

from megaopd.protocols import RolloutEngine, Student


class InProcessSync:
    """Implements `megaopd.protocols.WeightSync`.

    The first sync carries every tensor, later ones only those that are trained.
    """

    def __init__(self) -> None:
        self._complete = False

    def sync(self, student: Student, engine: RolloutEngine, version: int) -> None:
        """Collective. Afterwards the engine's samples carry `version`."""
        engine.load_weights(student.export_weights(only_trainable=self._complete), version)
        self._complete = True
