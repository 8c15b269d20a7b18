"""Watches the numbers of a run: warns of a step past a bound, ends a run that stays past it."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from megaopd.config import GuardConfig
from megaopd.errors import NumericError
from megaopd.logger import get_logger

logger = get_logger(__name__)

# What is trained on, by whichever name the objective has for it.
LOSSES = ("loss/divergence", "loss/likelihood", "loss/estimator")
MISMATCH = "rollout/mismatch_kl"
_SKIPPED = "skipped"
_REMEDIES = {
    "loss": "look at report.html and the samples of these steps; lower optimizer.lr, or raise "
    "guard.loss_spike",
    MISMATCH: "trainer and engine disagree on what was sampled: check the weight sync and the "
    "engine's dtype with megaopd.verify, or raise guard.mismatch_kl",
}


class Guard:
    """Decides by the metrics alone, which are equal on every rank: so do all ranks.

    Staleness has a hard bound elsewhere, `rollout.max_staleness`: a sample past it is never trained
    on.

    Args:
        config: the bounds.
        max_skipped: steps in a row without a finite loss and gradient that end the run.
    """

    def __init__(self, config: GuardConfig, max_skipped: int = 3) -> None:
        self.config, self.max_skipped = config, max_skipped
        self._losses: deque[float] = deque(maxlen=config.window)
        self._in_a_row: dict[str, int] = {}

    def skipped(self, step: int, sample_ids: Sequence[str]) -> None:
        """Takes note of a step that was left out because something was not finite.

        Args:
            sample_ids: whose loss it was, or all of the step's.

        Raises:
            NumericError: it is the `max_skipped`-th in a row.
        """
        self._in_a_row[_SKIPPED] = count = self._in_a_row.get(_SKIPPED, 0) + 1
        logger.warning(
            "step %d skipped: loss or gradient is not finite; samples %s",
            *(step, ", ".join(sample_ids)),
        )
        if count >= self.max_skipped:
            raise NumericError(
                f"step {step}",
                f"loss or gradient not finite {count} steps in a row, "
                f"last with samples {', '.join(sample_ids[:8])}",
                "lower optimizer.lr, or look at these samples and at the teacher's weights",
            )

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Looks at a step that was not skipped.

        Raises:
            NumericError: `guard.patience` steps in a row were past the same bound.
        """
        self._in_a_row[_SKIPPED] = 0
        loss = next((metrics[name] for name in LOSSES if name in metrics), None)
        if loss is not None:
            bound, median = self._loss_bound()
            self._judge(
                *("loss", step, loss, bound),
                f"guard.loss_spike {self.config.loss_spike:g} x the median {median:.4g} of the "
                f"last {len(self._losses)} steps",
            )
            # What lies past the bound does not move it.
            if loss <= bound:
                self._losses.append(loss)
        if MISMATCH in metrics:
            bound = self.config.mismatch_kl or float("inf")
            self._judge(MISMATCH, step, metrics[MISMATCH], bound, f"guard.mismatch_kl {bound:g}")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as an unbroken one, JSON-compatible."""
        return {"losses": list(self._losses), "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`'s."""
        self._losses = deque(state["losses"], maxlen=self.config.window)
        self._in_a_row = {name: int(count) for name, count in state["in_a_row"].items()}

    def _loss_bound(self) -> tuple[float, float]:
        """(bound, median)."""
        enough = len(self._losses) >= max(2, self.config.window // 2)
        median = statistics.median(self._losses) if self._losses else 0.0
        # A loss at 0 may be off 0 by rounding, and an estimate of one below it.
        if not (self.config.loss_spike and enough and median > 1e-6):
            return float("inf"), median
        return self.config.loss_spike * median, median

    def _judge(self, name: str, step: int, value: float, bound: float, said: str) -> None:
        if value <= bound:
            self._in_a_row[name] = 0
            return
        self._in_a_row[name] = count = self._in_a_row.get(name, 0) + 1
        patience = self.config.patience
        logger.warning("step %d: %s %.4g is above %s (%d in a row)", step, name, value, said, count)
        if patience and count >= patience:
            raise NumericError(
                f"step {step}",
                f"{name} {value:.4g} is above {said}, {count} steps in a row",
                _REMEDIES[name],
            )
