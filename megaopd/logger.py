"""What a run says on the console: log lines of rank 0, and one line of progress per step."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

_ROOT = "megaopd"


def get_logger(name: str = "") -> logging.Logger:
    """The package's logger, or the child for a module (pass ``__name__``)."""
    return logging.getLogger(name if name.startswith(_ROOT) else _ROOT)


def setup_logging(rank: int, level: int = logging.INFO, file: Path | None = None) -> None:
    """Sends the package's log to stderr: everything on rank 0, errors alone on the others.

    Other libraries' loggers are left alone. Calling it again replaces what the first call set up.

    Args:
        rank: this process's rank.
        level: least severity shown on rank 0.
        file: on rank 0, also append to this file; its directory is created.
    """
    logger = logging.getLogger(_ROOT)
    logger.propagate = False
    logger.setLevel(level if rank == 0 else logging.ERROR)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None and rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    origin = "" if rank == 0 else f" rank {rank}"
    for handler in handlers:
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s %(levelname).1s{origin} %(message)s", "%H:%M:%S")
        )
        logger.addHandler(handler)


class Progress:
    """One line per step with what a person watches, and the time that is left.

    The estimate is the mean of the last steps' durations, everything between two lines included, so
    evaluations and checkpoints count, except an evaluation before the first step.

    Args:
        num_steps: steps of the whole run.
        window: number of steps whose mean duration gives the estimate.
        clock: seconds that only increase.
    """

    def __init__(
        self, num_steps: int, window: int = 20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_steps = num_steps
        self._clock = clock
        self._ticks: deque[float] = deque([clock()], maxlen=window + 1)
        self._accuracy: float | None = None

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The line of a training step or an evaluation that has just ended.

        Args:
            step: the number of the step, from 1; 0 is before the first.
            metrics: of the step, with some `loss/...`, or of an evaluation, without any; what is
                absent is left out. The last `eval/accuracy` is repeated in the lines of the steps.
        """
        self._accuracy = metrics.get("eval/accuracy", self._accuracy)
        head = f"{step:>{len(str(self.num_steps))}}/{self.num_steps}"
        if not any(name.startswith("loss/") for name in metrics):
            if step == 0:
                self._ticks[-1] = self._clock()
            return " | ".join([f"eval {head}", *_parts(metrics, _EVAL_PARTS)])
        self._ticks.append(self._clock())
        if len(self._ticks) == 2 and "time/step_s" in metrics:
            # What lies before the first step, such as loading models, is no step's.
            self._ticks[0] = max(self._ticks[0], self._ticks[1] - metrics["time/step_s"])
        last_s = self._ticks[-1] - self._ticks[-2]
        mean_s = (self._ticks[-1] - self._ticks[0]) / (len(self._ticks) - 1)
        shown = dict(metrics)
        if self._accuracy is not None:
            shown["eval/accuracy"] = self._accuracy
        shown.setdefault("time/step_s", last_s)
        parts = [f"step {head}", *_parts(shown, _STEP_PARTS)]
        parts.append(f"ETA {format_duration(mean_s * (self.num_steps - step))}")
        if metrics.get("train/skipped"):
            parts.append("SKIPPED: not finite")
        return " | ".join(parts)


# Metric and how the line shows it.
_STEP_PARTS = {
    "loss/divergence": "loss {:.4f}",
    "loss/policy_gradient": "PG {:.4f}",
    "loss/likelihood": "NLL {:.4f}",
    "credit/reward_mean": "reward {:.3f}",
    "eval/accuracy": "acc {:.3f}",
    "train/lr": "lr {:.2e}",
    "train/grad_norm": "grad {:.3f}",
    "perf/tokens_per_s": "{:,.0f} tok/s",
    "time/step_s": "{:.2f} s/step",
}
_EVAL_PARTS = {
    "eval/accuracy": "acc {:.3f}",
    "eval/teacher_accuracy": "teacher's acc {:.3f}",
    "eval/reverse_kl": "reverse KL {:.4f}",
    "eval/reverse_kl_lower_bound": "reverse KL >= {:.4f}",
    "eval/reverse_kl_estimate": "reverse KL ~ {:.4f}",
    "time/eval_s": "{:.2f} s",
}


def _parts(metrics: Mapping[str, float], forms: Mapping[str, str]) -> list[str]:
    return [form.format(metrics[name]) for name, form in forms.items() if name in metrics]


def format_duration(seconds: float) -> str:
    """Seconds as ``42s``, ``3m05s``, ``2h07m`` or ``3d04h``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"
