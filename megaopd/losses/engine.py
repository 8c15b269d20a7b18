"""Exact divergences of vocabulary-parallel logits: forward scalars, and the gradient from them.

The engine owns tiles, tensor-parallel collectives, temperature, padded vocabulary and accumulation;
what is particular to a divergence comes from `divergences.DIVERGENCES`, what touches every logit is in
`row_kernels`. It knows nothing of autograd: `dense` and `fused` wrap it.

With phi = dD/dp, dD/dz_j = p_j (phi_j - sum_i p_i phi_i) / tau. So the backward of every divergence
needs, besides the logits, a few scalars per token, all known after the forward: it runs
without a collective.

Collectives of one `forward_rows` call over a group of more than one rank:
- terms with a chain rule (alpha family, both KLs): one all-gather;
- other terms: one all-gather for the normalisers, one all-reduce of two scalars.
Scalars travel and are combined in fp64, in rank order: every rank holds the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaopd.losses import row_kernels
from megaopd.losses.divergences import Part
from megaopd.losses.vocab_shard import VocabShard

# A shard without any column: log of its mass. Finite, so that differences of two stay numbers.
_NO_MASS = -1e30

# Elements of a tile of logits: on a CPU the temporaries of a tile should stay in the L2 cache.
_TILE_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}


@dataclass(frozen=True)
class Problem:
    """What is the same for all rows of a call.

    Attributes:
        parts: the terms of the divergence.
        temperature: tau, divides both logits.
        logprob_temperature: temperature of the label log-probs, if it differs from tau, else None.
        shard: this rank's columns.
    """

    parts: tuple[Part, ...]
    temperature: float
    logprob_temperature: float | None
    shard: VocabShard

    @property
    def one_pass(self) -> bool:
        return all(part.order is not None for part in self.parts)

    @property
    def inv_tau(self) -> float:
        return 1.0 / self.temperature

    @property
    def extra_inv_tau(self) -> float | None:
        return None if self.logprob_temperature is None else 1.0 / self.logprob_temperature


@dataclass(frozen=True)
class RowValues:
    """The forward's results, [C] in the kernels' dtype; the log-probs are None without labels."""

    loss: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None

    def as_list(self) -> list[Tensor]:
        found = [self.loss, self.student_entropy, self.teacher_entropy]
        if self.student_logprobs is not None and self.teacher_logprobs is not None:
            found += [self.student_logprobs, self.teacher_logprobs]
        return found


def tiles(z: Tensor) -> Iterator[slice]:
    """Row slices of [C, V] small enough for the cache; one empty slice for C = 0."""
    elements = _TILE_ELEMENTS.get(z.device.type, _TILE_ELEMENTS["cpu"])
    rows = max(1, elements // max(1, z.shape[1]))
    for start in range(0, max(1, z.shape[0]), rows):
        yield slice(start, min(start + rows, z.shape[0]))


def stack_tiles(per_tile: list[list[Tensor]]) -> list[Tensor]:
    """Per tile a list of [c] -> a list of [C] in fp64."""
    return [torch.cat(column).double() for column in zip(*per_tile, strict=True)]


@dataclass
class _Local:
    """One shard's scalars, [C] fp64, under the shard's own softmaxes.

    Attributes:
        log_mass_z, log_mass_u: log of sum exp(x / tau) over the shard's columns.
        entropy_z, entropy_u: of the shard's own softmaxes.
        extra_mass_z, extra_mass_u: the log masses at the other temperature, if there is one.
        values: one per part, if they were computed locally.
        pulls: likewise.
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


def _max_gap(max_z: Tensor, max_u: Tensor, kernel_dtype: torch.dtype) -> Tensor:
    """max z - max u as the kernels round it, in fp64."""
    return (max_z.to(kernel_dtype) - max_u.to(kernel_dtype)).double()


def _empty_local(problem: Problem, z: Tensor) -> _Local:
    """The scalars of a rank that owns padding only."""
    zero = z.new_zeros(z.shape[0], dtype=torch.float64)
    none = zero + _NO_MASS
    extra = [] if problem.extra_inv_tau is None else [none, none]
    values = [zero] * len(problem.parts) if problem.one_pass else []
    return _Local(zero, zero, none, none, zero, zero, extra, values, values)


def _local_scalars(problem: Problem, z: Tensor, u: Tensor) -> _Local:
    if z.shape[1] == 0:
        return _empty_local(problem, z)
    inv_tau, extra, parts = problem.inv_tau, problem.extra_inv_tau, problem.parts
    with_sums = problem.one_pass or problem.shard.size == 1
    found = []
    for rows in tiles(z):
        if with_sums:
            found.append(row_kernels.local_pass(z[rows], u[rows], inv_tau, extra, parts))
        else:
            found.append(row_kernels.normalisers(z[rows], u[rows], inv_tau, extra))
    max_z, max_u, sum_z, sum_u, dot_z, dot_u, *rest = stack_tiles(found)
    log_mass_z = max_z * inv_tau + sum_z.log()
    log_mass_u = max_u * inv_tau + sum_u.log()
    extra_masses = []
    if extra is not None:
        extra_z, extra_u, *rest = rest
        extra_masses = [max_z * extra + extra_z.log(), max_u * extra + extra_u.log()]
    values, pulls = [], []
    if with_sums:
        log_ratio, *sums, drift = rest
        # The gradient must use the log-ratio that the sums were made with: an error in it then
        # cancels between pull and its mean. Where the mean follows from the value instead (the
        # alpha family), the ratio is corrected by what the sum of q - p, in truth 0, came to.
        if problem.one_pass:
            log_ratio = log_ratio - torch.log1p(drift)
        log_mass_u = log_mass_z - (_max_gap(max_z, max_u, found[0][0].dtype) * inv_tau + log_ratio)
        values, pulls = sums[0::2], sums[1::2]
    return _Local(
        max_z=max_z,
        max_u=max_u,
        log_mass_z=log_mass_z,
        log_mass_u=log_mass_u,
        entropy_z=sum_z.log() - dot_z / sum_z,
        entropy_u=sum_u.log() - dot_u / sum_u,
        extra_masses=extra_masses,
        values=values,
        pulls=pulls,
    )


def _wide_dtype(z: Tensor, u: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (z.dtype, u.dtype) else torch.float32


def _label_logits(problem: Problem, z: Tensor, u: Tensor, labels: Tensor) -> list[Tensor]:
    """Both logits of the labels, [C] fp64, 0 where another rank owns the label."""
    if z.shape[1] == 0:
        zero = z.new_zeros(z.shape[0], dtype=torch.float64)
        return [zero, zero]
    local, owned = problem.shard.local_ids(labels)
    picked = [row_kernels.widen(x.gather(1, local[:, None]))[:, 0].double() for x in (z, u)]
    return [torch.where(owned, x, 0.0) for x in picked]


def forward_rows(
    problem: Problem, z: Tensor, u: Tensor, labels: Tensor | None = None
) -> tuple[RowValues, tuple[Tensor, ...]]:
    """Divergence, entropies and label log-probs of C rows; see the module for the collectives.

    Args:
        z: [C, shard.num_columns] student logits without padding, any float dtype.
        u: the teacher's.
        labels: [C] global ids, or None.

    Returns:
        the values, the same on every rank, and this rank's state for `gradient_rows`: mean_pull and
        the five row scalars of `row_kernels.probabilities`, [C] each.
    """
    wide, shard, parts = _wide_dtype(z, u), problem.shard, problem.parts
    local = _local_scalars(problem, z, u)
    picked = [] if labels is None else _label_logits(problem, z, u, labels)
    masses = [local.log_mass_z, local.log_mass_u, *local.extra_masses]
    carried = [
        local.entropy_z,
        local.entropy_u,
        *(local.values if problem.one_pass else []),
        *picked,
    ]
    everywhere = shard.all_gather(torch.stack([*masses, *carried]))  # [R, n, C]
    log_masses = everywhere[:, : len(masses)]
    totals = log_masses.logsumexp(dim=0)  # [2 or 4, C]
    log_w, log_v = (log_masses[:, :2] - totals[:2]).unbind(dim=1)  # shards' shares, [R, C]
    w, v = log_w.exp(), log_v.exp()
    entropy_z, entropy_u, *rest = everywhere[:, len(masses) :].unbind(dim=1)

    # Only the maxima of a shard are in logits; they may be far below those of the others.
    gap = _max_gap(local.max_z, local.max_u, wide) * problem.inv_tau
    rows = (
        local.max_z.to(wide),
        local.max_u.to(wide),
        (local.max_z * problem.inv_tau - totals[0]).exp().to(wide),
        (local.max_u * problem.inv_tau - totals[1]).exp().to(wide),
        (totals[0] - totals[1] - gap).to(wide),
    )
    if problem.one_pass:
        loss, mean_pull = torch.zeros_like(totals[0]), torch.zeros_like(totals[0])
        for part, value in zip(parts, rest[: len(parts)], strict=True):
            order = part.order or 0.0
            within = (torch.exp(order * log_w + (1 - order) * log_v) * value).sum(dim=0)
            between = part.value(w, v, log_w - log_v).sum(dim=0)
            loss += part.weight * (within + between)
            mean_pull += part.weight * order * (within + between)
        rest = rest[len(parts) :]
    else:
        loss, mean_pull = _summed_parts(problem, z, u, local, rows)

    values = RowValues(
        loss=loss.to(wide),
        student_entropy=(w * (entropy_z - log_w)).sum(dim=0).to(wide),
        teacher_entropy=(v * (entropy_u - log_v)).sum(dim=0).to(wide),
    )
    if labels is not None:
        inv = problem.extra_inv_tau or problem.inv_tau
        z_label, u_label = (x.sum(dim=0) * inv for x in rest)
        values = replace(
            values,
            student_logprobs=(z_label - totals[-2]).to(wide),
            teacher_logprobs=(u_label - totals[-1]).to(wide),
        )
    return values, (mean_pull.to(wide), *rows)


def _summed_parts(
    problem: Problem, z: Tensor, u: Tensor, local: _Local, rows: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Weighted value and pull summed over all shards, [C] fp64; one all-reduce."""
    values, pulls = local.values, local.pulls
    if problem.shard.size > 1:
        values = pulls = [torch.zeros_like(local.max_z)] * len(problem.parts)
        if z.shape[1] > 0:
            found = []
            for tile in tiles(z):
                scalars = [row[tile] for row in rows]
                found.append(
                    row_kernels.global_sums(
                        z[tile], u[tile], problem.inv_tau, problem.parts, *scalars
                    )
                )
            sums = stack_tiles(found)[:-1]
            values, pulls = sums[0::2], sums[1::2]
    weights = [part.weight for part in problem.parts]
    both = [sum(w * x for w, x in zip(weights, xs, strict=True)) for xs in (values, pulls)]
    loss, mean_pull = problem.shard.all_reduce(torch.stack(both)).unbind(0)
    return loss, mean_pull


def gradient_rows(
    problem: Problem,
    z: Tensor,
    u: Tensor,
    state: tuple[Tensor, ...],
    upstream: Tensor,
    out: Tensor,
) -> None:
    """Writes upstream_t dD_t/dz into `out`, no collective.

    Args:
        z, u, state: as given to and returned by `forward_rows`.
        upstream: [C] gradient of the scalar with respect to each row's loss.
        out: [C, shard.num_columns], any float dtype; may be z itself.
    """
    if z.shape[1] == 0:
        return
    mean_pull, *rows = state
    row_weight = upstream.to(mean_pull.dtype) * problem.inv_tau
    for tile in tiles(z):
        scalars = [row[tile] for row in rows]
        out[tile] = row_kernels.gradient(
            z[tile],
            u[tile],
            problem.inv_tau,
            problem.parts,
            mean_pull[tile],
            row_weight[tile],
            *scalars,
        )
