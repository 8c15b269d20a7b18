"""Checks that libraries make of a model's text, in a process that can be ended at any time.

The process is `sandbox_worker.py`. It is started at the first check, serves one check after the
other, and is started anew when one ended it.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from megaopd.errors import EnvironmentFault
from megaopd.logger import get_logger

_WORKER = Path(__file__).with_name("sandbox_worker.py")
# What a worker needs of the environment; keys and tokens of this process stay out of it.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "TMPDIR")
_START_S = 300.0

logger = get_logger(__name__)


class Sandbox:
    """A worker for one entry of the worker's `SCORERS`; safe to call from several threads.

    The limit is one of CPU time, so that a busy machine does not turn right answers into wrong
    ones; a check that takes `patience` times as long without computing is ended as well.

    Args:
        name: the entry.
        cpu_s: CPU seconds of one check.
        memory_bytes: address space of the worker.
        max_chars: longest text that is passed on; a longer one scores 0.
        patience: wall-clock limit of a check, in multiples of cpu_s.
        max_checks: after as many the worker is replaced, and its caches with it.

    Attributes:
        num_ended: checks that ended their worker, by time, memory or a crash; they scored 0.
    """

    def __init__(
        self,
        name: str,
        *,
        cpu_s: float = 3.0,
        memory_bytes: int = 2 << 30,
        max_chars: int = 4096,
        patience: float = 12.0,
        max_checks: int = 50_000,
    ) -> None:
        self.name = name
        self.cpu_s = cpu_s
        self.num_ended = 0
        self._memory_bytes = memory_bytes
        self._max_chars = max_chars
        self._patience_s = cpu_s * patience
        self._max_checks = max_checks
        self._num_checks = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._unread = b""
        # Whether the worker ended, or answered, before we lost patience with it.
        self._patient = True
        _ALIVE.add(self)

    def score(self, response: str, answer: str) -> float:
        """The score, in [0, 1]; 0 of a check that failed, took too long or ended its worker.

        Raises:
            EnvironmentFault: the worker does not start, or a library that it needs is missing.
        """
        if len(response) > self._max_chars:
            return 0.0
        with self._lock:
            reply = self._ask([response, answer])
        return min(1.0, max(0.0, reply.get("score", 0.0)))

    def close(self) -> None:
        """Ends the worker; the next check starts another."""
        process, self._process = self._process, None
        # A process that was forked from the owner has no business with its worker.
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, arguments: list[str]) -> dict[str, Any]:
        if self._num_checks >= self._max_checks:
            self.close()
        for _ in range(2):
            if self._process is None or self._owner != os.getpid():
                self._start()
            line = self._exchange(json.dumps(arguments).encode() + b"\n")
            if line:
                reply: dict[str, Any] = json.loads(line)
                return reply
            process, patient = self._process, self._patient
            self.close()
            # The kernel ends a worker with the thread that started it: not the text's doing.
            if process is None or process.returncode != -signal.SIGKILL or not patient:
                break
        self.num_ended += 1
        status = None if process is None else process.returncode
        why = f"ended its worker (status {status})"
        if status == -signal.SIGPROF or not patient:
            why = f"took more than {self.cpu_s:g} s of CPU time"
        # A model that learns to hang the checks would fill the log otherwise.
        if self.num_ended & (self.num_ended - 1) == 0:
            logger.warning(
                "a check of the reward %s %s and scores 0; so far there were %d such",
                self.name,
                why,
                self.num_ended,
            )
        return {}

    def _exchange(self, request: bytes) -> bytes:
        assert self._process is not None
        assert self._process.stdin is not None
        self._num_checks += 1
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._process.wait()
            return b""
        return self._read_line(self._patience_s)

    def _start(self) -> None:
        self.close()
        self._owner, self._num_checks, self._unread = os.getpid(), 0, b""
        known = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
        # Sets of strings have one order in all workers, so that a score can be had again.
        fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        limits = [str(self.cpu_s), str(self._memory_bytes), str(os.getpid())]
        try:
            # -P: modules are not looked for beside the worker.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), self.name, *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**known, **fixed},
            )
            reply = json.loads(self._read_line(_START_S) or b"{}")
        except OSError as error:
            raise EnvironmentFault(
                f"reward {self.name}", f"its worker does not start ({error})", "mend that"
            ) from error
        if not reply.get("ready"):
            self.close()
            package = {"math": "math-verify", "reasoning_gym": "'megaopd[reasoning_gym]'"}[
                self.name
            ]
            raise EnvironmentFault(
                f"reward {self.name}",
                f"its worker does not start ({reply.get('missing', 'see its message above')})",
                f"pip install {package}",
            )

    def _read_line(self, timeout_s: float) -> bytes:
        """The worker's next line, empty where it ended, or was ended, before it."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        end = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            self._patient = bool(poll.poll(max(0.0, 1000 * (end - time.monotonic()))))
            chunk = os.read(process.stdout.fileno(), 65536) if self._patient else b""
            if not chunk:
                if not self._patient:
                    process.kill()
                process.wait()
                return b""
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line


_ALIVE: weakref.WeakSet[Sandbox] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for sandbox in list(_ALIVE):
        sandbox.close()
