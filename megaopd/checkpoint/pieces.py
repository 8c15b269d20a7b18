"""Pieces of global tensors, as checkpoints of a training hold them.

A rank owns runs of elements: the distributed optimizer cuts a parameter's shard wherever its share
ends, in the middle of a row too. A run is stored as the few blocks that it is made of, so that what
is stored says nothing of the layout that stored it, and any other one reads its own part.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaopd.checkpoint.chunks import ChunkReader
from megaopd.checkpoint.keys import StoredParam
from megaopd.checkpoint.metadata import Chunk, StoredTensor, read_metadata
from megaopd.errors import CheckpointError
from megaopd.models.mapping import Shape

_OTHER_RUN = "resume with the run's own configuration"


@dataclass(frozen=True)
class Place:
    """Where a contiguous run of a local tensor's elements lies in a stored tensor.

    Attributes:
        block: the place of the whole run, row-major.
        start: where the run begins in the flattened local tensor.
        is_main: whether this rank's part of it is stored; else another rank holds the same.
        padded: the first dim of the stored tensor may have another length: of a vocabulary's
            padding, which is zero.
    """

    block: StoredParam
    start: int
    is_main: bool
    padded: bool = False

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.block.shape)


@dataclass(frozen=True)
class Piece:
    """A block of a stored tensor and the memory of this rank that holds its values.

    Attributes:
        values: a view of `block`'s number of elements, of any shape.
    """

    block: StoredParam
    values: Tensor
    padded: bool = False


def pieces(
    prefix: str, places: list[Place], values: Tensor, start: int = 0, *, for_saving: bool
) -> Iterator[Piece]:
    """The pieces that a run of a local tensor's elements consists of.

    Args:
        prefix: put before the keys of the places.
        places: of the local tensor.
        values: 1-D view of its elements from `start` on.
        for_saving: leave out what another rank stores.
    """
    for place in places:
        low, high = max(start, place.start), min(start + values.numel(), place.stop)
        if low >= high or (for_saving and not place.is_main):
            continue
        block = place.block
        first = low
        for offset, shape in blocks_of_run(block.shape, low - place.start, high - place.start):
            count = math.prod(shape)
            at = tuple(o + d for o, d in zip(block.offset, offset, strict=True))
            part = StoredParam(prefix + block.key, block.global_shape, at, shape)
            yield Piece(part, values[first - start : first - start + count], place.padded)
            first += count


def blocks_of_run(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """The (offset, shape) of blocks that elements [start, stop) of a row-major tensor make up, in
    order; at most two a dim and one more."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first = -(-start // row)
    if start % row or stop < start + row:
        # The run begins or lies inside a row.
        end = min(stop, (start // row + 1) * row)
        yield from _inside_row(shape, start, end)
        start, first = end, end // row
    whole = (stop - start) // row
    if whole > 0:
        yield (first, *(0 for _ in shape[1:])), (whole, *shape[1:])
    yield from _inside_row(shape, start + max(whole, 0) * row, stop)


def _inside_row(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    if start >= stop:
        return
    row = math.prod(shape[1:])
    index = start // row
    for offset, inner in blocks_of_run(shape[1:], start - index * row, stop - index * row):
        yield (index, *offset), (1, *inner)


class StoredPieces:
    """Reads pieces out of a checkpoint of any layout, whose files have been verified.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: its metadata makes no sense.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tensors = read_metadata(directory)
        self._reader = ChunkReader(directory)
        # Stacked layers have a chunk each: those of others are not looked at.
        self._by_first: dict[tuple[str, int], list[Chunk]] = defaultdict(list)
        self._long: dict[str, list[Chunk]] = defaultdict(list)
        for key, tensor in self._tensors.items():
            for chunk in tensor.chunks:
                if chunk.shape and chunk.shape[0] == 1:
                    self._by_first[key, chunk.offset[0]].append(chunk)
                else:
                    self._long[key].append(chunk)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def fill(self, piece: Piece) -> None:
        """Copies the stored values into the piece's memory.

        Raises:
            CheckpointError: the tensor is not there, has another shape, or holes.
        """
        block, tensor = piece.block, self._tensor(piece)
        out = torch.empty(block.shape, dtype=tensor.dtype)
        if piece.padded:
            out.zero_()
        filled = 0
        for chunk in self._chunks(block):
            low = [max(a, b) for a, b in zip(block.offset, chunk.offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(
                    block.offset, block.shape, chunk.offset, chunk.shape, strict=True
                )
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            here = tuple(
                slice(a - o, b - o) for a, b, o in zip(low, high, block.offset, strict=True)
            )
            start = tuple(a - o for a, o in zip(low, chunk.offset, strict=True))
            self._reader.read(chunk, tensor.dtype, start, out[here])
            filled += out[here].numel()
        expected = out.numel()
        if piece.padded:
            rows = max(0, min(tensor.shape[0] - block.offset[0], block.shape[0]))
            expected = rows * math.prod(block.shape[1:])
        if filled != expected:
            raise CheckpointError(
                f"{self._directory}: {block.key}",
                f"holds {filled} of the {expected} elements at {list(block.offset)}",
                "use another checkpoint",
            )
        with torch.no_grad():
            piece.values.copy_(out.view(piece.values.shape))

    def _tensor(self, piece: Piece) -> StoredTensor:
        block = piece.block
        where = f"{self._directory}: {block.key}"
        tensor = self._tensors.get(block.key)
        if tensor is None:
            raise CheckpointError(
                where, "no such tensor", "resume with the run's own configuration"
            )
        ours, stored = block.global_shape, tensor.shape
        if (ours[1:], len(ours)) != (stored[1:], len(stored)) or (
            ours[0] != stored[0] and not piece.padded
        ):
            raise CheckpointError(
                where,
                f"has shape {list(stored)}, this run's has {list(ours)}",
                _OTHER_RUN,
            )
        return tensor

    def _chunks(self, block: StoredParam) -> Iterator[Chunk]:
        yield from self._long[block.key]
        for index in range(block.offset[0], block.offset[0] + block.shape[0]):
            yield from self._by_first.get((block.key, index), ())
