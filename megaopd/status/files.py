"""Reads the files of a run's directory: never more than a bounded part of one, never anything but a
regular file, and whatever is in them ends as plain text or a number."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopd.metrics_file import METRICS_FILE, Row, parse_row
from megaopd.run_status import STATUS_FILE

# metrics.jsonl has the evaluation before training at its head, and what is new at its end.
HEAD_BYTES, TAIL_BYTES = 64 << 10, 2 << 20
SMALL_BYTES = 1 << 20
MAX_TEXT = 1000
CHECKPOINTS, MANIFEST = "checkpoints", "SHA256SUMS"

_STEP = re.compile(r"iter_(\d{7,12})")
_SETTING = re.compile(r'^( *)([\w"./ -]+?):(?:[ ]+(.*))?$')


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """The text on one line, without what a terminal would take for more than characters."""
    shown = "".join(" " if c.isspace() else c for c in text[: 4 * limit])
    shown = "".join(c for c in shown if not unicodedata.category(c).startswith("C"))
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def number(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number among values that anybody may have written."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 2**63 else None  # neither NaN nor infinity is


def integer(values: Mapping[str, Any], key: str) -> int | None:
    """A number among such values, without its fraction."""
    value = number(values, key)
    return None if value is None else int(value)


def words(values: Mapping[str, Any], key: str) -> str:
    """A text among such values, cleaned; empty where there is none."""
    value = values.get(key)
    return clean(value) if isinstance(value, str) else ""


def read_part(file: Path, most: int, from_end: bool = False) -> bytes | None:
    """At most so many bytes of a regular file, of its head or its end; None where there is none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        # A pipe in a file's place would be waited for otherwise.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "rb") as opened:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(None, "not a regular file", str(file))
        if from_end and about.st_size > most:
            opened.seek(about.st_size - most)
        return opened.read(most)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a small file; empty where there is none, or something else."""
    try:
        found = json.loads(read_part(file, SMALL_BYTES) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_rows(run_dir: Path) -> tuple[list[Row], int]:
    """The metrics at the head and at the end of metrics.jsonl, and how many lines there are none.

    The last line may be half written, and what lies between head and end is left out.
    """
    file = run_dir / METRICS_FILE
    tail = read_part(file, TAIL_BYTES, from_end=True)
    if tail is None:
        return [], 0
    if len(tail) < TAIL_BYTES:
        lines = tail.split(b"\n")
    else:
        head = read_part(file, HEAD_BYTES) or b""
        lines = [*head.split(b"\n")[:-1], *tail.split(b"\n")[1:]]
    rows, num_bad = {}, 0
    for line in lines[:-1]:  # what comes after the last whole line, usually nothing
        try:
            row = parse_row(line)
        except ValueError:
            num_bad += 1
        else:
            rows[line] = row  # a line may be in both parts
    return list(rows.values()), num_bad


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Dotted keys and values of the run's config.yaml, as `config_schema.to_yaml` writes it.

    Only that form is read: a value is JSON, on its key's line. The rest of YAML is not.
    """
    text = read_part(run_dir / "config.yaml", SMALL_BYTES) or b""
    settings: dict[str, Any] = {}
    path: list[str] = []
    decoder = json.JSONDecoder()
    for line in text.decode("utf-8", errors="replace").split("\n"):
        match = _SETTING.match(line)
        if match is None:
            continue
        indent, key, value = match.groups()
        path = [*path[: len(indent) // 2], key]
        try:
            settings[".".join(path)] = decoder.raw_decode(value)[0]
        except (ValueError, TypeError, RecursionError):
            continue  # a section
    return settings


@dataclass(frozen=True)
class Checkpoint:
    """A complete step on disk.

    Attributes:
        directory: relative to the run's.
        written: seconds since the epoch.
        num_bytes: of its files.
    """

    step: int
    directory: str
    written: float
    num_bytes: int


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest step with a manifest, which is written last."""
    root = run_dir / CHECKPOINTS
    try:
        steps = [int(match[1]) for name in os.listdir(root) if (match := _STEP.fullmatch(name))]
    except (FileNotFoundError, NotADirectoryError):
        return None
    for step in sorted(steps, reverse=True):
        name = f"iter_{step:07d}"
        try:
            about = os.lstat(root / name / MANIFEST)
            if stat.S_ISREG(about.st_mode):
                size = _num_bytes(root / name)
                return Checkpoint(step, f"{CHECKPOINTS}/{name}", about.st_mtime, size)
        except OSError:
            continue  # it is not complete, or it is being removed
    return None


def _num_bytes(directory: Path, deepest: int = 3) -> int:
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += _num_bytes(Path(entry.path), deepest - 1) if deepest else 0
            elif entry.is_file(follow_symlinks=False):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def modified(file: Path) -> float | None:
    """When a file was written, in seconds since the epoch; None where there is none."""
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def is_run(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in (METRICS_FILE, STATUS_FILE, "config.yaml"))


def is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)
