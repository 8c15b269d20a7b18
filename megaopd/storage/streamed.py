"""A file that is written once, from its start to its end, as fast as the disk takes it."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The disk starts on what has been written after this many bytes; left to itself the system may
# gather gigabytes first, and the final sync would wait for all of them.
_WRITE_BACK = 8 << 20
# Shorter pieces are hashed where they are: a thread would cost more than it saves.
_SMALL = 1 << 16


class StreamedFile:
    """A new file, hashed and sent to the disk while it is written; a context manager.

    A piece is hashed in a thread while it is written, and `write` returns when both are done: the
    caller may reuse its memory, and none is kept here.

    Args:
        path: the file, which is replaced if it exists.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(1)
        self._digest = hashlib.sha256()
        self._written = self._sent = 0

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        self.close(sync=error_type is None)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Writes all of `data`; returns the number of bytes.

        Raises:
            OSError: not all could be written.
        """
        view = memoryview(data).cast("B")
        if len(view) < _SMALL:
            self._digest.update(view)
            self._append(view)
        else:
            hashing = self._thread.submit(self._digest.update, view)
            try:
                self._append(view)
            finally:
                hashing.result()
        return len(view)

    def _append(self, view: memoryview) -> None:
        while view:
            count = self._file.write(view[:_WRITE_BACK]) or 0
            view = view[count:]
            self._written += count
            if self._written - self._sent >= _WRITE_BACK:
                self._send()

    def _send(self) -> None:
        """Lets the disk start on what it has not been sent; does not wait for it."""
        if hasattr(os, "posix_fadvise"):
            # The kernel writes dirty pages of the range at once; then none is left to be dropped.
            os.posix_fadvise(
                self.fileno(), self._sent, self._written - self._sent, os.POSIX_FADV_DONTNEED
            )
        self._sent = self._written

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        """Does nothing, since nothing is buffered; torch.save calls it."""

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self, *, sync: bool = True) -> None:
        """Waits until the file is on the disk, then closes it; again it does nothing.

        Args:
            sync: False leaves out the wait, for a file that is given up.
        """
        self._thread.shutdown()
        if not self._file.closed:
            try:
                if sync:
                    os.fsync(self.fileno())
            finally:
                self._file.close()

    def hexdigest(self) -> str:
        """SHA-256 of all that has been written."""
        return self._digest.hexdigest()
