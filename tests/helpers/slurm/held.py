"""A reward that holds the run it is loaded into: for signals that must arrive in a certain phase.

$MEGAOPD_TEST_HOLD is a file. While it says "PHASE STEP", a rank that is in that phase of that step
waits there until it is told to stop; rank 0 writes FILE.reached when it does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaopd.interruption import INTERRUPTION
from megaopd.trainer import OPDTrainer, Watch

LONGEST_S = 60.0


def reward(response: str, answer: str | None) -> float:
    return float(bool(answer) and answer in response)


def hold(order: Path, phase: str, step: int) -> None:
    """Waits, if that is what `order` says."""
    asked = order.exists() and order.read_text() == f"{phase} {step}"
    if not asked or INTERRUPTION.requested:
        return
    if os.environ.get("RANK") == "0":
        reached_file(order).write_text(f"{phase} {step}")
    deadline = time.monotonic() + LONGEST_S
    while not INTERRUPTION.requested and time.monotonic() < deadline:
        time.sleep(0.02)


def reached_file(order: Path) -> Path:
    return order.with_name(f"{order.name}.reached")


def _holding(watch: Watch, order: Path) -> Watch:
    looked_at: set[int] = set()

    @contextmanager
    def watched(phase: str, step: int) -> Iterator[None]:
        with watch(phase, step):
            if phase != "checkpoint":
                hold(order, phase, step)
                yield
                return
            yield
            # Before a step's checkpoint is begun, that of another one is looked after.
            if step in looked_at:
                hold(order, phase, step)
            looked_at.add(step)

    return watched


def _install(order: Path) -> None:
    fit = OPDTrainer.fit

    def fit_with_holds(self: OPDTrainer) -> Any:
        self.watch = _holding(self.watch, order)
        return fit(self)

    OPDTrainer.fit = fit_with_holds  # type: ignore[method-assign]


if name := os.environ.get("MEGAOPD_TEST_HOLD"):
    _install(Path(name))
