"""Shows how far a conversion is: bytes, rate and the time that is left."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from megaopd.convert.ranks import Ranks

# Where stderr is no terminal, such as a job's log, there is a line this often and no bar.
LINE_EVERY_S = 30.0


class Progress:
    """A bar on rank 0; a context manager, called with the bytes done since the last call.

    Ranks are not asked how far they are: the bar is about rank 0's own share, and says so. The
    shares are equal in bytes.

    Args:
        what: what is done, such as "writing".
        total: bytes of this rank's share.
    """

    def __init__(self, what: str, total: int, ranks: Ranks) -> None:
        self._what = what if ranks.size == 1 else f"{what} (rank 0's share of {ranks.size})"
        self._total, self._done = total, 0
        self._shown = ranks.is_main
        self._bar: tqdm | None = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(
                desc=self._what, total=self._total, unit="B", unit_scale=True, dynamic_ncols=True
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._bar is not None:
            self._bar.update(num_bytes)
        elif self._shown and time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            rate = self._done / (self._last_line - self._started)
            print(
                f"{self._what}: {shown_bytes(self._done)} of {shown_bytes(self._total)}, "
                f"{shown_bytes(rate)}/s, {(self._total - self._done) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def shown_bytes(num_bytes: float) -> str:
    """`num_bytes` for people, in powers of 1000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"
