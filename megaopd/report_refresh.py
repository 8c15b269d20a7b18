"""report.html while a run goes on: what there is so far, at a bounded share of the run's time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megaopd.errors import MegaOPDError
from megaopd.logger import get_logger
from megaopd.metrics_file import METRICS_FILE, Row, is_training, read_metrics
from megaopd.report import write_report

# A chart has no more points than it can show; neither does the file need to be read whole for it.
MOST_ROWS = 2000
# A refresh that took a second is followed by none for so many seconds.
PAUSE_PER_SECOND = 100.0
# Of a file of answers; those at its head are enough for the samples of the page.
MOST_BYTES = 4 << 20

YARDSTICKS = ("eval/reverse_kl", "eval/reverse_kl_lower_bound", "eval/reverse_kl_estimate")

logger = get_logger(__name__)


class RefreshedReport:
    """Writes RUN/report.html anew every `interval` steps and after evaluations, from metrics.jsonl.

    It never ends a run: what cannot be read or written is warned of.

    Args:
        run_dir: directory of the run.
        num_steps: steps of the whole run.
        interval: steps from one page to the next.
        num_samples: samples to show, of the evaluations whose answers are on disk.
        since: answers from before this time (seconds since the epoch) are another run's.
        clock: seconds that only increase.
    """

    def __init__(
        self,
        run_dir: Path,
        num_steps: int,
        interval: int,
        num_samples: int,
        since: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir, self._num_steps, self._interval = run_dir, num_steps, interval
        self._num_samples, self._since, self._clock = num_samples, since, clock
        self._not_before = -math.inf
        self._step: int | None = None
        self._warned = ""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Refreshes the page where it is time to; metrics.jsonl has the line of `step` already."""
        first, self._step = self._step is None, step
        due = first or step % self._interval == 0 or not is_training(metrics)
        if due and self._clock() >= self._not_before:
            started = self._clock()
            self._refresh(f"running, step {step} of {self._num_steps}")
            now = self._clock()
            self._not_before = now + PAUSE_PER_SECOND * (now - started)

    def close(self) -> None:
        """Says on the page that nothing more will come."""
        if self._step is not None:
            self._refresh(f"ended at step {self._step} of {self._num_steps}")

    def _refresh(self, state: str) -> None:
        try:
            rows = read_metrics(self._run_dir / METRICS_FILE, most=MOST_ROWS)
            samples = list(islice(self._samples(), self._num_samples))
            at = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            write_report(self._run_dir, figures_so_far(rows), samples, f"{state}, {at}", rows)
        except (OSError, MegaOPDError) as error:
            if str(error) != self._warned:
                logger.warning("report.html is not refreshed: %s", error)
            self._warned = str(error)

    def _samples(self) -> Iterator[dict[str, Any]]:
        """Answers before training and now, of the prompts that have either."""
        before, after = self._answers("before"), self._answers("after")
        for prompt_id, old in before.items():
            new = after.get(prompt_id, {})
            yield {
                "prompt": old.get("prompt_text"),
                "answer": old.get("answer"),
                "before": old.get("response_text"),
                "after": new.get("response_text", ""),
                "before_correct": old.get("correct"),
                "after_correct": new.get("correct"),
            }

    def _answers(self, when: str) -> dict[str, dict[str, Any]]:
        """The first answers of an evaluation by prompt id; nothing where there are none yet."""
        file = self._run_dir / f"eval_{when}.jsonl"
        found: dict[str, dict[str, Any]] = {}
        try:
            if file.stat().st_mtime < self._since:
                return {}
            with file.open("rb") as lines:
                while len(found) < self._num_samples and lines.tell() < MOST_BYTES:
                    row = json.loads(lines.readline(MOST_BYTES) or "null")
                    if row is None:
                        break
                    if row.get("index") == 0:
                        found[str(row.get("prompt_id"))] = row
        except FileNotFoundError:
            pass
        except (ValueError, AttributeError, RecursionError):
            logger.warning("%s: not answers of an evaluation; the report has fewer samples", file)
        return found


def figures_so_far(rows: Sequence[Row]) -> dict[str, Any]:
    """What summary.json of a run that ended now would hold of the figures that metrics tell."""
    steps = [row for row in rows if is_training(row)]
    times = [row["time/step_s"] for row in steps if "time/step_s" in row]
    done = max((row["step"] for row in steps), default=0)
    mismatches = [row["rollout/mismatch_kl"] for row in steps if "rollout/mismatch_kl" in row]
    accuracy = _series(rows, ("eval/accuracy",))
    reverse_kl = _series(rows, YARDSTICKS)
    teacher = _series(rows, ("eval/teacher_accuracy",))
    return {
        "teacher_accuracy": teacher[-1] if teacher else None,
        "student_accuracy_before": accuracy[0] if accuracy else None,
        "student_accuracy_after": accuracy[-1] if accuracy else None,
        "reverse_kl_before": reverse_kl[0] if reverse_kl else None,
        "reverse_kl_after": reverse_kl[-1] if reverse_kl else None,
        "num_steps": done,
        # Of the steps that were read, where these are not all.
        "train_wall_s": round(sum(times) / len(times) * done, 2) if times else None,
        "mismatch_kl_max": max(mismatches) if mismatches else None,
    }


def _series(rows: Sequence[Row], names: Sequence[str]) -> list[float]:
    """Values of the first of these metrics that a row has, row by row."""
    found = ([row[name] for name in names if name in row] for row in rows)
    return [values[0] for values in found if values]
