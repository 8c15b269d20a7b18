"""The work that touches every logit, as functions of a tile of rows in plain torch.

A tile is z (student) and u (teacher), [C, V] logits of any float dtype; results are scalars per
row, [C] fp64, except for the gradient. Nothing else is as wide as the tile once these are compiled;
in eager mode the temporaries are, so the caller keeps tiles small (`torch_backend`).
`triton_backend` does the same work on a GPU.

A tile may also come as pairs of bf16, [C, V / 2] int32 (`torch_backend` views it so where it can):
the bits of a bf16 shifted to the top of a word are its fp32 value, and both halves of a vector are
unpacked in one instruction each, where inductor's own conversion doubles the width of every vector
and spills. Sums do not ask which column a value came from.

Logits below `LOGIT_FLOOR`, -inf among them, count as `LOGIT_FLOOR`: a masked token has probability
exactly 0 and a finite log-ratio. Differences are taken before the temperature and before anything
is exponentiated, see `_centred_difference`.

Row scalars, as `probabilities` takes them, stacked [C, 5]: max_z, max_u, scale_z, scale_u,
log_ratio; p = scale_z exp((z - max_z) / tau), q likewise, and d = log p - log q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megaopd.losses import fast_math
from megaopd.losses.divergences import Part, forward_kl_pull

LOGIT_FLOOR = -32768.0

# Where max z - max u is larger, logits are compared after each is centred on its own maximum.
WIDE_GAP = 64.0

# Compiled sums of short expressions run over this many columns in plain vector registers and are
# then joined in fp64. Inductor makes longer sums as exact by a cascade, several instructions each.
_SUM_COLUMNS = 4096

Parts = Sequence[Part]


def widen(logits: Tensor) -> Tensor:
    """To fp32 (fp64 stays), floored; NaN stays NaN."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.clamp(min=LOGIT_FLOOR)


def _lanes(tile: Tensor) -> list[Tensor]:
    """The tile widened; of pairs of bf16 the even and the odd columns."""
    if tile.dtype != torch.int32:
        return [widen(tile)]
    halves = tile << 16, tile & -(2**16)
    return [widen(half.view(torch.float32)) for half in halves]


def _store(lanes: list[Tensor], out: Tensor) -> None:
    """Undoes `_lanes`, rounding to the nearest even; a NaN stays one."""
    if out.dtype != torch.int32:
        out.copy_(lanes[0])
        return
    even, odd = (x.view(torch.int32) for x in lanes)
    even, odd = (x + (0x7FFF + ((x >> 16) & 1)) for x in (even, odd))
    out.copy_(((even >> 16) & 0xFFFF) | (odd & -(2**16)))


def row_maximum(logits: Tensor) -> Tensor:
    """[C, V] logits -> their maxima [C], wide and floored.

    A kernel of its own: torch's runs at the speed of memory, a compiled one waits for each maximum.
    """
    if logits.dtype in (torch.bfloat16, torch.float16) and logits.device.type == "cpu":
        # Bits compare as integers like the values where those are not negative, in reverse where
        # they are. A NaN not found here shows in the sums.
        bits = logits.view(torch.int16)
        top = bits.amax(dim=1)
        if bool((top < 0).any()):
            top = torch.where(top < 0, bits.amin(dim=1), top)
        return widen(top.view(logits.dtype))
    return widen(logits.amax(dim=1))


def _row_sums(
    elements: Callable[[Tensor, Tensor], list[Tensor]],
    z: Tensor,
    u: Tensor,
    columns: int | None = None,
) -> list[Tensor]:
    """Sums over a tile's columns of everything that `elements` makes of them, [C] fp64 each.

    Args:
        elements: of wide z and u, [C, n, columns].
        columns: length of a compiled partial sum; default whole rows.
    """
    width = z.shape[1]
    if columns is None or not torch.compiler.is_compiling():
        columns = max(1, width)
    whole = width // columns * columns
    totals: list[Tensor] = []
    for start, end, size in ((0, whole, columns), (whole, width, width - whole)):
        if start == end:
            continue
        blocks = [x[:, start:end].unflatten(1, ((end - start) // size, size)) for x in (z, u)]
        found = [elements(a, b) for a, b in zip(*map(_lanes, blocks), strict=True)]
        joined = [sum(same[1:], start=same[0]) for same in zip(*found, strict=True)]
        sums = [x.sum(dim=2).sum(dim=1, dtype=torch.float64) for x in joined]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return totals


def _per_row(rows: Sequence[Tensor]) -> list[Tensor]:
    """[C] -> [C, 1, 1], as `elements` of `_row_sums` needs them."""
    return [row[:, None, None] for row in rows]


def _centred_difference(
    wide_z: Tensor, wide_u: Tensor, centred_z: Tensor, centred_u: Tensor, gap: Tensor
) -> Tensor:
    """(z - max z) - (u - max u), rounded as little as possible; gap = max z - max u.

    (z - u) - gap keeps the digits of near-equal logits, whatever their size; where one side is
    shifted far away it would lose them, and the difference of the centred logits is taken.
    """
    far = gap.abs() > WIDE_GAP
    return torch.where(far, centred_z - centred_u, (wide_z - wide_u) - gap)


def _statistics(
    inv_tau: float, extra_inv_tau: float | None, centred_z: Tensor, centred_u: Tensor
) -> list[Tensor]:
    """What `normalisers` sums, of logits less their maxima."""
    scaled_z, scaled_u = centred_z * inv_tau, centred_u * inv_tau
    e_z, e_u = fast_math.exp(scaled_z), fast_math.exp(scaled_u)
    found = [e_z, e_u, e_z * scaled_z, e_u * scaled_u]
    if extra_inv_tau is not None:
        found += [fast_math.exp(centred * extra_inv_tau) for centred in (centred_z, centred_u)]
    return found


def normalisers(
    inv_tau: float,
    extra_inv_tau: float | None,
    z: Tensor,
    u: Tensor,
    max_z: Tensor,
    max_u: Tensor,
) -> list[Tensor]:
    """Row statistics of both softmaxes.

    Args:
        max_z, max_u: [C] row maxima, wide.

    Returns:
        [C] each: with e = exp((x - max) / tau) sum e of z and of u, and sum e (x - max) / tau of z
        and of u; then, if `extra_inv_tau` is given, sum e at that temperature of z and of u.
    """
    top_z, top_u = _per_row((max_z, max_u))
    return _row_sums(
        lambda z, u: _statistics(inv_tau, extra_inv_tau, z - top_z, u - top_u),
        z,
        u,
        _SUM_COLUMNS,
    )


def pivot_pass(
    parts: Parts,
    inv_tau: float,
    extra_inv_tau: float | None,
    z: Tensor,
    u: Tensor,
    max_z: Tensor,
    max_u: Tensor,
) -> list[Tensor]:
    """`normalisers` and what the terms with a chain rule need, from one pass after the maxima.

    The terms are applied to e_z and e_u, which are no probabilities yet, with d = log e_z - log
    e_u; `engine` turns the sums into divergences of the softmaxes.

    Returns:
        `normalisers`, then sum (e_u - e_z), then sum value per part; [C] each.
    """
    top_z, top_u = _per_row((max_z, max_u))
    excess = parts[0].excess

    def elements(wide_z: Tensor, wide_u: Tensor) -> list[Tensor]:
        centred_z, centred_u = wide_z - top_z, wide_u - top_u
        found = _statistics(inv_tau, extra_inv_tau, centred_z, centred_u)
        e_z, e_u = found[:2]
        d = _centred_difference(wide_z, wide_u, centred_z, centred_u, top_z - top_u) * inv_tau
        found.append(excess(e_z, e_u, d) if excess else -forward_kl_pull(e_z, e_u, d))
        return found + [part.value(e_z, e_u, d) for part in parts]

    return _row_sums(elements, z, u, _SUM_COLUMNS)


def probabilities(
    inv_tau: float, wide_z: Tensor, wide_u: Tensor, rows: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and d = log p - log q of wide logits; rows are the five scalars, ready to broadcast."""
    max_z, max_u, scale_z, scale_u, log_ratio = rows
    centred_z, centred_u = wide_z - max_z, wide_u - max_u
    p = fast_math.exp(centred_z * inv_tau) * scale_z
    q = fast_math.exp(centred_u * inv_tau) * scale_u
    difference = _centred_difference(wide_z, wide_u, centred_z, centred_u, max_z - max_u)
    return p, q, difference * inv_tau - log_ratio


def part_sums(parts: Parts, inv_tau: float, z: Tensor, u: Tensor, rows: Tensor) -> list[Tensor]:
    """Row sums of value and pull, [C] each, of every part in turn.

    Args:
        rows: [C, 5] row scalars.
    """
    return _part_sums(parts, inv_tau, False, z, u, rows.unbind(1))


def _part_sums(
    parts: Parts, inv_tau: float, with_drift: bool, z: Tensor, u: Tensor, rows: Sequence[Tensor]
) -> list[Tensor]:
    scalars = _per_row(rows)

    def elements(wide_z: Tensor, wide_u: Tensor) -> list[Tensor]:
        p, q, d = probabilities(inv_tau, wide_z, wide_u, scalars)
        found = [-forward_kl_pull(p, q, d)] if with_drift else []
        for part in parts:
            found += [part.value(p, q, d), part.pull(p, q, d)]
        return found

    return _row_sums(elements, z, u)


def local_pass(
    parts: Parts,
    inv_tau: float,
    extra_inv_tau: float | None,
    with_drift: bool,
    z: Tensor,
    u: Tensor,
    max_z: Tensor,
    max_u: Tensor,
) -> list[Tensor]:
    """`normalisers`, log_ratio, sum (q - p) if `with_drift`, then `part_sums`, under the tile's
    softmaxes.

    sum (q - p), in truth 0, tells how far the rounded log_ratio is off.
    """
    stats = normalisers(inv_tau, extra_inv_tau, z, u, max_z, max_u)
    sum_z, sum_u = stats[:2]
    scalars = [x.to(max_z.dtype) for x in (1 / sum_z, 1 / sum_u, torch.log(sum_z / sum_u))]
    sums = _part_sums(parts, inv_tau, with_drift, z, u, (max_z, max_u, *scalars))
    return [*stats, scalars[2], *sums]


def _gradient(
    parts: Parts, inv_tau: float, bonus: bool, z: Tensor, u: Tensor, rows: Tensor
) -> list[Tensor]:
    """row_weight (sum of weight pull + p entropy_coef (z - max z) / tau - p mean_pull) as `_lanes`
    of the tile.

    The coefficients are data, so that a schedule may move them without another kernel.

    Args:
        bonus: whether there is an entropy_coef.
        rows: [C, 8 + number of parts]: the five row scalars, then mean_pull (what is the same for
            all columns of the entropy's gradient is in it), then row_weight, which holds the
            1 / tau, then entropy_coef and the parts' weights.
    """
    columns = [row[:, None] for row in rows.unbind(1)]
    scalars, (mean_pull, row_weight, entropy_coef, *weights) = columns[:5], columns[5:]
    gradient = []
    for wide_z, wide_u in zip(_lanes(z), _lanes(u), strict=True):
        p, q, d = probabilities(inv_tau, wide_z, wide_u, scalars)
        total = p * -mean_pull
        if bonus:
            total = total + p * ((wide_z - scalars[0]) * (entropy_coef * inv_tau))
        for part, weight in zip(parts, weights, strict=True):
            total = total + part.pull(p, q, d) * weight
        gradient.append(total * row_weight)
    return gradient


def write_gradient(
    parts: Parts, inv_tau: float, bonus: bool, z: Tensor, u: Tensor, rows: Tensor, out: Tensor
) -> None:
    """The gradient into `out`, which shares no memory with the logits, rounded to its dtype."""
    _store(_gradient(parts, inv_tau, bonus, z, u, rows), out)


def overwrite_with_gradient(
    parts: Parts, inv_tau: float, bonus: bool, z: Tensor, u: Tensor, rows: Tensor
) -> None:
    """The gradient into z. A function of its own: torch.compile mishandles aliased arguments."""
    _store(_gradient(parts, inv_tau, bonus, z, u, rows), z)
