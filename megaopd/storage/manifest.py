"""SHA256SUMS: the digest of every file of a directory, as `sha256sum -c` reads it.

The last line is a comment with the digest of the lines above it, so that a manifest whose own bytes
changed is found before anything is compared with it. A manifest tells accidents from what was
written; it is no signature: who can change the files can change the manifest too.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megaopd.errors import CheckpointError

MANIFEST = "SHA256SUMS"

_REMEDY = "copy the directory again, or use another checkpoint"
_LINE = re.compile(r"^(?P<digest>[0-9a-f]{64})  (?P<name>[^\n\r\\]+)$")
_LAST_LINE = "# SHA-256 of the lines above: "
# Hashing lets other threads run; more than this many read a disk no faster.
_MAX_THREADS = 4
_BLOCK = 1 << 20


def write_manifest(directory: Path, digests: Mapping[str, str] | None = None) -> None:
    """Writes the manifest of all files in `directory` and below.

    Args:
        digests: hexadecimal SHA-256 of files that need not be read again, by relative name.

    Raises:
        CheckpointError: `digests` has a file that is not there; or what is there is not a regular
            file, or has a name that the manifest cannot hold.
        OSError: a file cannot be read, or the manifest not written.
    """
    digests = digests or {}
    names = _files(directory)
    for name in digests.keys() - names:
        raise CheckpointError(str(directory / name), "is missing, though it was written", _REMEDY)
    complete = dict(digests) | hash_files(directory, names - digests.keys())
    (directory / MANIFEST).write_bytes(_render(complete))


def _render(digests: Mapping[str, str]) -> bytes:
    body = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()
    return body + f"{_LAST_LINE}{hashlib.sha256(body).hexdigest()}\n".encode()


def read_manifest(directory: Path) -> dict[str, str]:
    """Returns the digests, in hexadecimal, by relative name.

    Raises:
        CheckpointError: there is no manifest, or it is not, to the byte, what was written.
    """
    file = directory / MANIFEST
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(str(file), "is missing", _REMEDY) from None
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read ({error.strerror})", _REMEDY) from None
    digests = {}
    for line in raw.decode("utf-8", errors="replace").splitlines():
        if (entry := _LINE.match(line)) is not None:
            digests[entry["name"]] = entry["digest"]
    if raw != _render(digests):
        raise CheckpointError(
            str(file), "was changed: its last line is not the SHA-256 of the others", _REMEDY
        )
    for name in digests:
        if name == MANIFEST or not all(part not in ("", ".", "..") for part in name.split("/")):
            raise CheckpointError(str(file), f"lists {name!r}, which cannot be", _REMEDY)
    return digests


def verify_manifest(
    directory: Path,
    names: Collection[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compares files with the manifest; nothing is read from them but bytes.

    Args:
        names: the files to compare; None is all, and then no other file may be there that is not
            hidden.
        progress: called with the number of bytes hashed since its last call, by one thread at a
            time.

    Raises:
        CheckpointError: names the file that is missing, is not listed, or differs.
    """
    listed = read_manifest(directory)
    check_listing(directory, listed, names)
    found = hash_files(directory, listed if names is None else names, progress)
    for name in sorted(found):
        if found[name] != listed[name]:
            raise CheckpointError(
                str(directory / name), f"SHA-256 differs from {MANIFEST}", _REMEDY
            )


def check_listing(
    directory: Path, listed: Collection[str], names: Collection[str] | None = None
) -> None:
    """Checks that the files are there and listed, without reading them.

    Args:
        listed: names in the manifest.
        names: as in `verify_manifest`.

    Raises:
        CheckpointError: names the file that is missing or is not listed.
    """
    present = _files(directory)
    for name in sorted(listed if names is None else names):
        if name not in listed:
            raise CheckpointError(str(directory / name), f"is not listed in {MANIFEST}", _REMEDY)
        if name not in present:
            raise CheckpointError(
                str(directory / name), f"is missing, though {MANIFEST} lists it", _REMEDY
            )
    if names is None:
        for name in sorted(present - set(listed)):
            if name.startswith("."):  # such as a download tool's .cache/; nobody reads it
                continue
            raise CheckpointError(
                str(directory / name),
                f"is not listed in {MANIFEST}",
                "remove it if you put it there, else copy the directory again",
            )


def _files(directory: Path) -> set[str]:
    """Relative names of all files but the manifest.

    Raises:
        CheckpointError: something is neither a regular file nor a directory, or has a name that
            no manifest can hold. Links are refused: what they lead to can lie anywhere.
    """
    return set(_walk(directory, "")) - {MANIFEST}


def _walk(directory: Path, prefix: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(directory / entry.name, f"{name}/")
            elif not entry.is_file(follow_symlinks=False):
                raise CheckpointError(
                    entry.path, "is not a regular file", "put the file itself in its place"
                )
            elif re.search(r"[\n\r\\]", entry.name) or not _is_text(entry.name):
                raise CheckpointError(
                    repr(entry.path), f"has a name that {MANIFEST} cannot hold", "rename the file"
                )
            else:
                yield name


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    # What str.splitlines would take for the end of a line.
    return len(name.splitlines()) == 1


def hash_files(
    directory: Path, names: Collection[str], progress: Callable[[int], None] | None = None
) -> dict[str, str]:
    """Returns the hexadecimal SHA-256 of files by name; the largest go first, in several threads.

    Args:
        progress: as in `verify_manifest`.
    """
    by_size = sorted(names, key=lambda name: -(directory / name).stat().st_size)
    lock = threading.Lock()

    def advance(count: int) -> None:
        if progress is not None:
            with lock:
                progress(count)

    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), max(1, len(by_size)))
    with ThreadPoolExecutor(threads) as pool:
        digests = pool.map(lambda name: _hash_file(directory / name, advance), by_size)
        return dict(zip(by_size, digests, strict=True))


def _hash_file(file: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK))
    try:
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(block):
                digest.update(block[:count])
                advance(count)
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read ({error.strerror})", _REMEDY) from None
    return digest.hexdigest()
