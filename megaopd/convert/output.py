"""What both directions share: the source is verified, the destination written by all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megaopd.convert.progress import Progress
from megaopd.convert.ranks import Ranks
from megaopd.errors import ConfigError, EnvironmentFault
from megaopd.storage.manifest import MANIFEST, check_listing, read_manifest, verify_manifest
from megaopd.storage.staged import StagedDirectory

T = TypeVar("T")


def check_apart(src: Path, dst: Path) -> None:
    """Neither directory lies in the other: one would be copied into itself, or replaced.

    Raises:
        ConfigError: one does.
    """
    inner, outer = src.resolve(), dst.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ConfigError(
            str(dst), f"and {src} lie in one another", "choose a destination beside the source"
        )


def verify_together(directory: Path, ranks: Ranks) -> None:
    """Compares every file with the manifest, if there is one; ranks share the files. Collective.

    Raises:
        CheckpointError: a file differs, is missing or not listed.
    """
    with ranks.together():
        if not (directory / MANIFEST).exists():
            return
        listed = read_manifest(directory)
        check_listing(directory, listed)
        sizes = {name: (directory / name).stat().st_size for name in listed}
        mine = ranks.share(sorted(sizes), sizes.__getitem__)
        with Progress("verifying", sum(sizes[name] for name in mine), ranks) as progress:
            verify_manifest(directory, mine, progress)


def write_together(
    ranks: Ranks,
    src: Path,
    staged: StagedDirectory,
    write: Callable[[Path], T],
    finish: Callable[[list[T]], None],
    undo: Callable[[], None] = lambda: None,
) -> None:
    """Makes a directory that is there only when all ranks have written their part. Collective.

    The destination is checked first, then the source's files against their manifest.

    Args:
        src: what is read: its tensors only when all its files have been verified.
        staged: the destination; rank 0 enters it, and only rank 0's is used.
        write: writes this rank's files into a directory, and returns what `finish` must know.
        finish: adds, on rank 0, what needs the parts of all ranks, given in their order.
        undo: what rank 0 does after a failure, besides removing `staged`.
    """
    try:
        with contextlib.ExitStack() as stack:
            with ranks.together():
                if ranks.is_main:
                    stack.push(lambda error, *_: None if error is None else undo())
                    stack.enter_context(staged)
            verify_together(src, ranks)
            with ranks.together():
                written = write(staged.path)
            parts = ranks.gather(written)
            with ranks.together():
                if ranks.is_main:
                    finish(parts)
                    stack.close()
    except Exception as error:
        # The launcher ends all ranks as soon as one has ended: rank 0 must have tidied up by then.
        with contextlib.suppress(EnvironmentFault):
            ranks.gather(None)
        if not isinstance(error, OSError):
            raise
        # Not on rank 0: leaving the directory, it has made its line of the same error.
        fault = EnvironmentFault(str(staged.dst), str(error), "see what rank 0 says")
        fault.agreed = True
        raise fault from error
