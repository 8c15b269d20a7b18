"""A directory that appears under its name only when all of it is on the disk.

What is written lies in a hidden sibling until then, and disappears with an error. A process that is
killed leaves the sibling, which cannot be taken for the directory; the next one deletes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from megaopd.errors import CheckpointError, ConfigError, EnvironmentFault
from megaopd.storage.manifest import write_manifest

# The file system has no more room for us, or none for a file of this size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A file system that knows no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class StagedDirectory:
    """Context manager: write into `path`; leaving it without an error makes that `dst`.

    Leaving writes the manifest, syncs files and directories and renames. The process that enters
    must be one; others may write into `path` meanwhile and hand it the digests of their files.
    Where the file system has no locks, nothing keeps two processes from writing the same `dst`.

    Args:
        dst: the directory to be; parents are made.
        overwrite: replace `dst` if `replaceable(dst)`; it is moved aside, and deleted when the new
            one is in place.
        needed_bytes: what will be written, as far as it is known.
        replaceable: whether an existing directory is of the kind that is written here, so that a
            slip of the keyboard does not delete something else.

    Attributes:
        path: where to write, from entry to exit.

    Raises:
        ConfigError: on entry: `dst` exists, or another process is writing it.
        EnvironmentFault: there is not enough room, on entry or later.
        CheckpointError: something could not be written for another reason.
    """

    def __init__(
        self,
        dst: str | Path,
        *,
        overwrite: bool = False,
        needed_bytes: int = 0,
        replaceable: Callable[[Path], bool] = lambda path: True,
    ) -> None:
        self.dst = Path(dst).resolve()
        self.path = self.dst.with_name(f".{self.dst.name}.partial")
        self._replaced = self.dst.with_name(f".{self.dst.name}.replaced")
        self._lock_file = self.dst.with_name(f".{self.dst.name}.partial.lock")
        self._lock: int | None = None
        self._overwrite = overwrite
        self._needed_bytes = needed_bytes
        self._replaceable = replaceable
        self._digests: dict[str, str] = {}

    def digest(self, name: str, hexdigest: str) -> None:
        """Notes the SHA-256 of the finished file `name`, relative to `path`, in hexadecimal."""
        self._digests[name] = hexdigest

    def __enter__(self) -> StagedDirectory:
        self._check_dst()
        with self.reporting():
            self.dst.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire()
        try:
            with self.reporting():
                self._recover()
                _remove(self.path)
            self._check_dst()  # another process may have finished it before we had the lock
            self._check_room()
            with self.reporting():
                self.path.mkdir()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with self.reporting():
                if error is not None:
                    raise error
                write_manifest(self.path, self._digests)
                _sync(self.path)
                self._publish()
        except BaseException as raised:
            _remove(self.path, ignore_errors=True)
            if raised is not error:
                raise
        finally:
            self._release()

    def _check_dst(self) -> None:
        if not os.path.lexists(self.dst):
            return
        if not self.dst.is_dir():
            raise ConfigError(str(self.dst), "is not a directory", "choose another destination")
        if _is_empty(self.dst):
            return
        if not self._overwrite:
            raise ConfigError(
                str(self.dst), "exists", "choose another destination, or pass --overwrite"
            )
        if not self._replaceable(self.dst):
            raise ConfigError(
                str(self.dst),
                "is not a directory of the kind that would replace it",
                "choose another destination, or remove it yourself",
            )

    def _check_room(self) -> None:
        free = shutil.disk_usage(self.dst.parent).free
        if free < self._needed_bytes:
            raise EnvironmentFault(
                str(self.dst),
                f"no space left: needs {self._needed_bytes} bytes, {free} are free",
                "make room, or choose a destination on another file system",
            )

    def _acquire(self) -> int | None:
        """Returns the descriptor that holds the lock; None where there are no locks."""
        while True:
            descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it may have removed the file between our two calls.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self._lock_file)):
                        return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise ConfigError(
                    str(self.dst),
                    "is being written by another process",
                    "wait for it, or choose another destination",
                ) from None
            except OSError as error:
                os.close(descriptor)
                if error.errno in _NO_LOCKS:
                    return None
                raise
            os.close(descriptor)

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            self._lock_file.unlink()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _recover(self) -> None:
        """Deals with what a process left that was killed while it replaced `dst`."""
        if self._replaced.exists():
            if self.dst.exists():
                _remove(self._replaced)
            else:
                self._replaced.rename(self.dst)

    def _publish(self) -> None:
        replacing = self.dst.exists() and not _is_empty(self.dst)
        if replacing:
            self.dst.rename(self._replaced)
        try:
            self.path.rename(self.dst)
        except OSError:
            if replacing:
                self._replaced.rename(self.dst)
            raise
        _sync_one(self.dst.parent)
        if replacing:
            _remove(self._replaced)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Gives what the file system refuses its one line; for whoever writes into `path`."""
        try:
            yield
        except OSError as error:
            where = str(error.filename or self.dst)
            if error.errno in FULL:
                free = shutil.disk_usage(self.dst.parent).free
                needs = f"needs {self._needed_bytes} bytes, " if self._needed_bytes else ""
                raise EnvironmentFault(
                    where,
                    f"no space left ({error.strerror}): {needs}{free} are free",
                    "make room, or choose a destination on another file system",
                ) from error
            raise CheckpointError(
                where,
                f"cannot be written ({error.strerror or error})",
                "check the destination, its permissions and its file system",
            ) from error


def _is_empty(directory: Path) -> bool:
    with os.scandir(directory) as entries:
        return next(entries, None) is None


def _remove(directory: Path, ignore_errors: bool = False) -> None:
    if os.path.lexists(directory):
        shutil.rmtree(directory, ignore_errors=ignore_errors)


def _sync(directory: Path) -> None:
    """Waits until all below `directory` is on the disk, names included."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync_one(Path(folder) / name)
        _sync_one(Path(folder))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems have no such thing for a directory; their renames are ordered anyway.
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)
