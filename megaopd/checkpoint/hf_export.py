"""Makes Hugging Face directories of checkpoints in a process beside the run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megaopd.logger import get_logger

logger = get_logger(__name__)

# What would make the converter one of the run's ranks, or let it take their GPUs.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Export:
    process: subprocess.Popen[bytes]
    source: Path
    destination: Path
    errors: IO[bytes]


class HFExporter:
    """Converts one checkpoint after another; rank 0's.

    What goes wrong with an export is warned of, with the converter's own line: the checkpoint is
    complete by then, and the run goes on.
    """

    def __init__(self) -> None:
        self._queue: list[tuple[Path, Path]] = []
        self._running: _Export | None = None

    @property
    def in_use(self) -> set[Path]:
        """The checkpoints that are still to be read."""
        running = {self._running.source} if self._running else set()
        return running | {source for source, _ in self._queue}

    def add(self, source: Path, destination: Path) -> None:
        """Queues a complete checkpoint; returns at once."""
        self._queue.append((source, destination))
        self.poll()

    def poll(self) -> None:
        """Warns of an export that has failed, and starts the next one."""
        if self._running is not None and self._running.process.poll() is not None:
            self._end(self._running)
            self._running = None
        if self._running is None and self._queue:
            self._running = self._start(*self._queue.pop(0))

    def finish(self) -> None:
        """Waits for all of them."""
        while self._running is not None:
            self._running.process.wait()
            self.poll()

    def close(self) -> None:
        """Gives up the one under way and those behind it."""
        self._queue.clear()
        if self._running is not None:
            self._running.process.terminate()
            self._running.process.wait()
            self._running.errors.close()
            self._running = None

    def _start(self, source: Path, destination: Path) -> _Export:
        environment = {k: v for k, v in os.environ.items() if k not in _OF_A_RANK}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "megaopd.convert", "megatron-to-hf"),
                *(str(source), str(destination), "--overwrite"),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        return _Export(process, source, destination, errors)

    def _end(self, export: _Export) -> None:
        status = export.process.returncode
        if status == 0:
            logger.info("checkpoint %s is at %s too", export.source.name, export.destination)
        else:
            export.errors.seek(0)
            said = export.errors.read().decode(errors="replace").strip().splitlines()
            reason = f"killed by signal {-status}" if status < 0 else (said or ["no word"])[-1]
            logger.warning("%s was not written: %s", export.destination, reason)
        export.errors.close()
