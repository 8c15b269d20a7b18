"""What a distributed checkpoint says of itself, read so that nothing in it can be executed.

`.metadata` is a pickle, and unpickling calls whatever the pickle names. Here it can name the
classes that torch.distributed.checkpoint writes and nothing else; likewise `common.pt`, which
`torch.load` reads with weights_only. Both happen before Megatron-Core or torch open the files.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megaopd.errors import CheckpointError
from megaopd.models.mapping import Shape

METADATA, COMMON = ".metadata", "common.pt"

REFUSED = "do not load it; take the checkpoint from where it was written"
_COPY_AGAIN = "copy the checkpoint again"

# Data classes and enumerations, whose construction does nothing but keep what it is given.
_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_DCP}.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},  # looks a name up in a table
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class RefusedPickleError(pickle.UnpicklingError):
    """The pickle names something that no checkpoint needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()) and "." not in name:
            return super().find_class(module, name)
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise RefusedPickleError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickleError("it has a persistent id")


@dataclass(frozen=True)
class Chunk:
    """A block of a stored tensor: bytes [start, start + length) of a file are its torch.save.

    Attributes:
        offset, shape: of the block within the tensor.
        file: relative to the checkpoint.
    """

    offset: Shape
    shape: Shape
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor, in the blocks in which the saving ranks had it."""

    dtype: torch.dtype
    shape: Shape
    chunks: tuple[Chunk, ...]


def read_metadata(directory: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of the checkpoint by key, an optimizer's included; reads none.

    `common.pt` is read too, so that what Megatron-Core would unpickle has been looked at.

    Raises:
        CheckpointError: a file cannot be read, would execute something, or makes no sense.
    """
    metadata = _unpickle(directory / METADATA)
    if (directory / COMMON).exists():  # Megatron-Core 0.19 writes none
        _check_common(directory / COMMON)
    try:
        return _tensors(metadata, directory)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            str(directory / METADATA), f"makes no sense ({error!r})", _COPY_AGAIN
        ) from None


def _unpickle(file: Path) -> Metadata:
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except RefusedPickleError as error:
        raise CheckpointError(str(file), f"would execute code ({error})", REFUSED) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(
            str(file), f"cannot be read ({type(error).__name__})", _COPY_AGAIN
        ) from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(str(file), "is no checkpoint's metadata", _COPY_AGAIN)
    return metadata


def _check_common(file: Path) -> None:
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            str(file), f"holds more than tensors and plain values ({reason})", REFUSED
        ) from None
    except Exception as error:
        raise CheckpointError(
            str(file), f"cannot be read ({type(error).__name__})", _COPY_AGAIN
        ) from None


def _tensors(metadata: Metadata, directory: Path) -> dict[str, StoredTensor]:
    places: dict[tuple[str, Shape], Any] = {}
    for index, place in metadata.storage_data.items():
        if isinstance(index, MetadataIndex) and index.offset is not None:
            places[index.fqn, tuple(index.offset)] = place
    sizes: dict[str, int] = {}
    tensors = {}
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            continue  # bytes: TransformerEngine's extra state, generators
        shape = _shape(stored.size)
        chunks = []
        for part in stored.chunks:
            offset, size = _shape(part.offsets), _shape(part.sizes)
            if not len(offset) == len(size) == len(shape) or any(
                o + n > total for o, n, total in zip(offset, size, shape, strict=True)
            ):
                raise ValueError(f"{key}: {list(size)} at {list(offset)} of {list(shape)}")
            place = places[key, offset]
            if getattr(place, "transform_descriptors", None):
                raise ValueError(f"{key} is compressed")
            chunk = Chunk(offset, size, place.relative_path, int(place.offset), int(place.length))
            _check_place(directory, chunk, sizes)
            chunks.append(chunk)
        if not isinstance(stored.properties.dtype, torch.dtype):
            raise ValueError(f"{key} has no dtype")
        tensors[key] = StoredTensor(stored.properties.dtype, shape, tuple(chunks))
    return tensors


def _shape(size: Any) -> Shape:
    shape = tuple(size)
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"shape {shape}")
    return shape


def _check_place(directory: Path, chunk: Chunk, sizes: dict[str, int]) -> None:
    """Checks that the bytes are there; `sizes` of files are looked up once."""
    if chunk.file not in sizes:
        relative = PurePosixPath(chunk.file)
        if relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"{chunk.file} lies outside the checkpoint")
        try:
            sizes[chunk.file] = (directory / relative).stat().st_size
        except OSError:
            raise CheckpointError(
                str(directory / relative), "is missing, though .metadata names it", _COPY_AGAIN
            ) from None
    if chunk.start < 0 or chunk.length < 0 or chunk.start + chunk.length > sizes[chunk.file]:
        raise CheckpointError(
            str(directory / chunk.file),
            f"truncated: {sizes[chunk.file]} bytes, .metadata says at least "
            f"{chunk.start + chunk.length}",
            _COPY_AGAIN,
        )
