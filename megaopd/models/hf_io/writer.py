"""Writes a Hugging Face directory tensor by tensor, holding nothing.

A safetensors file begins with a header that says where every tensor lies. Shapes and dtypes are
known beforehand, so the header is written first and the tensors follow as they come.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopd.errors import CheckpointError
from megaopd.models.arch import ModelArch, read_arch
from megaopd.models.families import hf_shapes
from megaopd.models.hf_io.companions import (
    CONFIG,
    companion_bytes,
    copy_companions,
    set_config_dtype,
    write_json,
)
from megaopd.models.hf_io.reader import INDEX, WEIGHTS
from megaopd.models.mapping import Shape
from megaopd.storage.staged import StagedDirectory
from megaopd.storage.steps import hf_directory
from megaopd.storage.streamed import StreamedFile

# save_pretrained's own default.
MAX_SHARD_BYTES = 5_000_000_000

_STORED_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class Shard:
    """One safetensors file before it is written.

    Attributes:
        file: its name.
        tensors: name -> (dtype, shape), in the order of the bytes.
    """

    file: str
    tensors: dict[str, tuple[torch.dtype, Shape]]

    def header(self) -> bytes:
        """The bytes before the first tensor's: the header's length, then the header as JSON."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in self.tensors.items():
            start, end = end, end + nbytes(dtype, shape)
            entries[name] = {
                "dtype": _STORED_DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(nbytes(dtype, shape) for dtype, shape in self.tensors.values())


def nbytes(dtype: torch.dtype, shape: Shape) -> int:
    return math.prod(shape) * dtype.itemsize


def plan_shards(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int
) -> list[Shard]:
    """Shares tensors out over files, in their order, under the names that save_pretrained gives.

    A file is closed before it exceeds `max_shard_bytes`; a larger tensor has a file of its own.
    """
    contents: list[dict[str, tuple[torch.dtype, Shape]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        own = nbytes(dtypes[name], shape)
        if contents[-1] and size + own > max_shard_bytes:
            contents.append({})
            size = 0
        contents[-1][name] = (dtypes[name], shape)
        size += own
    total = len(contents)
    return [
        Shard(
            WEIGHTS if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors",
            # The widest dtype first: every tensor is then aligned to its own width.
            dict(sorted(content.items(), key=lambda item: -item[1][0].itemsize)),
        )
        for number, content in enumerate(contents, start=1)
    ]


class ShardFile:
    """A safetensors file that is being written; a context manager.

    Args:
        directory: where the file is created.
        shard: what it is to hold.

    Attributes:
        due: what has not been added yet, in order.
    """

    def __init__(self, directory: Path, shard: Shard) -> None:
        self.shard, self.due = shard, deque(shard.tensors.items())
        self._path = directory / shard.file
        self._file = StreamedFile(self._path)
        self._file.write(shard.header())

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        self.close(sync=error_type is None)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one whole tensor, from any device; tensors come in the shard's order.

        Raises:
            CheckpointError: another tensor, shape or dtype is due.
        """
        found = (name, (tensor.dtype, tuple(tensor.shape)))
        if not self.due or found != self.due[0]:
            due = "nothing" if not self.due else _shown(*self.due[0])
            raise CheckpointError(
                f"{self._path}: {name}",
                f"got {_shown(*found)}, where {due} is due",
                "export each tensor of the architecture once, in its order and in one dtype",
            )
        self.due.popleft()
        # Bytes, because numpy knows no bfloat16.
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(flat.numpy().data)

    def close(self, *, sync: bool = True) -> None:
        """See `StreamedFile.close`."""
        self._file.close(sync=sync)

    def hexdigest(self) -> str:
        """SHA-256 of all that was written."""
        return self._file.hexdigest()


def _shown(name: str, kind: tuple[torch.dtype, Shape]) -> str:
    dtype, shape = kind
    return f"{name} {list(shape)} {str(dtype).removeprefix('torch.')}"


def write_index(directory: Path, shards: list[Shard]) -> None:
    """Writes model.safetensors.index.json where there is more than one file."""
    if len(shards) == 1:
        return
    metadata = {
        "total_parameters": sum(
            math.prod(shape) for shard in shards for _, shape in shard.tensors.values()
        ),
        "total_size": sum(shard.nbytes for shard in shards),
    }
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    write_json(directory / INDEX, {"metadata": metadata, "weight_map": weight_map}, sort_keys=True)


def complete_directory(
    directory: Path, source: Path, shards: list[Shard], dtype: torch.dtype | None = None
) -> None:
    """Adds to the weights what makes them a model.

    Args:
        source: the Hugging Face directory whose companions go along.
        shards: all files of the weights.
        dtype: what config.json is to say; None keeps what the source's says, byte for byte.
    """
    copy_companions(source, directory)
    if dtype is not None:
        set_config_dtype(directory, dtype)
    write_index(directory, shards)


def is_hf_directory(path: Path) -> bool:
    """Whether `path` is what an `HFWriter` may replace."""
    return (path / CONFIG).is_file()


class HFWriter:
    """Writes a Hugging Face directory that `from_pretrained` loads, one tensor at a time.

    A context manager: `add` every tensor inside, and leaving it completes the directory. Until then
    all is written to a hidden sibling of `dst`, which disappears if an error leaves the context; at
    the end it is synced to disk and renamed, so `dst` is never half a model.

    Args:
        dst: directory to write.
        source_dir: directory of the model that the weights came from, of either format: what lies
            beside its weights goes along.
        arch: the architecture, which must be that of `source_dir`.
        dtype: of every tensor, and what config.json will say. None is the first tensor's; that the
            disk has no room is then found out by writing.
        max_shard_bytes: a file is closed before it exceeds this.
        overwrite: replace `dst` if it is a model directory. It is moved aside and deleted only when
            the new one is in place.

    Raises:
        CheckpointError: `source_dir` holds another architecture, or `dst` cannot be written.
        ConfigError: `dst` exists.
        EnvironmentFault: the disk has no room, before or while it is written.
    """

    def __init__(
        self,
        dst: str | Path,
        source_dir: str | Path,
        arch: ModelArch,
        dtype: torch.dtype | None = None,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        self.dst, self.source = Path(dst), hf_directory(source_dir)
        if read_arch(self.source) != arch:
            raise CheckpointError(
                str(self.source), "config.json is of another architecture", "give the model's own"
            )
        self.shapes = hf_shapes(arch)
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[Shard] = []
        self._waiting: list[Shard] = []
        self._file: ShardFile | None = None
        self._dtype = dtype
        needed = 0
        if dtype is not None:
            self._plan(dtype)
            needed = sum(shard.nbytes for shard in self._shards) + companion_bytes(self.source)
        self._stack = contextlib.ExitStack()
        self._staged = StagedDirectory(
            self.dst, overwrite=overwrite, needed_bytes=needed, replaceable=is_hf_directory
        )

    def _plan(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        dtypes = dict.fromkeys(self.shapes, dtype)
        self._shards = plan_shards(self.shapes, dtypes, self.max_shard_bytes)
        self._waiting = list(self._shards)

    def __enter__(self) -> HFWriter:
        self._stack.enter_context(self._staged)
        self._stack.push(self._finish)  # runs first; what it raises, the directory's exit sees
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one whole tensor, from any device; they come in the order of `hf_shapes`.

        Raises:
            CheckpointError: another tensor, shape or dtype is due.
            EnvironmentFault: the disk is full.
        """
        if not self._shards:
            self._plan(tensor.dtype)
        if (self._file is None or not self._file.due) and self._waiting:
            self._close_file()
            self._file = ShardFile(self._staged.path, self._waiting.pop(0))
        assert self._file is not None
        self._file.add(name, tensor)

    def add_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            self.add(name, tensor)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._staged.digest(self._file.shard.file, self._file.hexdigest())

    def _finish(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None:
            if self._file is not None:
                self._file.close(sync=False)
            return
        self._close_file()
        missing = [] if self._file is None else [name for name, _ in self._file.due]
        missing += [name for shard in self._waiting for name in shard.tensors]
        if missing or not self._shards:
            missing = missing or list(self.shapes)
            raise CheckpointError(
                str(self.dst),
                f"{len(missing)} tensors were not written, {missing[0]} first",
                "export every tensor of the architecture",
            )
        complete_directory(self._staged.path, self.source, self._shards, self._dtype)
