"""Writes a torch_dist checkpoint, the format of torch.distributed.checkpoint, chunk by chunk.

The same files as Megatron-Core's `dist_checkpointing.save` gives, for `dist_checkpointing.load`.
torch's own `FileSystemWriter` is not used: it keeps the last tensor of every key in memory until
the file is done, which is the whole model where layers differ.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megaopd.checkpoint.keys import StoredParam
from megaopd.storage.streamed import StreamedFile

# torch.distributed.checkpoint's version of the format.
_VERSION = "1.0.0"

# What Megatron-Core 0.16 writes into metadata.json; 0.19 reads it too.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class WrittenChunk:
    """A chunk of a global tensor, and the bytes of the file it is in."""

    param: StoredParam
    dtype: torch.dtype
    file: str
    offset: int
    length: int


class ChunkFile:
    """A file of chunks that is being written; a context manager.

    Args:
        number: of the file among those of its rank.

    Attributes:
        name: the file's, as Megatron-Core calls it.
        chunks: what has been written.
    """

    def __init__(self, directory: Path, rank: int, number: int) -> None:
        self.name = f"__{rank}_{number}.distcp"
        self.chunks: list[WrittenChunk] = []
        self._file = StreamedFile(directory / self.name)

    def __enter__(self) -> ChunkFile:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        self._file.close(sync=error_type is None)

    def add(self, param: StoredParam, tensor: Tensor) -> None:
        """Writes the values of a whole parameter; `tensor` may have any shape of that size."""
        tensor = tensor.detach().reshape(param.shape).contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes all of the memory that a view looks at
        offset = self._file.tell()
        try:
            torch.save(tensor, cast(IO[bytes], self._file))
        except RuntimeError as error:
            # After a write that failed or was interrupted it complains about its own position.
            if error.__context__ is not None:
                raise error.__context__ from None
            raise
        length = self._file.tell() - offset
        self.chunks.append(WrittenChunk(param, tensor.dtype, self.name, offset, length))

    def hexdigest(self) -> str:
        """SHA-256 of the file, once it is closed."""
        return self._file.hexdigest()


def write_metadata(directory: Path, chunks: Iterable[WrittenChunk]) -> None:
    """Writes .metadata, metadata.json and common.pt of a checkpoint that consists of `chunks`."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for chunk in chunks:
        param = chunk.param
        size, offset = torch.Size(param.global_shape), torch.Size(param.offset)
        properties = TensorProperties(dtype=chunk.dtype)
        tensor = tensors.setdefault(param.key, TensorStorageMetadata(properties, size, []))
        tensor.chunks.append(ChunkStorageMetadata(offset, torch.Size(param.shape)))
        index = MetadataIndex(param.key, offset)
        places[index] = _StorageInfo(chunk.file, chunk.offset, chunk.length)
    metadata = Metadata(dict(tensors), storage_data=places, version=_VERSION)
    with (directory / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_BACKENDS), encoding="utf-8")
