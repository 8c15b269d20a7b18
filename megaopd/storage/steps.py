"""Megatron's names of a run's checkpoints, and which of them are complete.

    ROOT/iter_0000000/                        a step's directory; step 0 is a converted model
    ROOT/latest_checkpointed_iteration.txt    the newest step, for Megatron's own tools

A step is complete when its manifest is what was written and every file that it lists is there.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from pathlib import Path

from megaopd.errors import CheckpointError
from megaopd.storage.manifest import MANIFEST, check_listing, read_manifest

POINTER = "latest_checkpointed_iteration.txt"

_STEP = re.compile(r"^iter_(\d{7,})$")
_LEFTOVER = re.compile(r"^\.iter_\d{7,}\.(partial|partial\.lock|removed)$")
_CONFIG, _COMPANIONS, _METADATA = "config.json", "hf", ".metadata"


def step_directory(root: str | Path, step: int) -> Path:
    return Path(root) / f"iter_{step:07d}"


def is_megatron(path: str | Path) -> bool:
    """Whether `path` is a step's directory or the root of some, complete or not."""
    path = Path(path)
    if (path / _CONFIG).exists():
        return False
    if _STEP.match(path.name) or (path / _METADATA).exists() or (path / POINTER).exists():
        return path.is_dir()
    return bool(stored_steps(path))


def stored_steps(root: Path) -> list[int]:
    """Returns the steps that have a directory, complete or not, in ascending order."""
    if not root.is_dir():
        return []
    found = (_STEP.match(name) for name in os.listdir(root))
    return sorted(int(match[1]) for match in found if match and (root / match[0]).is_dir())


def remove_leftovers(root: Path) -> None:
    """Removes what a killed process left of steps that were never complete, or no longer are."""
    if root.is_dir():
        for name in os.listdir(root):
            if _LEFTOVER.match(name):
                if (root / name).is_dir():
                    shutil.rmtree(root / name, ignore_errors=True)
                else:  # a lock that nobody holds
                    (root / name).unlink(missing_ok=True)


def is_complete(directory: Path) -> bool:
    """Whether a step's directory has all its files; their content is not looked at."""
    try:
        listed = read_manifest(directory)
        check_listing(directory, listed, listed)
    except (CheckpointError, OSError):
        return False
    return True


def complete_steps(root: str | Path) -> list[int]:
    """Returns the complete steps in ascending order."""
    return [step for step in stored_steps(Path(root)) if is_complete(step_directory(root, step))]


def find_checkpoint(path: str | Path, step: int | None = None) -> Path:
    """Returns the directory of a complete step.

    Where the newest step is incomplete and none was asked for, a line on stderr says so and the
    newest complete one is taken. Megatron's pointer is not asked: it can be older or newer than
    what is there.

    Args:
        path: the root of a run's steps, or one step's directory.
        step: the step; None is the newest complete one.

    Raises:
        CheckpointError: there is none, or not that one, or it is incomplete; it names the newest
            complete step.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(str(path), "no such directory", "give a Megatron checkpoint")
    if (match := _STEP.match(path.name)) or (path / _METADATA).exists() or _has_manifest(path):
        if step is not None and match and int(match[1]) != step:
            raise CheckpointError(
                str(path), f"is step {int(match[1])}, not {step}", "give the directory above it"
            )
        return _complete(path, path.parent)
    if step is not None:
        return _complete(step_directory(path, step), path)
    steps = stored_steps(path)
    if not steps:
        raise CheckpointError(
            str(path), "has no iter_* directory", "give a Megatron checkpoint's directory"
        )
    for candidate in reversed(steps):
        directory = step_directory(path, candidate)
        if is_complete(directory):
            if candidate != steps[-1]:
                _warn(f"{step_directory(path, steps[-1])} is incomplete; using step {candidate}")
            return directory
    newest = step_directory(path, steps[-1])
    raise CheckpointError(
        str(newest),
        f"is incomplete ({what_is_missing(newest)}), and no other step is whole",
        "copy or convert the checkpoint again",
    )


def write_pointer(root: str | Path, step: int) -> None:
    """Points Megatron's tools at `step`; a reader sees the old pointer or the new one."""
    root = Path(root)
    partial = root / f".{POINTER}.partial"
    with open(partial, "w", encoding="ascii") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(root / POINTER)


def hf_directory(path: str | Path, step: int | None = None) -> Path:
    """Where config.json and the tokenizer are: `path` itself, or `hf` in a Megatron checkpoint.

    Raises:
        CheckpointError: see `find_checkpoint`.
    """
    path = Path(path)
    if not is_megatron(path):
        return path
    return find_checkpoint(path, step) / _COMPANIONS


def _has_manifest(path: Path) -> bool:
    return (path / MANIFEST).exists() and not stored_steps(path)


def _complete(directory: Path, root: Path) -> Path:
    if is_complete(directory):
        return directory
    good = complete_steps(root)
    raise CheckpointError(
        str(directory),
        "no such step"
        if not directory.is_dir()
        else f"is incomplete ({what_is_missing(directory)})",
        f"use step {good[-1]}, the last good one" if good else "copy or convert it again",
    )


def what_is_missing(directory: Path) -> str:
    """What makes an incomplete step's directory incomplete: a file, and what is wrong with it."""
    try:
        listed = read_manifest(directory)
        check_listing(directory, listed, listed)
    except CheckpointError as error:
        file, found, _ = error.__reduce__()[1]
        return f"{Path(file).relative_to(directory)} {found}"
    except OSError as error:
        return str(error)
    return "a file was missing a moment ago"


@functools.cache
def _warn(message: str) -> None:
    """Once a process, and from one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)
