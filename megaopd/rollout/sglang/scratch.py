"""What servers that we start leave on this host: temporary files, and files of shared memory.

A server has a directory for the first, which also holds the names of the second. It is named after
this host and process, so that what a killed trainer left behind is known as such.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil  # type: ignore[import-untyped]

# Of the host a few letters: the names of sockets, which lie in the directory, must be short.
_HOST = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
PREFIX = f"megaopd-sglang-{_HOST}-"
SHARED_MEMORY = "shared_memory"


def make_scratch() -> Path:
    """A directory for one start of a server, which only this user can look into.

    Those of trainers of this host that died over theirs are removed.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        pid = path.name.removeprefix(PREFIX).split("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)) and _is_ours(path):
            remove_scratch(path)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))


def note_shared_memory(scratch: Path, files: Iterable[str]) -> None:
    """Has `remove_scratch` remove these files as well."""
    known = _noted(scratch)
    (scratch / SHARED_MEMORY).write_text("\n".join(sorted(known | set(files))))


def remove_scratch(scratch: Path) -> None:
    """Removes all that is left of a server that has ended; nothing if nothing is."""
    for file in _noted(scratch):
        Path(file).unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


def _noted(scratch: Path) -> set[str]:
    try:
        return set((scratch / SHARED_MEMORY).read_text().splitlines())
    except OSError:
        return set()


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid() and not path.is_symlink()
    except OSError:
        return False
