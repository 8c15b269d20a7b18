"""Headers of safetensors files, and JSON in which no name may stand twice.

A safetensors file is 8 bytes with the length N of its header (little-endian), N bytes of JSON that
gives each tensor's dtype, shape and place, and the tensors' bytes, laid end to end. Everything that
can be wrong with a file short of its values shows in the header and the file's size.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopd.errors import CheckpointError
from megaopd.models.mapping import Shape

COPY_AGAIN = "copy or download the checkpoint again"

# Of any JSON text that is read here: what safetensors itself allows a header.
MAX_JSON_BYTES = 100_000_000

# Bits of an element. What is not here has a size that is not checked, and is no weight's dtype.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 8),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place: bytes [start, stop) of its file."""

    dtype: str
    shape: Shape
    start: int
    stop: int


class _StandsTwiceError(ValueError):
    def __init__(self, name: str) -> None:
        super().__init__(f"{name} stands twice in it")
        self.name = name


def parse_json(text: bytes) -> Any:
    """Parses JSON as `json.loads` does, but refuses an object that has a key twice.

    Raises:
        ValueError: not JSON, or a key stands twice.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise _StandsTwiceError(key)
        unique[key] = value
    return unique


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing or truncated, its header is not one, names a tensor
            twice, or does not account for every byte exactly once.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a link to a file is one
            raise CheckpointError(str(file), "is not a regular file", COPY_AGAIN)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            first = 8 + length
            if status.st_size < 8 or length > MAX_JSON_BYTES or first > status.st_size:
                raise _corrupt(file, f"{status.st_size} bytes, of them {length} for the header")
            text = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(str(file), "no such file", COPY_AGAIN) from None
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(str(file), f"cannot be read ({reason})", COPY_AGAIN) from None
    try:
        header = parse_json(text)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        entries = [(name, _entry(name, fields, first)) for name, fields in header.items()]
    except _StandsTwiceError as error:
        raise CheckpointError(
            f"{file}: {error.name}", "stands twice in the file's header", COPY_AGAIN
        ) from None
    except ValueError as error:
        raise _corrupt(file, str(error)) from None
    entries.sort(key=lambda entry: (entry[1].start, entry[1].stop))
    for problem in _gaps(entries, first, status.st_size):
        raise _corrupt(file, problem)
    return dict(entries)


def _corrupt(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(str(file), f"truncated or corrupt ({reason})", COPY_AGAIN)


def _entry(name: str, fields: Any, first: int) -> StoredTensor:
    """The header's entry of a tensor; `first` is the place of the first tensor's bytes."""
    try:
        dtype, shape, (start, stop) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} has no dtype, shape and data_offsets") from None
    sizes = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError(f"{name} has no sound dtype, shape and data_offsets")
    bits = _BITS.get(dtype)
    if start > stop or (bits is not None and math.prod(shape) * bits != 8 * (stop - start)):
        raise ValueError(f"{name} is {dtype} {shape} in {stop - start} bytes")
    return StoredTensor(dtype, tuple(shape), first + start, first + stop)


def _gaps(entries: list[tuple[str, StoredTensor]], first: int, size: int) -> Iterator[str]:
    """What keeps the tensors from covering bytes [first, size) exactly once."""
    end = first
    for name, tensor in entries:
        if tensor.start != end:
            yield f"{name} begins at byte {tensor.start}, where the tensor before it ends at {end}"
        end = tensor.stop
    if end != size:
        yield f"{size} bytes, where its header accounts for {end}"
