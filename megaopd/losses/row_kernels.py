"""The work that touches every logit: three functions of a tile of rows, in plain torch.

A tile is z (student) and u (teacher), [C, V] logits of any float dtype. Per row a function returns
scalars [C]; nothing but the gradient is as wide as the tile when these are compiled, and in eager mode
the temporaries are as wide as a tile, which the caller keeps small.

Logits below `LOGIT_FLOOR`, -inf among them, count as `LOGIT_FLOOR`: a masked token has probability
exactly 0 and a finite log-ratio. Differences are taken before the temperature and before anything is
exponentiated: d = ((z - u) - (max z - max u)) / tau - log_ratio, so that near-equal logits of any size
keep their digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaopd.losses.divergences import Part, forward_kl_pull

LOGIT_FLOOR = -32768.0


def widen(logits: Tensor) -> Tensor:
    """To fp32 (fp64 stays), floored; NaN stays NaN."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.clamp(min=LOGIT_FLOOR)


def normalisers(z: Tensor, u: Tensor, inv_tau: float, extra_inv_tau: float | None) -> list[Tensor]:
    """Row statistics of both softmaxes.

    Returns:
        [C] each: max z, max u, then for z and u sum e and sum e (x - max) / tau with
        e = exp((x - max) / tau), then, if `extra_inv_tau` is given, sum e at that temperature.
    """
    found = []
    maxima = []
    for x in (widen(z), widen(u)):
        top = x.amax(dim=1, keepdim=True)
        centred = x - top
        scaled = centred * inv_tau
        e = torch.exp(scaled)
        maxima.append(top[:, 0])
        found.append([e.sum(dim=1), (e * scaled).sum(dim=1)])
        if extra_inv_tau is not None:
            found[-1].append(torch.exp(centred * extra_inv_tau).sum(dim=1))
    (sum_z, dot_z, *more_z), (sum_u, dot_u, *more_u) = found
    return [*maxima, sum_z, sum_u, dot_z, dot_u, *more_z, *more_u]


def probabilities(
    z: Tensor,
    u: Tensor,
    inv_tau: float,
    max_z: Tensor,
    max_u: Tensor,
    scale_z: Tensor,
    scale_u: Tensor,
    log_ratio: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """p = scale_z exp((z - max_z) / tau), q likewise, and d = log p - log q; row scalars are [C]."""
    wide_z, wide_u = widen(z), widen(u)
    p = torch.exp((wide_z - max_z[:, None]) * inv_tau) * scale_z[:, None]
    q = torch.exp((wide_u - max_u[:, None]) * inv_tau) * scale_u[:, None]
    d = ((wide_z - wide_u) - (max_z - max_u)[:, None]) * inv_tau - log_ratio[:, None]
    return p, q, d


def part_sums(p: Tensor, q: Tensor, d: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Row sums of value and pull of each part, then sum (q - p): how far `log_ratio` is off."""
    sums = []
    for part in parts:
        sums += [part.value(p, q, d).sum(dim=1), part.pull(p, q, d).sum(dim=1)]
    sums.append(-forward_kl_pull(p, q, d).sum(dim=1))
    return sums


def local_pass(
    z: Tensor, u: Tensor, inv_tau: float, extra_inv_tau: float | None, parts: Sequence[Part]
) -> list[Tensor]:
    """`normalisers`, then with the tile's own softmaxes log_ratio and `part_sums`."""
    stats = normalisers(z, u, inv_tau, extra_inv_tau)
    max_z, max_u, sum_z, sum_u = stats[:4]
    log_ratio = torch.log(sum_z / sum_u)
    p, q, d = probabilities(z, u, inv_tau, max_z, max_u, 1 / sum_z, 1 / sum_u, log_ratio)
    return [*stats, log_ratio, *part_sums(p, q, d, parts)]


def global_sums(
    z: Tensor, u: Tensor, inv_tau: float, parts: Sequence[Part], *rows: Tensor
) -> list[Tensor]:
    """`part_sums` under softmaxes whose row scalars (see `probabilities`) came from all shards."""
    return part_sums(*probabilities(z, u, inv_tau, *rows), parts)


def gradient(
    z: Tensor,
    u: Tensor,
    inv_tau: float,
    parts: Sequence[Part],
    mean_pull: Tensor,
    row_weight: Tensor,
    *rows: Tensor,
) -> Tensor:
    """row_weight (pull - p mean_pull), [C, V] in the wide dtype; `row_weight` holds the 1 / tau."""
    p, q, d = probabilities(z, u, inv_tau, *rows)
    total = -p * mean_pull[:, None]
    for part in parts:
        total = total + part.pull(p, q, d) * part.weight
    return total * row_weight[:, None]
