"""Writes this rank's share of a checkpoint, in a thread while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from megaopd.checkpoint.keys import StoredParam
from megaopd.checkpoint.torch_dist import ChunkFile, WrittenChunk

Shares = Iterable[tuple[StoredParam, Tensor]]


class ShardWriter:
    """One file of a checkpoint, `__RANK_0.distcp`; hashed while it is written.

    A thread, and no process: the copies that it writes are the rank's own memory, hashing and
    writing let Python run, and there is nothing that could die by itself.

    Args:
        directory: of the checkpoint, which is there.
        rank: this rank's.
        shares: what to write, in host memory.
        in_background: write in a thread; else before the constructor returns.
        on_failure: called in the thread when it cannot write.

    Attributes:
        error: why it could not be written.
        chunks: what is in the file; complete when `done`.
        digests: SHA-256 by file name; empty where there was nothing to write.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        shares: Shares,
        *,
        in_background: bool,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.error: BaseException | None = None
        self.chunks: list[WrittenChunk] = []
        self.digests: dict[str, str] = {}
        self._directory, self._rank, self._on_failure = directory, rank, on_failure
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None
        if in_background:
            self._thread = threading.Thread(
                target=self._write, args=(shares,), name="checkpoint writer", daemon=True
            )
            self._thread.start()
        else:
            self._write(shares)

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Waits for it."""
        if self._thread is not None:
            self._thread.join()

    def give_up(self) -> None:
        """Stops after the tensor that it is at, and waits for that."""
        self._given_up.set()
        self.join()

    def _write(self, shares: Shares) -> None:
        try:
            shares = iter(shares)
            first = next(shares, None)
            if first is None:
                return
            with ChunkFile(self._directory, self._rank, 0) as file:
                file.add(*first)
                for block, values in shares:
                    if self._given_up.is_set():
                        return
                    file.add(block, values)
            self.chunks, self.digests = file.chunks, {file.name: file.hexdigest()}
        except BaseException as error:  # whatever it is, the run's main thread is to raise it
            self.error = error
            self._on_failure()
