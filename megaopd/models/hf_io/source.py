"""What supplies the tensors of a model under their Hugging Face names.

One interface for every format that weights are stored in: `HFReader` here reads a Hugging Face
directory, `MegatronReader` in `megaopd.checkpoint` a Megatron checkpoint. Checking, loading,
converting and comparing know this interface alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megaopd.models.mapping import ParamMapping, Read, Shape


class WeightSource(Protocol):
    """The stored tensors of a model by Hugging Face name, read slice by slice.

    Attributes:
        path: the directory, for an error message.
    """

    path: Path

    def names(self) -> frozenset[str]:
        """Every tensor that is stored."""
        ...

    def where(self, name: str) -> str:
        """The tensor's place, for an error message; also of a tensor that is missing."""
        ...

    def shape(self, name: str) -> Shape:
        """Shape as stored, read without the values."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored.

        Raises:
            CheckpointError: it is not a floating-point dtype that weights can have.
        """
        ...

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """Returns a slice of the tensor on the CPU, in the stored dtype; None takes the whole dim.

        It may share memory with what it was read from: copy it to keep it or to write to it.
        """
        ...

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Compares every file of the directory with its SHA-256 manifest.

        Args:
            progress: called with the number of bytes hashed since its last call.

        Raises:
            CheckpointError: names the file that is missing, not listed, or differs.
        """
        ...

    def reader_of(self, mapping: ParamMapping) -> Read:
        """Returns `read` with the mapping's tensors by their index."""

        def read(index: int, rows: slice | None = None, cols: slice | None = None) -> Tensor:
            return self.read(mapping.hf[index], rows, cols)

        return read
