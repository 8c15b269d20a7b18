"""One run at a time in a directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from megaopd.errors import ConfigError

_FILE = ".lock"
# What file systems without locks answer.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_LOOK_EVERY_S = 0.2


@contextlib.contextmanager
def run_lock(run_dir: Path, patience_s: float = 20.0) -> Iterator[None]:
    """Holds the directory inside the block; the lock ends with the process, however that ends.

    Args:
        run_dir: is there.
        patience_s: a job that was started again may meet the last moments of itself.

    Raises:
        ConfigError: another process holds it.
    """
    descriptor = os.open(run_dir / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        until = time.monotonic() + patience_s
        while not _taken(descriptor):
            if time.monotonic() > until:
                raise ConfigError(
                    "run.dir",
                    f"{run_dir} is in use by another run",
                    "wait for it to end, or choose another directory",
                )
            time.sleep(_LOOK_EVERY_S)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
