"""Python processes that start in a moment: they are forked from a server that has imported torch,
Megatron-Core and this project once, where `python -m` and spawned processes import them anew."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# torchrun ends the other ranks at once; an error that all agree on is said by rank 0.
GRACE_S = 5.0


def process_context() -> Any:
    """The multiprocessing context for processes that use torch. Its server ends with the test run.

    A server that has met a GPU cannot be forked: there, processes are spawned.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preloaded"])
    return context


class Ranks:
    """Running processes `python -m module argv` from the repository's root; with `num_ranks` above
    1 with the environment that torchrun gives to its ranks. A context manager: nothing of them
    outlives it, for each has a process group of its own, which is killed.

    Attributes:
        pids: of the ranks, in order.
    """

    def __init__(self, module: str, argv: Sequence[str], num_ranks: int = 1, **env: str) -> None:
        context = process_context()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if num_ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        self._folder = tempfile.TemporaryDirectory()
        self._texts = [Path(self._folder.name) / name for name in ("out", "err")]
        self._processes: list[Any] = []
        try:
            for rank in range(num_ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
                words = (module, list(argv), {**environment, **own, **env}, self._texts)
                process = context.Process(target=_run, args=words)
                process.start()
                self._processes.append(process)
        except BaseException:
            self._end()
            raise
        self.pids = [process.pid for process in self._processes]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            _end(process)
        self._folder.cleanup()

    @property
    def all_run(self) -> bool:
        """Whether none of them has ended."""
        return all(process.is_alive() for process in self._processes)

    @property
    def statuses(self) -> list[int | None]:
        """Of each rank, as subprocess gives them; None while it runs."""
        return [process.exitcode for process in self._processes]

    def wait(self, timeout_s: float, grace_s: float = GRACE_S) -> int | None:
        """The status of the first that fails, or 0; None if the time is over.

        Args:
            grace_s: how long the others have after that.
        """
        return _wait_for(self._processes, time.monotonic() + timeout_s, grace_s)

    def said(self) -> tuple[str, str]:
        """What all ranks have written so far, to stdout and to stderr."""
        out, err = (p.read_text() if p.exists() else "" for p in self._texts)
        return out, err


def run_module(
    module: str,
    argv: Sequence[str],
    num_ranks: int = 1,
    timeout_s: float = 60,
    kill_when: Callable[[], bool] | None = None,
    kill_with: int = signal.SIGKILL,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `Ranks` to their end.

    Args:
        kill_when: asked every few milliseconds; once it holds, all ranks get a signal.
        kill_with: the signal.

    Returns:
        what all ranks wrote, and the status of the one that failed first, or 0.

    Raises:
        subprocess.TimeoutExpired: the limit passed.
    """
    deadline = time.monotonic() + timeout_s
    with Ranks(module, argv, num_ranks, **env) as ranks:
        if kill_when is not None:
            while not kill_when() and ranks.all_run and time.monotonic() < deadline:
                time.sleep(0.005)
            for pid in ranks.pids if ranks.all_run else ():
                os.killpg(pid, kill_with)
        status = ranks.wait(deadline - time.monotonic())
        out, err = ranks.said()
    if status is None:
        raise subprocess.TimeoutExpired([module, *argv], timeout_s, out, err)
    return subprocess.CompletedProcess([module, *argv], status, out, err)


def _wait_for(processes: Sequence[Any], deadline: float, grace_s: float) -> int | None:
    """The status of the first that fails, or 0; None if the time is over."""
    status, running = 0, {process.sentinel: process for process in processes}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            return status or None
        for sentinel in ended:
            process = running.pop(int(sentinel))  # type: ignore[call-overload]
            process.join()
            if process.exitcode and not status:
                status = process.exitcode
                deadline = min(deadline, time.monotonic() + grace_s)
    return status


def _end(process: Any) -> None:
    """Kills what is left of it and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        if process.is_alive():  # it has no group of its own yet
            process.kill()
    process.join()
    process.close()


def _free_port() -> int:
    """Below those that the kernel gives out by itself: between here and the rank that listens, no
    connection of another process takes it."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _run(module: str, argv: list[str], environment: Mapping[str, str], texts: list[Path]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # One thread: several of these run at once, and threads in excess wait for one another.
    os.sched_getaffinity = lambda pid: {0}
    for number, path in zip((1, 2), texts, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    sys.argv = [module, *argv]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:  # as Python does, and multiprocessing does not
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
