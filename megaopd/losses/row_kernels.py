"""The work that touches every logit, as functions of a tile of rows in plain torch.

A tile is z (student) and u (teacher), [C, V] logits of any float dtype; results are scalars per
row, [C], except for the gradient. Nothing else is as wide as the tile once these are compiled; in
eager mode the temporaries are, so the caller keeps tiles small (`torch_backend`). `triton_backend`
does the same work on a GPU.

Logits below `LOGIT_FLOOR`, -inf among them, count as `LOGIT_FLOOR`: a masked token has probability
exactly 0 and a finite log-ratio. Differences are taken before the temperature and before anything
is exponentiated, see `_centred_difference`.

Row scalars, as `probabilities` takes them, stacked [C, 5]: max_z, max_u, scale_z, scale_u,
log_ratio; p = scale_z exp((z - max_z) / tau), q likewise, and d = log p - log q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaopd.losses.divergences import Part, forward_kl_pull

LOGIT_FLOOR = -32768.0

# Where max z - max u is larger, logits are compared after each is centred on its own maximum.
WIDE_GAP = 64.0

Parts = Sequence[Part]


def widen(logits: Tensor) -> Tensor:
    """To fp32 (fp64 stays), floored; NaN stays NaN."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.clamp(min=LOGIT_FLOOR)


def _maximum(logits: Tensor) -> Tensor:
    """Row maximum, [C, 1] wide."""
    return widen(logits.amax(dim=1, keepdim=True))


def _centred_difference(
    wide_z: Tensor, wide_u: Tensor, centred_z: Tensor, centred_u: Tensor, gap: Tensor
) -> Tensor:
    """(z - max z) - (u - max u), rounded as little as possible; gap = max z - max u, [C, 1].

    (z - u) - gap keeps the digits of near-equal logits, whatever their size; where one side is
    shifted far away it would lose them, and the difference of the centred logits is taken.
    """
    far = gap.abs() > WIDE_GAP
    return torch.where(far, centred_z - centred_u, (wide_z - wide_u) - gap)


def normalisers(inv_tau: float, extra_inv_tau: float | None, z: Tensor, u: Tensor) -> list[Tensor]:
    """Row statistics of both softmaxes.

    Returns:
        [C] each: max z, max u, then with e = exp((x - max) / tau) sum e of z and of u, and
        sum e (x - max) / tau of z and of u; then, if `extra_inv_tau` is given, sum e at that
        temperature of z and of u.
    """
    tops, sums, dots, extras = [], [], [], []
    for x in (z, u):
        top = _maximum(x)
        centred = widen(x) - top
        scaled = centred * inv_tau
        e = torch.exp(scaled)
        tops.append(top[:, 0])
        sums.append(e.sum(dim=1))
        dots.append((e * scaled).sum(dim=1))
        if extra_inv_tau is not None:
            extras.append(torch.exp(centred * extra_inv_tau).sum(dim=1))
    return [*tops, *sums, *dots, *extras]


def pivot_pass(
    parts: Parts, inv_tau: float, extra_inv_tau: float | None, z: Tensor, u: Tensor
) -> list[Tensor]:
    """`normalisers` and what the terms with a chain rule need, from one pass after the maxima.

    The terms are applied to e_z and e_u, which are no probabilities yet, with d = log e_z - log
    e_u; `engine` turns the sums into divergences of the softmaxes.

    Returns:
        `normalisers`, then sum (e_u - e_z), then sum value per part; [C] each.
    """
    top_z, top_u = _maximum(z), _maximum(u)
    wide_z, wide_u = widen(z), widen(u)
    centred_z, centred_u = wide_z - top_z, wide_u - top_u
    scaled_z, scaled_u = centred_z * inv_tau, centred_u * inv_tau
    e_z, e_u = torch.exp(scaled_z), torch.exp(scaled_u)
    found = [e_z, e_u, e_z * scaled_z, e_u * scaled_u]
    if extra_inv_tau is not None:
        found += [torch.exp(centred_z * extra_inv_tau), torch.exp(centred_u * extra_inv_tau)]
    d = _centred_difference(wide_z, wide_u, centred_z, centred_u, top_z - top_u) * inv_tau
    excess = parts[0].excess
    found.append(excess(e_z, e_u, d) if excess else -forward_kl_pull(e_z, e_u, d))
    found += [part.value(e_z, e_u, d) for part in parts]
    return [top_z[:, 0], top_u[:, 0], *(x.sum(dim=1) for x in found)]


def probabilities(
    inv_tau: float, z: Tensor, u: Tensor, rows: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and d = log p - log q, [C, V] wide."""
    max_z, max_u, scale_z, scale_u, log_ratio = (row[:, None] for row in rows)
    wide_z, wide_u = widen(z), widen(u)
    centred_z, centred_u = wide_z - max_z, wide_u - max_u
    p = torch.exp(centred_z * inv_tau) * scale_z
    q = torch.exp(centred_u * inv_tau) * scale_u
    difference = _centred_difference(wide_z, wide_u, centred_z, centred_u, max_z - max_u)
    return p, q, difference * inv_tau - log_ratio


def part_sums(parts: Parts, inv_tau: float, z: Tensor, u: Tensor, rows: Tensor) -> list[Tensor]:
    """Row sums of value and pull, [C] each, of every part in turn.

    Args:
        rows: [C, 5] row scalars.
    """
    p, q, d = probabilities(inv_tau, z, u, rows.unbind(1))
    sums = []
    for part in parts:
        sums += [part.value(p, q, d).sum(dim=1), part.pull(p, q, d).sum(dim=1)]
    return sums


def local_pass(
    parts: Parts, inv_tau: float, extra_inv_tau: float | None, z: Tensor, u: Tensor
) -> list[Tensor]:
    """`normalisers`, log_ratio, sum (q - p), then the sums of `part_sums`, under the tile's
    softmaxes.

    sum (q - p), in truth 0, tells how far the rounded log_ratio is off.
    """
    stats = normalisers(inv_tau, extra_inv_tau, z, u)
    max_z, max_u, sum_z, sum_u = stats[:4]
    log_ratio = torch.log(sum_z / sum_u)
    p, q, d = probabilities(inv_tau, z, u, (max_z, max_u, 1 / sum_z, 1 / sum_u, log_ratio))
    found = [-forward_kl_pull(p, q, d)]
    for part in parts:
        found += [part.value(p, q, d), part.pull(p, q, d)]
    return [*stats, log_ratio, *(x.sum(dim=1) for x in found)]


def _gradient(parts: Parts, inv_tau: float, z: Tensor, u: Tensor, rows: Tensor) -> Tensor:
    """row_weight (pull - p mean_pull), [C, V] wide.

    Args:
        rows: [C, 7] the five row scalars, then mean_pull, then row_weight, which holds the 1 / tau.
    """
    *scalars, mean_pull, row_weight = rows.unbind(1)
    p, q, d = probabilities(inv_tau, z, u, scalars)
    total = p * -mean_pull[:, None]
    for part in parts:
        total = total + part.pull(p, q, d) * part.weight
    return total * row_weight[:, None]


def write_gradient(
    parts: Parts, inv_tau: float, z: Tensor, u: Tensor, rows: Tensor, out: Tensor
) -> None:
    """The gradient into `out`, which shares no memory with the logits, rounded to its dtype."""
    out.copy_(_gradient(parts, inv_tau, z, u, rows))


def overwrite_with_gradient(
    parts: Parts, inv_tau: float, z: Tensor, u: Tensor, rows: Tensor
) -> None:
    """The gradient into z. A function of its own: torch.compile mishandles aliased arguments."""
    z.copy_(_gradient(parts, inv_tau, z, u, rows))
