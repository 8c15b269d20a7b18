"""The weights of a Megatron checkpoint under their Hugging Face names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megaopd.checkpoint.chunks import ChunkReader
from megaopd.checkpoint.keys import StoredParam, is_model_key, locate_params, param_shape
from megaopd.checkpoint.metadata import COMMON, METADATA, Chunk, StoredTensor, read_metadata
from megaopd.errors import CheckpointError
from megaopd.models.arch import read_arch
from megaopd.models.families import param_mappings
from megaopd.models.hf_io.source import WeightSource
from megaopd.models.mapping import (
    ColumnParallel,
    GatedMLP,
    ParamMapping,
    Replicated,
    RowParallel,
    Shape,
    Vocab,
)
from megaopd.storage.manifest import check_listing, read_manifest, verify_manifest
from megaopd.storage.steps import find_checkpoint, hf_directory

_OTHER_CONFIG = "check that hf/config.json belongs to these weights"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Layouts whose Hugging Face tensors are runs of the parameter's rows: -> first row of the index-th.
# The others are read whole.
_FIRST_ROW: dict[type, Callable[[ParamMapping, int], int]] = {
    ColumnParallel: lambda mapping, index: 0,
    RowParallel: lambda mapping, index: 0,
    Replicated: lambda mapping, index: 0,
    Vocab: lambda mapping, index: 0,
    GatedMLP: lambda mapping, index: index * mapping.layout.hf_shapes()[0][0],
}


class MegatronReader(WeightSource):
    """A `WeightSource` over a checkpoint of any layout; reads one parameter at a time.

    Before anything is parsed, every file is looked for and the small ones, of which some are
    pickles, are compared with the manifest. The data files are compared by `verify`; whatever is in
    them, reading executes nothing.

    Args:
        path: the directory of all steps, or of one.
        step: which; None is the newest complete one.

    Attributes:
        path: the step's directory.
        arch: the model's architecture.

    Raises:
        CheckpointError: the step is missing, incomplete, damaged, or no model's.
        ConfigError: the architecture is not supported.
    """

    def __init__(self, path: str | Path, step: int | None = None) -> None:
        self.path = find_checkpoint(path, step)
        listed = read_manifest(self.path)
        check_listing(self.path, listed)
        verify_manifest(self.path, [n for n in _SMALL_FILES if (self.path / n).exists()])
        if METADATA not in listed:
            raise CheckpointError(
                str(self.path / METADATA), "is missing", "give a torch_dist checkpoint"
            )
        self.arch = read_arch(hf_directory(self.path))
        self._mappings = param_mappings(self.arch)
        self._hf = {
            hf: (mapping, index)
            for mapping in self._mappings.values()
            for index, hf in enumerate(mapping.hf)
        }
        self._tensors = {
            key: tensor for key, tensor in read_metadata(self.path).items() if is_model_key(key)
        }
        shapes = {key: tensor.shape for key, tensor in self._tensors.items()}
        self._located, self._unexpected = locate_params(self.arch, shapes, str(self.path))
        self._chunks = _by_axes(self._located, self._tensors)
        self._checked: dict[str, StoredParam] = {}
        self._reader = ChunkReader(self.path)
        self._last: tuple[str, tuple[Tensor, ...]] | None = None

    def names(self) -> frozenset[str]:
        """Hugging Face names of what is there, and keys of what no model has."""
        there = {hf for name in self._located for hf in self._mappings[name].hf}
        return frozenset(there | set(self._unexpected))

    def where(self, name: str) -> str:
        if name in self._hf and (place := self._located.get(self._hf[name][0].megatron)):
            return f"{self.path}: {name} ({_shown(place)})"
        return f"{self.path}: {name}"

    def shape(self, name: str) -> Shape:
        """Shape as it is read.

        Raises:
            CheckpointError: the stored parameter has a shape from which it cannot be read.
        """
        if name in self._unexpected:
            return self._tensors[name].shape
        mapping, index = self._mapping(name)
        self._place(mapping)
        return mapping.layout.hf_shapes()[index]

    def _mapping(self, name: str) -> tuple[ParamMapping, int]:
        """The parameter of a tensor, and the tensor's index among those of the parameter."""
        if name not in self._hf:
            raise CheckpointError(self.where(name), "no such tensor", _OTHER_CONFIG)
        return self._hf[name]

    def _place(self, mapping: ParamMapping) -> StoredParam:
        """The parameter's place, if it has the shape that config.json asks for."""
        if mapping.megatron in self._checked:
            return self._checked[mapping.megatron]
        if (place := self._located.get(mapping.megatron)) is None:
            raise CheckpointError(self.where(mapping.hf[0]), "no such tensor", _OTHER_CONFIG)
        # Embedding and head may have any padding.
        rows = place.param_shape[0] if place.param_shape else 0
        vocab_rows = max(rows, self.arch.vocab_size)
        expected = param_shape(mapping, vocab_rows)
        if place.param_shape != expected:
            if isinstance(mapping.layout, Vocab):
                expected = (self.arch.vocab_size, *expected[1:])
            raise CheckpointError(
                self.where(mapping.hf[0]),
                f"has shape {list(place.param_shape)}, config.json says {list(expected)}",
                _OTHER_CONFIG,
            )
        self._checked[mapping.megatron] = place
        return place

    def dtype(self, name: str) -> torch.dtype:
        key = name if name in self._unexpected else self._place(self._mapping(name)[0]).key
        dtype = self._tensors[key].dtype
        if dtype not in _DTYPES:
            raise CheckpointError(
                self.where(name), f"has dtype {dtype}", "save the model in fp32 or bf16"
            )
        return dtype

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """Returns a slice of the tensor in memory of its own, unless it shares it with the other
        tensors of the same parameter; None takes the whole dim."""
        mapping, index = self._mapping(name)
        place, shape = self._place(mapping), mapping.layout.hf_shapes()[index]
        dtype = self.dtype(name)
        first_row = _FIRST_ROW.get(type(mapping.layout))
        if first_row is None:
            whole = self._exported(mapping, place, dtype)[index]
            part = whole[rows or slice(None)]
            return part if cols is None else part[:, cols]
        ranges = [(0, size) for size in shape]
        for dim, wanted in enumerate((rows, cols)):
            if wanted is not None:
                start, stop, _ = wanted.indices(shape[dim])
                ranges[dim] = (start, max(start, stop))
        skipped = first_row(mapping, index)
        ranges[0] = (ranges[0][0] + skipped, ranges[0][1] + skipped)
        return self._assemble(place, dtype, ranges)

    def _exported(
        self, mapping: ParamMapping, place: StoredParam, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """All Hugging Face tensors of a parameter; those of the last one are kept, because they are
        asked for one after another."""
        if self._last is None or self._last[0] != mapping.megatron:
            self._last = None  # its memory goes before the next takes its own
            whole = self._assemble(place, dtype, [(0, size) for size in place.param_shape])
            self._last = mapping.megatron, mapping.layout.export([whole])
        return self._last[1]

    def _assemble(
        self, place: StoredParam, dtype: torch.dtype, ranges: list[tuple[int, int]]
    ) -> Tensor:
        """Puts a block of a parameter together from the chunks that hold some of it.

        Args:
            ranges: (start, stop) of each dim of the parameter.
        """
        num_axes, axes = place.num_axes, place.axes
        out = torch.empty([stop - start for start, stop in ranges], dtype=dtype)
        covered: list[list[tuple[int, int]]] = []
        for chunk in self._chunks[place.key, axes]:
            own = zip(chunk.offset[num_axes:], chunk.shape[num_axes:], strict=True)
            common = [
                (max(start, low), min(stop, low + size))
                for (start, stop), (low, size) in zip(ranges, own, strict=True)
            ]
            if any(start >= stop for start, stop in common):
                continue
            target = out[
                tuple(
                    slice(a - start, b - start)
                    for (a, b), (start, _) in zip(common, ranges, strict=True)
                )
            ]
            begin = (*axes, *(a for a, _ in common))
            start_in_chunk = tuple(i - o for i, o in zip(begin, chunk.offset, strict=True))
            self._reader.read(
                chunk, dtype, start_in_chunk, target[(None,) * num_axes] if num_axes else target
            )
            covered.append(common)
        self._check_covered(place, covered, out.numel())
        return out

    def _check_covered(
        self, place: StoredParam, parts: list[list[tuple[int, int]]], num_elements: int
    ) -> None:
        """Checks that the parts are all there and none is there twice."""
        found = sum(torch.Size([b - a for a, b in part]).numel() for part in parts)
        overlap = any(
            all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))
            for one, other in itertools.combinations(parts, 2)
        )
        if found != num_elements or overlap:
            raise CheckpointError(
                f"{self.path / METADATA}: {_shown(place)}",
                "its chunks do not cover it exactly once",
                "save or convert the checkpoint again",
            )

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        verify_manifest(self.path, progress=progress)

    def check_padding(self) -> str:
        """Checks that the rows after the vocabulary are zero, as every checkpoint of ours has them.

        Returns:
            What there is, in a few words.

        Raises:
            CheckpointError: a row is not zero.
        """
        num_rows = 0
        for name, place in self._located.items():
            mapping = self._mappings[name]
            if not isinstance(mapping.layout, Vocab):
                continue
            self._place(mapping)
            rows, cols = place.param_shape
            padding = self._assemble(
                place, self.dtype(mapping.hf[0]), [(self.arch.vocab_size, rows), (0, cols)]
            )
            if padding.any():
                row = self.arch.vocab_size + int(padding.any(dim=1).int().argmax())
                raise CheckpointError(
                    self.where(mapping.hf[0]),
                    f"row {row}, after the vocabulary of {self.arch.vocab_size}, is not zero",
                    "check where the checkpoint comes from; the row is not used",
                )
            num_rows += len(padding)
        return f"{num_rows} rows, all zero"


_SMALL_FILES = {METADATA, COMMON, "metadata.json", "hf/config.json"}


def _by_axes(
    located: Mapping[str, StoredParam], tensors: Mapping[str, StoredTensor]
) -> dict[tuple[str, Shape], list[Chunk]]:
    """(key, layer and expert) -> the chunks that hold some of it.

    A stacked tensor has a chunk for every layer and rank; looking through all of them for every
    parameter would take the square of their number.
    """
    num_axes = {place.key: place.num_axes for place in located.values()}
    found: dict[tuple[str, Shape], list[Chunk]] = {
        (place.key, place.axes): [] for place in located.values()
    }
    for key, count in num_axes.items():
        for chunk in tensors[key].chunks:
            spans = zip(chunk.offset[:count], chunk.shape[:count], strict=True)
            for axes in itertools.product(*(range(o, o + n) for o, n in spans)):
                found[key, axes].append(chunk)
    return found


def _shown(place: StoredParam) -> str:
    return place.key + "".join(f"[{index}]" for index in place.axes)
