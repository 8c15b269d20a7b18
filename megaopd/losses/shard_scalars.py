"""Scalars per row of one vocabulary shard, and how those of all shards become the whole.

The two rules for a term of order a (the alpha family with both KLs, see `divergences.Part`):

- chain rule: over shards with masses w_r and v_r, D = sum_r w_r^a v_r^(1-a) D_r + D(w, v);
- rescaling: let V = sum_j value(s p_j, t q_j, log(s p_j / (t q_j))) and x = t / s - 1. Then
  D = (V / s) (1 + x)^(a-1) + c(x), c(x) = ((1 + (1-a) x) (1 + x)^(a-1) - 1) / (a (a-1)), whose
  limits are log(1 + x) - x at a = 1 and x / (1 + x) - log(1 + x) at a = 0.

So one pass over a shard, in whatever units, and three fp64 scalars per row and shard give D
exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaopd.losses.row_kernels import WIDE_GAP

# A shard without any column: log of its mass. Finite, so that differences of two stay numbers.
NO_MASS = -1e30


@dataclass
class ShardScalars:
    """One shard's scalars, [C] fp64 each, under the shard's own softmaxes.

    Attributes:
        max_z, max_u: largest logits.
        log_mass_z, log_mass_u: log sum exp(x / tau).
        entropy_z, entropy_u: nats.
        extra_masses: the two log masses at the temperature of the label log-probs, if it differs.
        values: the divergence of each part, where it was computed.
        pulls: sum of pull of each part, likewise.
    """

    max_z: Tensor
    max_u: Tensor
    log_mass_z: Tensor
    log_mass_u: Tensor
    entropy_z: Tensor
    entropy_u: Tensor
    extra_masses: list[Tensor]
    values: list[Tensor]
    pulls: list[Tensor]


def empty_shard(like: Tensor, has_extra: bool, num_values: int) -> ShardScalars:
    """The scalars of a shard that owns padding only; `like` is [C, 0]."""
    zero = like.new_zeros(like.shape[0], dtype=torch.float64)
    none = zero + NO_MASS
    extra = [none, none] if has_extra else []
    values = [zero] * num_values
    return ShardScalars(zero, zero, none, none, zero, zero, extra, values, values)


def from_normalisers(
    stats: list[Tensor], inv_tau: float, extra_inv_tau: float | None
) -> tuple[ShardScalars, list[Tensor]]:
    """`row_kernels.normalisers` in fp64, and what follows them in the list."""
    max_z, max_u, sum_z, sum_u, dot_z, dot_u, *rest = stats
    extra_masses = []
    if extra_inv_tau is not None:
        extra_z, extra_u, *rest = rest
        extra_masses = [
            max_z * extra_inv_tau + extra_z.log(),
            max_u * extra_inv_tau + extra_u.log(),
        ]
    found = ShardScalars(
        max_z=max_z,
        max_u=max_u,
        log_mass_z=max_z * inv_tau + sum_z.log(),
        log_mass_u=max_u * inv_tau + sum_u.log(),
        entropy_z=sum_z.log() - dot_z / sum_z,
        entropy_u=sum_u.log() - dot_u / sum_u,
        extra_masses=extra_masses,
        values=[],
        pulls=[],
    )
    return found, rest


def max_gap(max_z: Tensor, max_u: Tensor, kernel_dtype: torch.dtype) -> Tensor:
    """max z - max u as `row_kernels` takes it, in fp64: rounded to its dtype unless it is wide."""
    rounded = (max_z.to(kernel_dtype) - max_u.to(kernel_dtype)).double()
    return torch.where(rounded.abs() > WIDE_GAP, max_z - max_u, rounded)


def rescale(value: Tensor, mass: Tensor, excess: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """The rescaling rule.

    Args:
        value: V; mass: s; excess: x; all fp64.

    Returns:
        D, and the size of the two terms it is the difference of: D has lost
        log10(size / D) digits.
    """
    if order == 1:
        correction = torch.log1p(excess) - excess
        scaled = value / mass
    elif order == 0:
        correction = excess / (1 + excess) - torch.log1p(excess)
        scaled = value / (mass * (1 + excess))
    else:
        power = (1 + excess) ** (order - 1)
        correction = ((1 + (1 - order) * excess) * power - 1) / (order * (order - 1))
        scaled = value / mass * power
    return scaled + correction, scaled.abs() + correction.abs()
