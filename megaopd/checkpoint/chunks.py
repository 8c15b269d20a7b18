"""Reads blocks of tensors out of a checkpoint's data files, straight into a tensor's memory.

A data file is a row of archives that torch.save wrote, one a block. An archive is a ZIP file
without compression: a pickle that describes the tensor, and its bytes. The description is read by
an unpickler that knows the three names in it and builds nothing; the bytes go from the file to
where they are wanted, and only those that are wanted.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopd.checkpoint.metadata import REFUSED, Chunk, RefusedPickleError
from megaopd.errors import CheckpointError
from megaopd.models.mapping import Shape

_COPY_AGAIN = "copy the checkpoint again"
# One open file per saving rank and writer could be more than a process may have.
_MAX_OPEN_FILES = 64
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field, at the end of 30 bytes


class _Descriptor:
    """An open file that is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)

    def read(self, count: int, start: int) -> bytes:
        return os.pread(self.number, count, start)

    def read_into(self, buffer: memoryview, start: int) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.number, [buffer[done:]], start + done)
            if count == 0:
                raise EOFError
            done += count


class _Section(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, file: _Descriptor, start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._length - self._place))
        found = self._file.read(count, self._start + self._place)
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)


@dataclass(frozen=True)
class _Described:
    """A tensor as its pickle has it; strides and offset in elements of its storage."""

    dtype: torch.dtype
    offset: int
    shape: Shape
    stride: Shape
    num_elements: int
    key: str


class _Describe(pickle.Unpickler):
    """Reads the description of a tensor; whatever else a pickle can name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *rest: data
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise RefusedPickleError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _, num_elements = pid
        if kind != "storage" or storage not in _STORAGES:
            raise RefusedPickleError(f"it has a {kind} of {storage}")
        return _STORAGES[storage], str(key), int(num_elements)


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


def _describe(storage: Any, offset: int, shape: Any, stride: Any, *rest: Any) -> _Described:
    dtype, key, num_elements = storage
    return _Described(dtype, offset, tuple(shape), tuple(stride), num_elements, key)


@dataclass(frozen=True)
class _Block:
    """Where in its file a chunk's storage begins, and the tensor in it."""

    start: int
    tensor: _Described


class ChunkReader:
    """The blocks of a checkpoint's data files; keeps some files open.

    Args:
        directory: the checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open = functools.lru_cache(_MAX_OPEN_FILES)(
            lambda name: _Descriptor(directory / name)
        )
        self._blocks: dict[tuple[str, int], _Block] = {}

    def read(self, chunk: Chunk, dtype: torch.dtype, start: Shape, out: Tensor) -> None:
        """Copies a part of a chunk into `out`, which may be a view.

        Args:
            dtype: what the chunk must have; `out` has it too.
            start: where the part begins within the chunk; it has the shape of `out`.

        Raises:
            CheckpointError: the file cannot be read, or holds another tensor or something else.
        """
        path = self._directory / chunk.file
        try:
            file = self._open(chunk.file)
            block = self._block(file, chunk)
            if (block.tensor.shape, block.tensor.dtype) != (chunk.shape, dtype):
                raise ValueError(f"a tensor {list(block.tensor.shape)} of {block.tensor.dtype}")
            _copy_part(file, block, start, out)
        except RefusedPickleError as error:
            raise CheckpointError(str(path), f"would execute code ({error})", REFUSED) from None
        except OSError as error:
            raise CheckpointError(
                str(path), f"cannot be read ({error.strerror or error})", _COPY_AGAIN
            ) from None
        except Exception as error:  # what zipfile and pickle make of damaged bytes
            raise CheckpointError(
                str(path),
                f"is not what .metadata says at byte {chunk.start} ({error})",
                _COPY_AGAIN,
            ) from None

    def _block(self, file: _Descriptor, chunk: Chunk) -> _Block:
        place = chunk.file, chunk.start
        if place not in self._blocks:
            self._blocks[place] = _find_block(file, chunk)
        return self._blocks[place]


def _find_block(file: _Descriptor, chunk: Chunk) -> _Block:
    section = io.BufferedReader(_Section(file, chunk.start, chunk.length), 4096)
    with zipfile.ZipFile(section) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("it is big-endian")
        tensor = _Describe(io.BytesIO(archive.read(records["data.pkl"]))).load()
    if not isinstance(tensor, _Described):
        raise ValueError("it is no tensor")
    data = records[f"data/{tensor.key}"]
    last = tensor.offset + sum(
        (n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True)
    )
    num_bytes = tensor.num_elements * tensor.dtype.itemsize
    if (
        data.compress_type != zipfile.ZIP_STORED
        or data.file_size != num_bytes
        or not 0 <= tensor.offset <= last + 1
        or (math.prod(tensor.shape) > 0 and last >= tensor.num_elements)
        or any(s < 0 for s in tensor.stride)
    ):
        raise ValueError("its record is not the tensor's")
    header = chunk.start + data.header_offset
    name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size, header))
    start = header + _LOCAL_HEADER.size + name_length + extra_length
    if start + num_bytes > chunk.start + chunk.length:
        raise ValueError("its bytes lie outside")
    return _Block(start, tensor)


def _copy_part(file: _Descriptor, block: _Block, start: Shape, out: Tensor) -> None:
    """Reads the run of elements from the part's first to its last; the rest of it is skipped."""
    if out.numel() == 0:
        return
    tensor = block.tensor
    first = tensor.offset + sum(i * s for i, s in zip(start, tensor.stride, strict=True))
    count = 1 + sum((n - 1) * s for n, s in zip(out.shape, tensor.stride, strict=True))
    # One run in the file and in memory: no copy but the read itself.
    direct = out.is_contiguous() and count == out.numel() and _in_order(out.shape, tensor.stride)
    run = out.view(-1) if direct else torch.empty(count, dtype=tensor.dtype)
    data = run.view(torch.uint8).numpy().data
    file.read_into(data, block.start + first * tensor.dtype.itemsize)
    if not direct:
        out.copy_(run.as_strided(tuple(out.shape), tensor.stride))


def _in_order(shape: Shape, stride: Shape) -> bool:
    """Whether elements follow one another in memory as they do in the tensor."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
