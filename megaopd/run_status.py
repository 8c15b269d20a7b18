"""RUN/status.json: what a run is doing now, for `python -m megaopd.status`.

A phase is noted in memory; a thread writes the file, at most once a second, so that nobody waits
for a slow file system. It also writes when nothing happens: a file that stays old is a process that
is gone or stopped.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megaopd.errors import MegaOPDError, StopRequested
from megaopd.logger import get_logger
from megaopd.redaction import redact

STATUS_FILE = "status.json"
STATES = ("running", "finished", "stopped", "failed")
# Between two writes, at least and at most.
LEAST_S, BEAT_S = 1.0, 15.0
MAX_WARNINGS, MAX_CHARACTERS = 5, 2000

State = Literal["running", "finished", "stopped", "failed"]

logger = get_logger(__name__)


class RunStatus:
    """Keeps RUN/status.json, from rank 0; the other ranks' calls do nothing.

    The last warnings of the package's log are part of it. Any thread may call it. As a context it
    says by itself how the run ended.

    Args:
        run_dir: directory of the run, which is there.
        num_steps: steps of the whole run.
        world_size: ranks of the run.
        device: name of the device that the ranks compute on.
        step: steps that are done before the first phase (of a resumed run).
        enabled: whether this rank writes.
        environ: environment variables, for the job's number under Slurm.
    """

    def __init__(
        self,
        run_dir: str | Path,
        num_steps: int,
        world_size: int,
        *,
        device: str = "cpu",
        step: int = 0,
        enabled: bool = True,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._file = Path(run_dir) / STATUS_FILE
        self._enabled = enabled
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        self._dirty = self._closed = False
        self._warned = ""
        self._warnings: deque[dict[str, Any]] = deque(maxlen=MAX_WARNINGS)
        now = time.time()
        self._facts: dict[str, Any] = {
            "state": "running",
            "message": "",
            "phase": "start",
            "phase_since": now,
            "step": step,
            "num_steps": num_steps,
            "world_size": world_size,
            "device": device,
            "started": now,
            "resumed_from": step or None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "slurm_job_id": environ.get("SLURM_JOB_ID"),
            "slurm_restarts": environ.get("SLURM_RESTART_COUNT"),
            "checkpoint": None,
        }
        if not enabled:
            return
        self._listener = _Warnings(self)
        logging.getLogger("megaopd").addHandler(self._listener)
        self._write()
        threading.Thread(target=self._keep, name="run status", daemon=True).start()

    def phase(self, name: str, step: int) -> None:
        """A phase of a step begins; step 0 is before the first."""
        self._note(phase=name, phase_since=time.time(), step=step)

    def checkpoint(self, step: int, directory: str | Path) -> None:
        """A checkpoint is complete."""
        self._note(checkpoint={"step": step, "directory": str(directory), "at": time.time()})

    def warning(self, message: str) -> None:
        """Something that a person should look at; the last few are kept."""
        with self._changed:
            step = self._facts["step"]
            self._warnings.append({"step": step, "at": time.time(), "message": _one_line(message)})
            self._wake()

    def state(self, state: State, message: str = "") -> None:
        """How the run ends, or that it goes on; on disk when this returns.

        Args:
            message: what a person is told of a run that failed or stopped.
        """
        assert state in STATES, state
        with self._changed:
            self._facts |= {"state": state, "message": _one_line(message)}
        if self._enabled and not self._closed:
            self._write()

    def __enter__(self) -> RunStatus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Says how the run ended."""
        if error is None:
            self.state("finished")
        elif isinstance(error, StopRequested):
            self.state("stopped", str(error))
        else:
            known = isinstance(error, MegaOPDError)
            self.state("failed", str(error) if known else f"{type(error).__name__}: {error}")
        self.close()

    def close(self) -> None:
        """Writes what there is and writes no more."""
        if not self._enabled or self._closed:
            return
        logging.getLogger("megaopd").removeHandler(self._listener)
        self._write()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _note(self, **facts: Any) -> None:
        with self._changed:
            self._facts |= facts
            self._wake()

    def _wake(self) -> None:
        self._dirty = True
        self._changed.notify_all()

    def _keep(self) -> None:
        """Writes what changes until `close`."""
        while True:
            time.sleep(LEAST_S)
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closed, timeout=BEAT_S)
                if self._closed:
                    return
            self._write()

    def _write(self) -> None:
        """Replaces the file in one go; what fails is warned of, and the run goes on."""
        with self._writing:
            with self._changed:
                self._dirty = False
                facts = {**self._facts, "updated": time.time(), "warnings": list(self._warnings)}
            partial = self._file.with_name(f".{STATUS_FILE}.partial")
            try:
                partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
                partial.replace(self._file)
            except OSError as error:
                found = f"{self._file} cannot be written ({error.strerror})"
                if found != self._warned:
                    self._warned = found
                    logger.warning("%s; python -m megaopd.status shows old news", found)


class _Warnings(logging.Handler):
    """Takes the warnings of the package's log to the status."""

    def __init__(self, status: RunStatus) -> None:
        super().__init__(logging.WARNING)
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        self._status.warning(record.getMessage())


def _one_line(text: str) -> str:
    return " ".join(redact(text).split())[:MAX_CHARACTERS]
