"""The tensors of a Hugging Face directory, read slice by slice."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopd.errors import CheckpointError
from megaopd.models.hf_io.header import (
    COPY_AGAIN,
    MAX_JSON_BYTES,
    StoredTensor,
    parse_json,
    read_header,
)
from megaopd.models.hf_io.source import WeightSource
from megaopd.models.mapping import Shape
from megaopd.storage.manifest import MANIFEST, verify_manifest

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Of weights, by the names that safetensors gives them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# Formats that are programs: loading one can run anything.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# All experts of a layer in one tensor, and the projections whose rows follow one another in it.
_FUSED_EXPERTS = re.compile(r"^(.+\.mlp\.experts)\.(gate_up_proj|down_proj)$")
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class _ExpertPart:
    """One expert's projection inside a fused tensor: `shape[0]` rows from `first_row` of its
    matrices laid end to end."""

    fused: str
    first_row: int
    shape: Shape


class HFReader(WeightSource):
    """The tensors of a Hugging Face directory, by name.

    The headers of all its files are read and held against the index at once; the values when they
    are asked for. A file may be a link, as in Hugging Face's cache.

    transformers 5 fuses the experts of a layer into gate_up_proj [experts, 2 x features, hidden]
    and down_proj [experts, hidden, features]. It saves them apart, as they were before, unless told
    otherwise; where a file has them fused they too are read under the names of single experts.

    Args:
        path: directory with model.safetensors, or with model.safetensors.index.json and its files.

    Raises:
        CheckpointError: there are no safetensors; a file is missing, truncated or not one; or
            index and files do not agree on where each tensor is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stored: dict[str, StoredTensor] = {}
        self._file_of: dict[str, str] = {}
        self._parts: dict[str, _ExpertPart] = {}
        self._locate()
        self._parts = self._expert_parts()

    def _locate(self) -> None:
        if (self.path / INDEX).exists():
            placed = _read_index(self.path / INDEX)
            if (self.path / WEIGHTS).exists() and WEIGHTS not in placed.values():
                raise CheckpointError(
                    str(self.path),
                    f"has both {WEIGHTS} and an {INDEX} that does not name it",
                    "remove the one that is not the model's",
                )
            self._read_headers({file: name for name, file in placed.items()})
            self._compare(placed)
        elif (self.path / WEIGHTS).exists():
            self._read_headers({WEIGHTS: ""})
        else:
            raise _no_safetensors(self.path)

    def _read_headers(self, files: dict[str, str]) -> None:
        """Reads the headers; `files` gives with each file a tensor that the index places in it."""
        for file, example in files.items():
            if not (self.path / file).exists():
                raise CheckpointError(
                    str(self.path / file),
                    f"no such file, though {INDEX} places {example} in it",
                    COPY_AGAIN,
                )
            for name, stored in read_header(self.path / file).items():
                if name in self._stored:
                    raise CheckpointError(
                        self.where(name), f"is also in {file}", "remove the one that is not in use"
                    )
                self._stored[name], self._file_of[name] = stored, file

    def _compare(self, placed: dict[str, str]) -> None:
        for name, file in placed.items():
            if self._file_of.get(name) != file:
                raise CheckpointError(
                    f"{self.path / file}: {name}",
                    f"{INDEX} places the tensor here, but it is not",
                    COPY_AGAIN,
                )
        for name in self._file_of.keys() - placed.keys():
            raise CheckpointError(self.where(name), f"is not in {INDEX}", COPY_AGAIN)

    def _expert_parts(self) -> dict[str, _ExpertPart]:
        """Single expert's name -> its part of a fused tensor."""
        parts = {}
        for fused, stored in self._stored.items():
            if (match := _FUSED_EXPERTS.match(fused)) is None:
                continue
            experts, projections = match[1], _PROJECTIONS[match[2]]
            if len(stored.shape) != 3 or stored.shape[1] % len(projections):
                continue  # it stays what it is: a tensor that no model has
            num_experts, total_rows, cols = stored.shape
            rows = total_rows // len(projections)
            for expert in range(num_experts):
                for i, projection in enumerate(projections):
                    name = f"{experts}.{expert}.{projection}.weight"
                    if name in self._stored:
                        raise CheckpointError(
                            self.where(name), f"is also in {fused}", "keep one of the two"
                        )
                    parts[name] = _ExpertPart(fused, expert * total_rows + i * rows, (rows, cols))
        return parts

    def names(self) -> frozenset[str]:
        fused = {part.fused for part in self._parts.values()}
        return frozenset((self._stored.keys() - fused) | self._parts.keys())

    def where(self, name: str) -> str:
        part = self._parts.get(name)
        file = self._file_of.get(part.fused if part else name)
        if file is None:
            file = INDEX if (self.path / INDEX).exists() else WEIGHTS
        return f"{self.path / file}: {name}"

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise CheckpointError(self.where(name), "no such tensor", COPY_AGAIN)
        return self._stored[name]

    def shape(self, name: str) -> Shape:
        if name in self._parts:
            return self._parts[name].shape
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        part = self._parts.get(name)
        stored = self._tensor(part.fused if part else name).dtype
        if stored not in DTYPES:
            raise CheckpointError(
                self.where(name),
                f"has dtype {stored}",
                f"convert the weights to one of {', '.join(DTYPES)}",
            )
        return DTYPES[stored]

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """Returns a slice of the tensor; None takes the whole dim.

        The result maps the file, so it is not contiguous where `cols` is given; only what is
        touched is read from disk, and the memory is free with the tensor. It is lost when the file
        is changed in place: copy it to keep it. Writing to it does not reach the file.
        """
        part = self._parts.get(name)
        stored = self._tensor(part.fused if part else name)
        shape, dtype = self.shape(name), self.dtype(name)
        first, stop, _ = (rows or slice(None)).indices(shape[0]) if shape else (0, 1, 1)
        shape = (max(0, stop - first), *shape[1:]) if shape else shape
        row_bytes = dtype.itemsize * torch.Size(shape[1:]).numel()
        start = stored.start + row_bytes * (first + (part.first_row if part else 0))
        tensor = self._map(self._file_of[part.fused if part else name], start, shape, dtype)
        return tensor if cols is None else tensor[:, cols]

    def _map(self, file: str, start: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        """The tensor at byte `start` of a file."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        offset = start % mmap.ALLOCATIONGRANULARITY  # a mapping begins at a page
        length = offset + count * dtype.itemsize
        with (self.path / file).open("rb") as stream:
            # Of this read alone: what all tensors of a file touched would else stay in memory.
            mapped = mmap.mmap(
                stream.fileno(), length, access=mmap.ACCESS_COPY, offset=start - offset
            )
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        raw = torch.frombuffer(mapped, dtype=torch.uint8, offset=offset)
        if offset % dtype.itemsize:  # files of other writers need not align their tensors
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """See `WeightSource`; a directory without a manifest has nothing to compare with."""
        if (self.path / MANIFEST).exists():
            verify_manifest(self.path, progress=progress)


def _no_safetensors(path: Path) -> CheckpointError:
    pickled = sorted(file for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        return CheckpointError(
            str(path),
            f"has {pickled[0].name} but no safetensors",
            "load it with transformers and save_pretrained it, which writes safetensors",
        )
    return CheckpointError(
        str(path), f"has neither {WEIGHTS} nor {INDEX}", "give a Hugging Face directory"
    )


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        if index.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{index.stat().st_size} bytes")
        weight_map: Any = parse_json(index.read_bytes())["weight_map"]
        pairs = list(weight_map.items())
        if not pairs:
            raise ValueError("it is empty")
        if any(not isinstance(file, str) for _, file in pairs):
            raise ValueError("a file's name is not a string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            str(index), f"is not an index with a weight_map ({error})", COPY_AGAIN
        ) from None
    for name, file in pairs:
        if file != Path(file).name or "\0" in file:
            raise CheckpointError(
                f"{index}: {name}", f"is in {file!r}, outside the directory", COPY_AGAIN
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {name}",
                f"is in {file!r}, not a safetensors file",
                "load it with transformers and save_pretrained it, which writes safetensors",
            )
    return dict(pairs)
