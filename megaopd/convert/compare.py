"""Compares the tensors of two sources, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megaopd.errors import CheckpointError
from megaopd.models.hf_io import WeightSource

# Of one side; a few times that is in memory at once.
BLOCK_BYTES = 64 << 20

EQUAL, _ROUNDED = "bit for bit", " rounded to "
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorsCompared:
    """What was compared.

    Attributes:
        tensors: how many.
        values: elements of all of them.
        equality: in what sense they are equal -> how many tensors.
    """

    tensors: int
    values: int
    equality: dict[str, int]

    def __str__(self) -> str:
        senses = "; ".join(
            sense if number == self.tensors else f"{number:,} {sense}"
            for sense, number in self.equality.items()
        )
        return f"{self.tensors:,} tensors, {self.values:,} values: {senses}"

    def __add__(self, other: TensorsCompared) -> TensorsCompared:
        senses = dict(self.equality)
        for sense, number in other.equality.items():
            senses[sense] = senses.get(sense, 0) + number
        return TensorsCompared(self.tensors + other.tensors, self.values + other.values, senses)


def compare_tensors(
    ours: WeightSource,
    theirs: WeightSource,
    names: list[str],
    progress: Callable[[int], None] | None = None,
) -> TensorsCompared:
    """Compares tensors that both have in one shape, bit for bit.

    Where the dtypes differ one side was converted, and equal means: the same values, or one side
    rounded to the other's dtype gives its bits.

    Args:
        progress: called with the bytes of `theirs` that were compared since its last call.

    Raises:
        CheckpointError: the first tensor that differs: where, and by how much.
    """
    compared = TensorsCompared(0, 0, {})
    for name in names:
        senses: set[str] | None = None
        values = 0
        for rows in _blocks(ours, theirs, name):
            block = theirs.read(name, rows)
            equal_in = _senses(ours.read(name, rows), block)
            senses = equal_in if senses is None else senses & equal_in
            if not senses:
                raise _difference(ours, theirs, name)
            values += block.numel()
            if progress is not None:
                progress(block.numel() * block.element_size())
        best = min(senses or {EQUAL}, key=lambda sense: (_ROUNDED in sense, sense))
        compared += TensorsCompared(1, values, {best: 1})
    return compared


def _blocks(ours: WeightSource, theirs: WeightSource, name: str) -> Iterator[slice | None]:
    """Runs of rows, of `BLOCK_BYTES` in the wider dtype."""
    shape = ours.shape(name)
    itemsize = max(source.dtype(name).itemsize for source in (ours, theirs))
    if not shape:
        yield None
        return
    row_bytes = itemsize * torch.Size(shape[1:]).numel()
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _senses(a: Tensor, b: Tensor) -> set[str]:
    """The senses in which two tensors are equal."""
    if a.dtype == b.dtype:
        return {EQUAL} if _same_bits(a, b) else set()
    wide = torch.promote_types(a.dtype, b.dtype)
    found = set()
    if _same_bits(a.to(wide), b.to(wide)):
        found.add(f"the same values in {_named(a.dtype)} and {_named(b.dtype)}")
    for x, y in ((a, b), (b, a)):
        if x.dtype.itemsize >= y.dtype.itemsize and _same_bits(x.to(y.dtype), y):
            found.add(f"{_named(x.dtype)}{_ROUNDED}{_named(y.dtype)}")
    return found


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    integer = _BITS[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def _difference(ours: WeightSource, theirs: WeightSource, name: str) -> CheckpointError:
    """Says where the tensor differs first, in how many values and by how much."""
    first = ""
    number, total, largest = 0, 0, 0.0
    for rows in _blocks(ours, theirs, name):
        a, b = ours.read(name, rows), theirs.read(name, rows)
        if a.dtype.itemsize > b.dtype.itemsize:
            a = a.to(b.dtype)
        elif b.dtype.itemsize > a.dtype.itemsize:
            b = b.to(a.dtype)
        x, y = a.double(), b.double()
        differs = (x != y) | (torch.signbit(x) != torch.signbit(y))
        number, total = number + int(differs.sum()), total + differs.numel()
        if not first and differs.any():
            at = torch.unravel_index(differs.flatten().int().argmax(), differs.shape)
            index = [int(i) for i in at]
            shown = [index[0] + (rows.start if rows else 0), *index[1:]] if index else []
            first = f"{y[tuple(index)]:.9g} against {x[tuple(index)]:.9g} at {shown}"
        delta = (x - y).abs()
        largest = max(largest, float("inf") if delta.isnan().any() else float(delta.max()))
    return CheckpointError(
        theirs.where(name),
        f"differs from {ours.where(name)}: {first}; {number:,} of {total:,} values, by up to "
        f"{largest:.3g}",
        "convert again, and check the disk if it happens twice",
    )
