"""`row_kernels` over tiles: eager, or compiled by torch.compile into one loop per pass.

Compiled kernels are made once per terms of a divergence, temperature, dtype and vocabulary width,
are dynamic in the number of rows, and torch keeps the machine code on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megaopd.losses import row_kernels
from megaopd.losses.divergences import Part
from megaopd.losses.shard_scalars import (
    ShardScalars,
    from_normalisers,
    max_gap,
    rescale,
)

# Elements of a tile. Eager temporaries should stay in a core's L2 cache, and so should those that
# inductor makes for the terms without a chain rule (fewer if a tile is one row). The other compiled
# kernels have none, and the tile's logits, read two or three times, stay in L3.
_EAGER_TILE = {"cpu": 2**17, "cuda": 2**26}
_COMPILED_TILE = {"cpu": 2**20, "cuda": 2**26}

_COMPILE_OPTIONS: dict[str, Any] = {
    # Multiply-adds in one rounding: fewer instructions, no less exact.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Rewrites of attention and the like; to set them up takes longer than to compile a kernel.
    "pattern_matcher": False,
}
# An expression that is long and used more than once inductor would write to an array as wide as the
# tile; here it stays in registers. Tracing time grows with a power of the expression's depth:
# not for the mixtures' kernels.
_IN_REGISTERS = {"realize_opcount_threshold": 2**20, "realize_reads_threshold": 2**20}

# The one-pass form subtracts two numbers; where they are this many times the result (a peaked
# student beside a flat teacher), the row is done again in two passes.
_MAX_CANCELLATION = 32.0


def tiles(z: Tensor, elements: int | None = None) -> Iterator[slice]:
    """Row slices of [C, V] with about `elements` elements; one empty slice for C = 0."""
    if elements is None:
        elements = _EAGER_TILE.get(z.device.type, _EAGER_TILE["cpu"])
    rows = max(1, elements // max(1, z.shape[1]))
    for start in range(0, max(1, z.shape[0]), rows):
        yield slice(start, min(start + rows, z.shape[0]))


def stack_tiles(per_tile: Iterable[list[Tensor]], num_rows: int) -> list[Tensor]:
    """Per tile a list of [c] -> a list of [C = num_rows] in fp64.

    A tile's results are copied out before the next tile is computed. Kept, they would lie in the
    memory that the tile's temporaries have left, the next tile's would no longer fit there, and the
    heap would grow by a tile each time.
    """
    columns: list[Tensor] = []
    start = 0
    for found in per_tile:
        if not columns:
            columns = [x.new_empty(num_rows, dtype=torch.float64) for x in found]
        rows = slice(start, start + len(found[0]))
        start = rows.stop
        for index, column in enumerate(columns):
            column[rows] = found[index]
        found.clear()
    return columns


class TorchBackend:
    """The passes over logits of one divergence at one temperature.

    Args:
        parts: the terms.
        inv_tau: 1 / temperature.
        extra_inv_tau: 1 / temperature of the label log-probs if that differs, else None.
        entropy_coef: of the entropy that the loss is less by.
        compiled: whether the kernels go through torch.compile.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        inv_tau: float,
        extra_inv_tau: float | None,
        compiled: bool,
        entropy_coef: float = 0.0,
    ) -> None:
        self.parts, self.inv_tau, self.extra_inv_tau = parts, inv_tau, extra_inv_tau
        # Columns of what the gradient's kernel takes, not constants of it: see `row_kernels`.
        self.coefs = (entropy_coef, *(part.weight for part in parts))
        parts = tuple(replace(part, weight=1.0) for part in parts)
        chained = all(part.order is not None for part in parts)
        self.tile_elements = _COMPILED_TILE if compiled and chained else _EAGER_TILE
        self.pair = _paired if compiled else _unpaired
        bind = _compiled if compiled else _bound
        self._normalisers = bind(row_kernels.normalisers, inv_tau, extra_inv_tau)
        self._pivot_pass = bind(row_kernels.pivot_pass, parts, inv_tau, extra_inv_tau)
        self._local_pass = bind(row_kernels.local_pass, parts, inv_tau, extra_inv_tau, False)
        self._refined_pass = bind(row_kernels.local_pass, parts, inv_tau, extra_inv_tau, True)
        self._part_sums = bind(row_kernels.part_sums, parts, inv_tau)
        constants = (parts, inv_tau, entropy_coef != 0)
        self._write_gradient = bind(row_kernels.write_gradient, *constants)
        self._overwrite_with_gradient = bind(row_kernels.overwrite_with_gradient, *constants)

    def _tiles(self, z: Tensor) -> Iterator[slice]:
        kinds = self.tile_elements
        return tiles(z, kinds.get(z.device.type, kinds["cpu"]))

    def _over_tiles(
        self, kernel: Callable[..., list[Tensor]], z: Tensor, u: Tensor
    ) -> list[Tensor]:
        """The row maxima of z and u, then what the kernel finds."""

        def of_tile(t: slice) -> list[Tensor]:
            maxima = [row_kernels.row_maximum(x[t]) for x in (z, u)]
            return [*maxima, *kernel(*self.pair(z[t], u[t]), *maxima)]

        return stack_tiles(map(of_tile, self._tiles(z)), len(z))

    def normalise(self, z: Tensor, u: Tensor) -> ShardScalars:
        """Masses and entropies only; values and pulls stay empty."""
        stats = self._over_tiles(self._normalisers, z, u)
        return from_normalisers(stats, self.inv_tau, self.extra_inv_tau)[0]

    def local_divergence(self, z: Tensor, u: Tensor, refine: bool) -> ShardScalars:
        """Everything under the shard's own softmaxes, in two passes over each tile.

        Args:
            refine: correct the log-ratio by what sum (q - p) came to. Otherwise it stays the one
                that the sums were made with: its error then cancels between pull and the mean of
                    pull.
        """
        stats = self._over_tiles(self._refined_pass if refine else self._local_pass, z, u)
        found, rest = from_normalisers(stats, self.inv_tau, self.extra_inv_tau)
        log_ratio, *sums = rest
        if refine:
            drift, *sums = sums
            log_ratio = log_ratio - torch.log1p(drift)
        gap = max_gap(found.max_z, found.max_u, _wide(z, u)) * self.inv_tau
        found.log_mass_u = found.log_mass_z - (gap + log_ratio)
        found.values, found.pulls = sums[0::2], sums[1::2]
        return found

    def chain_divergence(self, z: Tensor, u: Tensor) -> ShardScalars:
        """The same for terms with a chain rule, in one pass after the maxima; pulls stay empty."""
        stats = self._over_tiles(self._pivot_pass, z, u)
        found, rest = from_normalisers(stats, self.inv_tau, self.extra_inv_tau)
        sum_z, sum_u = stats[2], stats[3]
        drift, *sums = rest
        excess = drift / sum_z
        # sum (e_u - e_z) term by term is exact where both are close, the sums where they are not.
        excess = torch.where(excess.abs() < 0.5, excess, sum_u / sum_z - 1)
        gap = max_gap(found.max_z, found.max_u, _wide(z, u)) * self.inv_tau
        found.log_mass_u = found.log_mass_z - gap + torch.log1p(excess)
        doubtful = torch.zeros_like(excess, dtype=torch.bool)
        for part, value in zip(self.parts, sums, strict=True):
            result, size = rescale(value, sum_z, excess, part.order or 0.0)
            found.values.append(result)
            doubtful |= (size > _MAX_CANCELLATION * result.abs()) & (size > 1e-9)
        again = doubtful.nonzero()[:, 0]
        if again.numel():
            self._redo(z, u, again, found)
        return found

    def _redo(self, z: Tensor, u: Tensor, again: Tensor, found: ShardScalars) -> None:
        for piece in again.split(max(1, self.tile_elements["cpu"] // z.shape[1])):
            exact = self.local_divergence(z[piece], u[piece], refine=True)
            found.log_mass_u[piece] = exact.log_mass_u
            for old, new in zip(found.values, exact.values, strict=True):
                old[piece] = new

    def global_sums(self, z: Tensor, u: Tensor, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Values and pulls per part, fp64 [C], under softmaxes given by `rows` [C, 5]."""
        found = (self._part_sums(*self.pair(z[t], u[t]), rows[t]) for t in self._tiles(z))
        sums = stack_tiles(found, len(z))
        return sums[0::2], sums[1::2]

    def write_gradient(self, z: Tensor, u: Tensor, rows: Tensor, out: Tensor) -> None:
        """The gradient into `out`, which may be z; rows [C, 7], see `row_kernels`."""
        in_place = _memory(out) == _memory(z)
        rows = torch.cat([rows, rows.new_tensor(self.coefs).expand(len(rows), -1)], dim=1)
        for t in self._tiles(z):
            teacher = u[t].clone() if _memory(u) == _memory(out) else u[t]
            if in_place:
                student, teacher = self.pair(z[t], teacher)
                self._overwrite_with_gradient(student, teacher, rows[t])
            else:
                student, teacher, target = self.pair(z[t], teacher, out[t])
                self._write_gradient(student, teacher, rows[t], target)


def _unpaired(*tiles_: Tensor) -> tuple[Tensor, ...]:
    return tiles_


def _paired(*tiles_: Tensor) -> tuple[Tensor, ...]:
    """Tiles of bf16 on a CPU as pairs, see `row_kernels`, if memory's layout allows it for all."""
    for x in tiles_:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.stride(1) != 1:
            return tiles_
        if any(n % 2 for n in (x.shape[1], x.stride(0), x.storage_offset())):
            return tiles_
    return tuple(x.view(torch.int32) for x in tiles_)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _wide(z: Tensor, u: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (z.dtype, u.dtype) else torch.float32


def _bound(function: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
    def kernel(*tensors: Tensor) -> Any:
        return function(*constants, *tensors)

    return kernel


@lru_cache(maxsize=256)
def _compiled(function: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
    """`function` with its first arguments fixed, compiled at its first call."""

    def kernel(*tensors: Tensor) -> Any:
        return function(*constants, *tensors)

    # torch.compile counts recompilations per code object: each kernel gets one of its own.
    kernel.__code__ = kernel.__code__.replace(co_name=f"{function.__name__}_kernel")
    short = function in (row_kernels.pivot_pass, row_kernels.normalisers)
    options = _COMPILE_OPTIONS | (_IN_REGISTERS if short else {})
    compiled = torch.compile(kernel, fullgraph=True, options=options)

    def call(*tensors: Tensor) -> Any:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*tensors)

    return call
