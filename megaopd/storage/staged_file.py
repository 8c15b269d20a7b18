"""A file that appears under its name only when all of it is on the disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megaopd.errors import ConfigError, EnvironmentFault


@contextlib.contextmanager
def staged_file(dst: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields the path to write to; leaving without an error syncs that file and makes it `dst`.

    Until then it is a hidden sibling, which goes away with an error. A process that is killed
    leaves it; the next one writes over it.

    Args:
        overwrite: replace `dst`, in one step.

    Raises:
        ConfigError: `dst` exists.
        EnvironmentFault: something cannot be written.
    """
    dst = Path(dst)
    if dst.is_dir() or (dst.exists() and not overwrite):
        raise ConfigError(str(dst), "exists", "choose another name, or pass --overwrite")
    partial = dst.with_name(f".{dst.name}.partial")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        yield partial
        _sync(partial)
        partial.replace(dst)
        _sync(dst.parent)
    except OSError as error:
        raise EnvironmentFault(
            str(error.filename or dst),
            f"cannot be written ({error.strerror or error})",
            "check the destination and the room on its file system",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems have no such thing for a directory; their renames are ordered anyway.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
