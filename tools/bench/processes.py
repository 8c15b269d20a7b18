"""Contenders of a benchmark in processes of their own: how they are started, and what they take.

The child calls `ready` before the part that is measured and `report` at its end; the parent calls
`measure`. Memory is the highest resident set of all its processes together, sampled every 20 ms;
what they share (the pages of libraries) counts once a process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


def torchrun(num_ranks: int) -> list[str]:
    """The start of a command that runs a script on so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(num_ranks)]


def ready() -> None:
    """Tells the parent that what follows is measured; one process of a contender calls it."""
    print("READY", flush=True)
    time.sleep(0.3)  # it looks at the memory now


def report(result: Mapping[str, Any]) -> None:
    """Gives the parent the result; one process of a contender calls it."""
    print("RESULT " + json.dumps(result), flush=True)


class MemorySampler(threading.Thread):
    """Highest resident memory of a process and its children together, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.peak = 0
        self.stopped = threading.Event()

    def now(self) -> int:
        total = 0
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                # The torchrun agent is not part of the step.
                if "torch.distributed.run" not in " ".join(process.cmdline()[:3]):
                    total += process.memory_info().rss
            except psutil.Error:
                continue
        return total

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            try:
                self.peak = max(self.peak, self.now())
            except psutil.Error:
                return


def measure(
    name: str, command: Sequence[str], env: Mapping[str, str], limit_s: float = 1800.0
) -> dict[str, Any] | None:
    """Runs a contender in fresh processes.

    Args:
        name: for the line that says that it died.
        env: what is added to the environment.
        limit_s: seconds after which it is killed.

    Returns:
        What it reported, with `peak_gib` and `peak_above_start_gib` (over `ready`); None if it
        died.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    sampler = MemorySampler(process.pid)
    watchdog = threading.Timer(limit_s, _kill, [process])
    watchdog.start()
    before = 0
    result: dict[str, Any] = {}
    try:
        for line in process.stdout:
            if line.startswith("READY"):
                before = sampler.now()
                sampler.start()
            elif line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
        if process.wait(timeout=60) != 0 or not result:
            print(f"{name}: ended with status {process.returncode}, left out of the table")
            return None
    finally:
        watchdog.cancel()
        sampler.stopped.set()
        _kill(process)
    result["peak_gib"] = sampler.peak / 2**30
    result["peak_above_start_gib"] = (sampler.peak - before) / 2**30
    return result


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a contender and its children, where it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
