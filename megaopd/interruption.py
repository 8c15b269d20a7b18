"""A process's request to stop: a signal, or the end of its time.

The handlers only take a note; whoever is at a point where the run can stop asks for it. Python runs
a handler between two bytecodes of the main thread, so a signal that arrives in a long call of a
library is noted when that call returns.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from megaopd.errors import ConfigError, StopRequested

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
WALL_TIME = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")


def wall_time_s(text: str) -> float | None:
    """Seconds of a `train.max_wall_time`, None of an empty one.

    Raises:
        ConfigError: it has another form, or is no time at all.
    """
    if not text:
        return None
    match = WALL_TIME.fullmatch(text)
    days, hours, minutes, seconds = (
        (int(part or 0) for part in match.groups("0")) if match else [0] * 4
    )
    total = 60.0 * (60 * (24 * days + hours) + minutes) + seconds
    if not total:
        raise ConfigError(
            "train.max_wall_time",
            f"found {text!r}",
            'expected a time as "[DAYS-]HH:MM:SS", in quotes, such as "03:50:00" or "1-00:00:00"',
        )
    return total


class Interruption:
    """What a process was told about its end, by whatever told it first.

    Signals are the process's, so there is one object of a process, `INTERRUPTION`; tests make
    others.
    """

    def __init__(self) -> None:
        self._noted: str | None = None
        self._ends_at: float | None = None
        self._limit = ""
        self._previous: dict[signal.Signals, Any] = {}

    def install(self, max_wall_time: str = "") -> None:
        """Takes SIGUSR1 and SIGTERM from now on; in the main thread.

        Args:
            max_wall_time: longest time of this process since its start, `train.max_wall_time`.

        Raises:
            ConfigError: it is none.
        """
        limit_s = wall_time_s(max_wall_time)
        self._limit = max_wall_time
        self._ends_at = None if limit_s is None else time.monotonic() - process_age_s() + limit_s
        for number in SIGNALS:
            previous = signal.signal(number, self._note)
            # None: somebody's handler in C, which cannot be given back.
            self._previous.setdefault(number, signal.SIG_DFL if previous is None else previous)

    def restore(self) -> None:
        """Gives the signals back to who had them before, and forgets what it was told."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        self._noted = self._ends_at = None

    @property
    def reason(self) -> str | None:
        """Why the process is to stop ("SIGUSR1", "train.max_wall_time 03:50:00"), None if it is
        not; once there is a reason it stays."""
        if self._noted is None and self._ends_at is not None and time.monotonic() >= self._ends_at:
            self._noted = f"train.max_wall_time {self._limit}"
        return self._noted

    @property
    def requested(self) -> bool:
        """Whether there is a reason."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Takes a reason that is no signal; from any thread."""
        if self._noted is None:
            self._noted = reason

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)


INTERRUPTION = Interruption()
"""This process's."""


def reason_to_stop() -> str | None:
    """This process's, None while there is none."""
    return INTERRUPTION.reason


def never() -> str | None:
    """The reason to stop of what is never told to."""
    return None


def stopped(reason: str, during: str) -> StopRequested:
    """The error that ends a run which was told to stop."""
    return StopRequested("run", f"{reason} during {during}", "start it again to go on")


def process_age_s() -> float:
    """Seconds since this process was started, imports and all; 0 where /proc does not tell."""
    try:
        # Behind the name, which may hold anything: state and further fields, of which the 20th is
        # the start in clock ticks since the machine's.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
