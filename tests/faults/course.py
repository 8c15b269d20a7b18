"""Runs of the fault suite, and what two of them have in common."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaopd.storage.steps import complete_steps, step_directory
from tests.helpers.checkpoints import stored_tensors
from tests.helpers.processes import Ranks
from tests.helpers.tiny_models import TINY_CONFIG

NUM_RANKS = 2
OPTIONS = (
    *("data.eval=", "eval.teacher=false", "rollout.max_new_tokens=4", "log.report_interval=0"),
    *("checkpoint.interval=2", "optimizer.lr=0.01"),
)
GOING_ON = re.compile(r"going on from \S+: step (\d+) is done")
# A rank that dies or hangs has ended the run by then.
NOTICED_S = 60.0

Figures = dict[int, tuple[float, float]]


def figures(run_dir: Path) -> Figures:
    """(loss, gradient norm) by step, as far as the run has come; with all their digits."""
    file = run_dir / "metrics.jsonl"
    # A line that is being written has no end yet.
    lines = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    rows = [row for row in map(json.loads, lines) if "train/grad_norm" in row]
    return {row["step"]: (row["loss/divergence"], row["train/grad_norm"]) for row in rows}


def weights(run_dir: Path) -> tuple[int, str]:
    """(step, SHA-256 of all tensors) of the newest checkpoint: weights, main weights, moments."""
    step = complete_steps(run_dir / "checkpoints")[-1]
    directory = step_directory(run_dir / "checkpoints", step)
    digest = hashlib.sha256()
    tensors = stored_tensors(directory, TINY_CONFIG["vocab_size"])
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].numpy().tobytes())
    return step, digest.hexdigest()


def difference(run_dir: Path, unbroken: Path) -> str:
    """Where a finished run differs from the unbroken one; empty where it does not, to the bit."""
    was, now = figures(unbroken), figures(run_dir)
    for step in sorted(was):
        if was[step] != now.get(step):
            return f"step {step}: {now.get(step)} for {was[step]}"
    if len(now) != len(was):
        return f"{len(now)} steps for {len(was)}"
    return "" if weights(run_dir) == weights(unbroken) else "the final weights"


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file by its name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@dataclass
class Attempt:
    """A start of a run, and how it ended.

    Attributes:
        resumed: the step that it went on from; 0 where it began anew.
        status: of the rank that failed first, or 0.
        statuses: of all ranks; None of one that had to be ended.
        done: the last step that it finished, of all starts.
        ended_s: seconds from the first rank's end to the last one's.
        said: its stderr.
    """

    ranks: Ranks
    run_dir: Path
    resumed: int = 0
    status: int | None = None
    statuses: list[int | None] = field(default_factory=list)
    done: int = 0
    ended_s: float = 0.0
    said: str = ""

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 120) -> None:
        until = time.monotonic() + timeout_s
        while not holds():
            assert self.ranks.all_run, f"ended by itself: {self.ranks.said()[1]}"
            assert time.monotonic() < until, f"not within {timeout_s} s: {self.ranks.said()[1]}"
            time.sleep(0.01)

    def kill(self, rank: int) -> None:
        os.killpg(self.ranks.pids[rank], signal.SIGKILL)

    def finish(self, timeout_s: float = 180) -> None:
        """Waits for its end; what is left after `NOTICED_S` is ended."""
        until = time.monotonic() + timeout_s
        while self.ranks.all_run and time.monotonic() < until:
            time.sleep(0.01)
        first = time.monotonic()
        self.status = self.ranks.wait(max(0.1, until - first), grace_s=NOTICED_S)
        self.ended_s = time.monotonic() - first
        self.statuses = self.ranks.statuses
        self.said = self.ranks.said()[1] + "".join(self._still_there())
        self.done = max(figures(self.run_dir), default=0)
        found = GOING_ON.search(self.said)
        self.resumed = int(found[1]) if found else 0

    def _still_there(self) -> Iterator[str]:
        """What can be seen of processes that have not ended."""
        for rank, pid in enumerate(self.ranks.pids):
            if self.statuses[rank] is None:
                for task in Path(f"/proc/{pid}/task").glob("*"):
                    with suppress(OSError):
                        words = (task / "stat").read_text().rpartition(")")[2].split()
                        where = (task / "wchan").read_text()
                        yield f"rank {rank} has not ended: thread {task.name}, {words[0]} {where}\n"


@contextmanager
def attempt(
    config: Path, run_dir: Path, *overrides: str, fault: dict[str, Any] | None = None
) -> Iterator[Attempt]:
    """Starts a run, with a fault (`tests.faults.injected`) or without."""
    argv = [f"conf={config}", f"run.dir={run_dir}", *OPTIONS, *overrides]
    module = "tests.faults.injected" if fault else "megaopd.train"
    with Ranks(module, argv, NUM_RANKS, FAULT=json.dumps(fault)) as ranks:
        yield Attempt(ranks, run_dir)


def run(
    config: Path, run_dir: Path, *overrides: str, fault: dict[str, Any] | None = None
) -> Attempt:
    """A start to its end."""
    with attempt(config, run_dir, *overrides, fault=fault) as started:
        started.finish()
    return started
