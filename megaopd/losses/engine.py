"""Exact divergences of vocabulary-parallel logits: forward scalars, and the gradient from them.

The engine owns tensor-parallel collectives, temperature, padded vocabulary and accumulation; what
is particular to a divergence comes from `divergences.DIVERGENCES`, what touches every logit is done
by a backend. It knows nothing of autograd: `dense` and `fused` wrap it.

With phi = dD/dp, dD/dz_j = p_j (phi_j - sum_i p_i phi_i) / tau. So the backward of every divergence
needs, besides the logits, a few scalars per token, all known after the forward: it runs without a
collective. So does that of the entropy bonus, whose entropy the same pass finds.

Collectives of one `forward_rows` call over a group of more than one rank:
- terms with a chain rule (alpha family, both KLs): one all-gather;
- other terms: one all-gather for the normalisers, one all-reduce of two scalars.
Scalars travel and are combined in fp64, in rank order: every rank holds the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megaopd.losses.divergences import Part
from megaopd.losses.row_kernels import widen
from megaopd.losses.shard_scalars import ShardScalars, empty_shard, max_gap
from megaopd.losses.vocab_shard import VocabShard


class Backend(Protocol):
    """Passes over logits [C, V], V > 0; see `torch_backend.TorchBackend`."""

    def normalise(self, z: Tensor, u: Tensor) -> ShardScalars: ...

    def local_divergence(self, z: Tensor, u: Tensor, refine: bool) -> ShardScalars: ...

    def chain_divergence(self, z: Tensor, u: Tensor) -> ShardScalars: ...

    def global_sums(
        self, z: Tensor, u: Tensor, rows: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]: ...

    def write_gradient(self, z: Tensor, u: Tensor, rows: Tensor, out: Tensor) -> None: ...


@dataclass(frozen=True)
class Problem:
    """What is the same for all rows of a call.

    Attributes:
        parts: the terms of the divergence.
        temperature: tau, divides both logits.
        logprob_temperature: temperature of the label log-probs, if it differs from tau, else None.
        shard: this rank's columns.
        backend: does the passes over logits.
        entropy_coef: c: the loss is D - c H, H the student's entropy.
    """

    parts: tuple[Part, ...]
    temperature: float
    logprob_temperature: float | None
    shard: VocabShard
    backend: Backend
    entropy_coef: float = 0.0

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


def _shard_scalars(problem: Problem, z: Tensor, u: Tensor) -> ShardScalars:
    if z.shape[1] == 0:
        num_values = len(problem.parts) if problem.one_pass else 0
        return empty_shard(z, problem.extra_inv_tau is not None, num_values)
    if problem.one_pass:
        return problem.backend.chain_divergence(z, u)
    if problem.shard.size == 1:
        return problem.backend.local_divergence(z, u, refine=False)
    return problem.backend.normalise(z, u)


def _label_logits(problem: Problem, z: Tensor, u: Tensor, labels: Tensor) -> list[Tensor]:
    """Both logits of the labels, [C] fp64, 0 where another rank owns the label."""
    if z.shape[1] == 0:
        zero = z.new_zeros(z.shape[0], dtype=torch.float64)
        return [zero, zero]
    local, owned = problem.shard.local_ids(labels)
    picked = [widen(x.gather(1, local[:, None]))[:, 0].double() for x in (z, u)]
    return [torch.where(owned, x, 0.0) for x in picked]


def forward_rows(
    problem: Problem, z: Tensor, u: Tensor, labels: Tensor | None = None
) -> tuple[RowValues, Tensor]:
    """Divergence, entropies and label log-probs of C rows; see the module for the collectives.

    Args:
        z: [C, shard.num_columns] student logits without padding, any float dtype.
        u: the teacher's.
        labels: [C] global ids, or None.

    Returns:
        the values, the same on every rank, and this rank's state for `gradient_rows`: [C, 6], the
        five row scalars of `row_kernels` and the mean of pull over the whole vocabulary.
    """
    wide, shard, parts = _wide_dtype(z, u), problem.shard, problem.parts
    local = _shard_scalars(problem, z, u)
    picked = [] if labels is None else _label_logits(problem, z, u, labels)
    masses = [local.log_mass_z, local.log_mass_u, *local.extra_masses]
    carried = [local.entropy_z, local.entropy_u]
    carried += [*(local.values if problem.one_pass else []), *picked]
    everywhere = shard.all_gather(torch.stack([*masses, *carried]))  # [R, n, C]
    log_masses = everywhere[:, : len(masses)]
    totals = log_masses.logsumexp(dim=0)  # [2 or 4, C]
    log_w, log_v = (log_masses[:, :2] - totals[:2]).unbind(dim=1)  # shares of the shards, [R, C]
    w, v = log_w.exp(), log_v.exp()
    entropy_z, entropy_u, *rest = everywhere[:, len(masses) :].unbind(dim=1)

    gap = max_gap(local.max_z, local.max_u, wide) * problem.inv_tau
    rows = [
        local.max_z,
        local.max_u,
        (local.max_z * problem.inv_tau - totals[0]).exp(),
        (local.max_u * problem.inv_tau - totals[1]).exp(),
        totals[0] - totals[1] - gap,
    ]
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
        loss, mean_pull = _summed_parts(problem, z, u, local, torch.stack(rows, dim=1).to(wide))

    entropy = (w * (entropy_z - log_w)).sum(dim=0)
    if problem.entropy_coef:
        # tau d(-c H)/dz_j = c p_j (log p_j + H), log p_j = (z_j - max z) / tau + log scale_z: the
        # backend knows the first part of log p_j, the rest is one number of the row.
        loss = loss - problem.entropy_coef * entropy
        log_scale = local.max_z * problem.inv_tau - totals[0]
        mean_pull = mean_pull - problem.entropy_coef * (log_scale + entropy)
    values = RowValues(
        loss=loss.to(wide),
        student_entropy=entropy.to(wide),
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
    return values, torch.stack([*rows, mean_pull], dim=1).to(wide)


def _summed_parts(
    problem: Problem, z: Tensor, u: Tensor, local: ShardScalars, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted value and pull summed over all shards, [C] fp64; one all-reduce."""
    values, pulls = local.values, local.pulls
    if problem.shard.size > 1:
        values = pulls = [torch.zeros_like(local.max_z)] * len(problem.parts)
        if z.shape[1] > 0:
            values, pulls = problem.backend.global_sums(z, u, rows)
    weights = torch.tensor([part.weight for part in problem.parts], dtype=torch.float64)
    both = torch.stack([torch.stack(values, dim=1), torch.stack(pulls, dim=1)])
    loss, mean_pull = problem.shard.all_reduce(both @ weights.to(both.device)).unbind(0)
    return loss, mean_pull


def gradient_rows(
    problem: Problem, z: Tensor, u: Tensor, state: Tensor, upstream: Tensor, out: Tensor
) -> None:
    """Writes upstream_t dD_t/dz into `out`, no collective.

    Args:
        z, u, state: as given to and returned by `forward_rows`.
        upstream: [C] gradient of the scalar with respect to each row's loss.
        out: [C, shard.num_columns], any float dtype; may be z itself.
    """
    if z.shape[1] == 0:
        return
    row_weight = upstream.to(state.dtype) * problem.inv_tau
    rows = torch.cat([state, row_weight[:, None]], dim=1)
    problem.backend.write_gradient(z, u, rows, out)


def _wide_dtype(z: Tensor, u: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (z.dtype, u.dtype) else torch.float32
