"""What the file system refuses below a run's directory, as a line that a person can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megaopd.errors import EnvironmentFault
from megaopd.storage.staged import FULL


@contextlib.contextmanager
def run_files(run_dir: Path) -> Iterator[None]:
    """Metrics, reports and status are written by whoever has them; here their errors come out.

    Raises:
        EnvironmentFault: no room, or something of another kind where a file of the run should be.
    """
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and Path(str(error.filename)).is_relative_to(run_dir)
        if not inside and error.errno not in FULL:
            raise
        raise EnvironmentFault(
            str(error.filename or run_dir),
            f"cannot be written ({error.strerror or error})",
            "make room, or move away what is there",
        ) from error
