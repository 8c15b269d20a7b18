"""What the main thread is at, and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megaopd.config_reliability import DeadlineConfig

PHASES = ("start", "rollout", "teacher", "student", "weight_sync", "eval", "checkpoint")
"""Those with a deadline, `DeadlineConfig.{phase}_s`."""


@dataclass(frozen=True)
class Place:
    """A phase, the step that it belongs to (0 is before the first), and the seconds in it."""

    phase: str = ""
    step: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if not self.phase:
            return "no phase"
        return f"phase {self.phase}" + (f" of step {self.step}" if self.step else "")


@dataclass
class _Open:
    phase: str
    step: int
    since: float


class Phases:
    """Phases that the main thread has entered and not left; a second thread reads them."""

    def __init__(self, config: DeadlineConfig) -> None:
        self._limits = {phase: getattr(config, f"{phase}_s") for phase in PHASES}
        self._open: list[_Open] = []
        self._error: BaseException | None = None
        self._broken = Place()

    @contextmanager
    def enter(self, phase: str, step: int) -> Iterator[None]:
        """The block is a phase; the one around it goes on counting."""
        self._open.append(_Open(phase, step, time.monotonic()))
        try:
            yield
        except BaseException as error:
            # Phases around it are left with the same error.
            if error is not self._error:
                self._error, self._broken = error, self.place()
            raise
        finally:
            self._open.pop()

    def place(self, error: BaseException | None = None) -> Place:
        """The innermost phase; of an `error`, the innermost that it came out of."""
        if error is not None and error is self._error:
            return self._broken
        return next((_place(entered) for entered in self._open[-1:]), Place())

    def overdue(self) -> tuple[Place, float] | None:
        """The outermost phase that is past its deadline, and the deadline."""
        for entered in tuple(self._open):
            place, limit = _place(entered), self._limits.get(entered.phase, 0.0)
            if limit and place.seconds > limit:
                return place, limit
        return None


def _place(entered: _Open) -> Place:
    return Place(entered.phase, entered.step, time.monotonic() - entered.since)
