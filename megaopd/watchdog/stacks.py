"""What all threads of this process are doing, for a person to read afterwards."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_stack, walk_tb
from types import CodeType, FrameType
from typing import IO

from megaopd.errors import ConfigError

# Frames of the main thread in the short form.
NUM_SHOWN = 8
_WAITING = os.path.join("torch", "distributed", "")
_PYTHON = os.path.dirname(os.__file__)
_Call = tuple[CodeType, int]
"""A function, and the line in its file."""


class StackFile:
    """A file for the stacks of a rank, open from the start: when they are to be written it may be
    too late to open one.

    Args:
        path: the file; what an earlier run left there is removed.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("wb", buffering=0)
        except OSError as error:
            raise ConfigError(
                "run.dir", f"{path} cannot be written ({error.strerror})", "choose another one"
            ) from error

    def dump_unless_put_off(self, seconds: float) -> None:
        """Writes the stacks and ends the process unless this is called again in time, even if no
        thread of Python can run any more."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def write(self, head: str) -> None:
        """Writes `head` and the stacks of all threads as they are now."""
        self._file.write(f"{head}\n\n{all_stacks()}".encode())

    def close(self) -> None:
        """Leaves nothing where there were no stacks; again does nothing."""
        faulthandler.cancel_dump_traceback_later()
        if self._file.closed:
            return
        self._file.close()
        with suppress(OSError):  # somebody else tidies up
            if not self._path.stat().st_size:
                self._path.unlink()
                self._path.parent.rmdir()


def all_stacks() -> str:
    """Every thread's calls, the last one last; without lines of source, which may be out of reach
    when it matters."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: _order(item[0])):
        lines = [f"  {_text(call)}" for call in reversed(_calls(frame))]
        parts.append("\n".join([f"{names.get(ident, f'thread {ident}')}:", *lines, ""]))
    return "\n".join(parts)


@dataclass(frozen=True)
class MainThread:
    """What the main thread is doing.

    Attributes:
        calls: the last ones in one line, the innermost first.
        at: the one to look at.
        waits: whether that waits for other ranks.
    """

    calls: str
    at: str
    waits: bool


def main_thread(error: BaseException | None = None) -> MainThread:
    """What it is doing, or was doing when it met `error`."""
    if error is None:
        calls = _calls(sys._current_frames().get(threading.main_thread().ident or 0))
    else:
        calls = [(f.f_code, line) for f, line in walk_tb(error.__traceback__)][::-1]
    if not calls:
        return MainThread("gone", "its end", False)
    own = next((call for call in calls if not _is_library(call)), calls[0])
    at = _text(calls[0]) + (f", called from {_text(own)}" if own is not calls[0] else "")
    waits = _WAITING in calls[0][0].co_filename
    return MainThread(" < ".join(map(_text, calls[:NUM_SHOWN])), at, waits)


def _calls(frame: FrameType | None) -> list[_Call]:
    """The innermost first."""
    return [] if frame is None else [(f.f_code, line) for f, line in walk_stack(frame)]


def _order(ident: int) -> tuple[bool, int]:
    """The main thread first."""
    return ident != threading.main_thread().ident, ident


def _is_library(call: _Call) -> bool:
    path = call[0].co_filename
    return "site-packages" in path or path.startswith((_PYTHON, "<"))


def _text(call: _Call) -> str:
    code, line = call
    short = os.sep.join(code.co_filename.split(os.sep)[-3:])
    return f"{short}:{line} {code.co_name}"
