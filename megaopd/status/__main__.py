"""The command line `python -m megaopd.status`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from megaopd.errors import ConfigError, DataError, run_cli
from megaopd.status.files import clean, is_run
from megaopd.status.screen import BAR, BLOCKS, screen
from megaopd.status.snapshot import take_snapshot

_HELP = """\
usage: python -m megaopd.status RUN [--once] [--json] [--interval S]

One screen about a run, from the files in its directory: state, step, time left, phase and phase
times, speed, loss, accuracy, rollout, health, last checkpoint, warnings. On a terminal it refreshes
in place until the run has finished or Ctrl-C.

RUN           directory of a run, or the name of one in runs/
--once        print it once; so it is where the output is no terminal
--json        print it once, as JSON
--interval S  seconds from one refresh to the next (default 2)
"""
_HOME, _CLEAR, _LINE_END, _BELOW = "\x1b[H", "\x1b[2J", "\x1b[K\r\n", "\x1b[J"


def main(argv: list[str]) -> None:
    """Reads the words of the command line and shows the run."""
    if not argv or {"-h", "--help"} & set(argv):
        print(_HELP, end="")
        return
    run_dir, once, as_json, interval_s = _arguments(argv)
    if as_json:
        print(json.dumps(_snapshot(run_dir), indent=2))
    elif once or not sys.stdout.isatty():
        print("\n".join(screen(_snapshot(run_dir), 1000, _has_blocks())))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(run_dir, interval_s)


def _watch(run_dir: Path, interval_s: float) -> None:
    sys.stdout.write(_CLEAR)
    while True:
        snapshot = _snapshot(run_dir)
        size = shutil.get_terminal_size()
        lines = screen(snapshot, size.columns - 1, _has_blocks())[: size.lines - 1]
        sys.stdout.write(_HOME + "".join(line + _LINE_END for line in lines) + _BELOW)
        sys.stdout.flush()
        if snapshot["state"] == "finished":
            return
        time.sleep(interval_s)


def _snapshot(run_dir: Path) -> dict[str, Any]:
    try:
        return take_snapshot(run_dir)
    except OSError as error:
        file, why = clean(str(error.filename or run_dir)), error.strerror or "cannot be read"
        raise DataError(file, why, "look at the run's directory") from error


def _has_blocks() -> bool:
    try:
        "".join((*BAR, BLOCKS)).encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def _arguments(argv: list[str]) -> tuple[Path, bool, bool, float]:
    paths, once, as_json, interval = [], False, False, "2"
    words = iter(argv)
    for word in words:
        if word == "--once":
            once = True
        elif word == "--json":
            as_json = True
        elif word == "--interval":
            interval = next(words, "")
        elif word.startswith("--interval="):
            interval = word.removeprefix("--interval=")
        elif word.startswith("-"):
            raise ConfigError(clean(word), "not an option", "see --help")
        else:
            paths.append(word)
    if len(paths) != 1:
        found = "no run" if not paths else f"{len(paths)} runs"
        raise ConfigError("RUN", found, "name the directory of one run")
    return _run_dir(paths[0]), once, as_json, _seconds(interval)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 86400:
        raise ConfigError("--interval", f"{clean(text)!r}", "give seconds from 0.1 on")
    return seconds


def _run_dir(name: str) -> Path:
    for path in (Path(name), Path("runs") / name):
        with contextlib.suppress(OSError, ValueError):  # a name that no path can have
            if path.is_dir():
                if not is_run(path):
                    raise DataError(
                        clean(str(path)),
                        "not a run's directory: no config.yaml, metrics.jsonl or status.json",
                        "name the run.dir of a run",
                    )
                return path
    raise DataError(clean(name), "no such directory", "name the run.dir of a run")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        run_cli(main, sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has enough; the interpreter's own flush is not to say so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
