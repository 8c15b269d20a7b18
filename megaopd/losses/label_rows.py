"""The log-probability of one token per row of vocabulary-parallel logits, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaopd.losses.row_kernels import widen
from megaopd.losses.shard_scalars import NO_MASS
from megaopd.losses.torch_backend import stack_tiles, tiles
from megaopd.losses.vocab_shard import VocabShard


@dataclass(frozen=True)
class LabelRows:
    """What `label_rows` finds, [C] fp64, the same on every rank.

    Attributes:
        logprobs: log p(label), p = softmax(z / tau).
        sampler_logprobs: the same at the sampler's temperature.
        entropy: of p, nats.
        log_total: log sum exp(z / tau).
    """

    logprobs: Tensor
    sampler_logprobs: Tensor
    entropy: Tensor
    log_total: Tensor


def label_rows(
    shard: VocabShard, z: Tensor, labels: Tensor, temperature: float, sampler_temperature: float
) -> LabelRows:
    """One streaming pass and one all-gather of at most four scalars per row.

    Args:
        z: [C, shard.num_columns], any float dtype.
        labels: [C] global ids.
        temperature, sampler_temperature: positive.
    """
    # A temperature of its own costs one more exponential per logit.
    taus = (
        [temperature] if sampler_temperature == temperature else [temperature, sampler_temperature]
    )
    num_rows = z.shape[0]
    zero = z.new_zeros(num_rows, dtype=torch.float64)
    picked, entropy, masses = zero, zero, [zero + NO_MASS for _ in taus]
    if z.shape[1]:
        local, owned = shard.local_ids(labels)
        picked = torch.where(owned, widen(z.gather(1, local[:, None]))[:, 0].double(), 0.0)

        def of_tile(rows: slice) -> list[Tensor]:
            wide = widen(z[rows])
            top = wide.amax(dim=1, keepdim=True)
            centred = (wide - top) / taus[0]
            e = torch.exp(centred)
            found = [top[:, 0], e.sum(dim=1), (e * centred).sum(dim=1)]
            return found + [torch.exp((wide - top) / tau).sum(dim=1) for tau in taus[1:]]

        top, total, dot, *others = stack_tiles(map(of_tile, tiles(z)), num_rows)
        masses = [top / t + s.log() for t, s in zip(taus, (total, *others), strict=True)]
        entropy = total.log() - dot / total
    gathered = shard.all_gather(torch.stack([picked, entropy, *masses]))
    label_logits = gathered[:, 0].sum(0)
    log_totals = gathered[:, 2:].logsumexp(0)
    log_w = gathered[:, 2] - log_totals[0]
    logprobs = [label_logits / t - log_total for t, log_total in zip(taus, log_totals, strict=True)]
    return LabelRows(
        logprobs[0],
        logprobs[-1],
        (log_w.exp() * (gathered[:, 1] - log_w)).sum(0),
        log_totals[0],
    )


def write_label_gradient(
    shard: VocabShard,
    z: Tensor,
    labels: Tensor,
    found: LabelRows,
    temperature: float,
    upstream: Tensor,
    entropy_upstream: Tensor | None = None,
) -> None:
    """Overwrites z with upstream_t d log p(label_t) / dz_t + entropy_upstream_t dH_t / dz_t, which
    are upstream_t (1[label_t] - p) / tau and -entropy_upstream_t p (log p + H_t) / tau; no
    collective.

    Args:
        z, labels, temperature: as given to `label_rows`.
        found: what it returned.
        upstream, entropy_upstream: [C].
    """
    if not z.shape[1]:
        return
    local, owned = shard.local_ids(labels)
    for rows in tiles(z):
        wide = widen(z[rows])
        scale = (upstream[rows] / temperature).to(wide.dtype)[:, None]
        log_p = (wide / temperature).sub_(found.log_total[rows, None].to(wide.dtype))
        p = torch.exp(log_p)
        if entropy_upstream is None:
            gradient = p.mul_(-scale)
        else:
            rate = (entropy_upstream[rows] / temperature).to(wide.dtype)[:, None]
            log_p.add_(found.entropy[rows, None].to(wide.dtype)).mul_(rate).add_(scale)
            gradient = p.mul_(log_p.neg_())
        gradient.scatter_add_(1, local[rows, None], torch.where(owned[rows, None], scale, 0.0))
        z[rows] = gradient.to(z.dtype)
