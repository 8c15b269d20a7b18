"""`topk_divergence`: the divergence when only the teacher's K likeliest tokens are known.

A sum over the K tokens alone is no divergence: its gradient does not vanish at p = q. Two forms do:

- tail="bucket": all other tokens are one outcome, p_tail = 1 - sum_S p. By the data-processing
  inequality a lower bound of the full divergence; a token of the tail has gradient
  p_j (phi_tail - mean), so the tail's mass is taught but not its shape.
- tail="renormalize": both sides renormalised over S; the rest of the vocabulary gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.losses import row_kernels
from megaopd.losses.engine import Problem
from megaopd.losses.output import DivergenceOutput, make_problem
from megaopd.losses.torch_backend import stack_tiles, tiles
from megaopd.losses.validation import require
from megaopd.losses.vocab_shard import VocabShard, make_shard

# The teacher's tail mass is a difference of fp32 log-probs: below this it is rounding.
_LEAST_TAIL = 2.0**-23
# Log-probability of an outcome without mass, as in `row_kernels.LOGIT_FLOOR`.
_FLOOR = row_kernels.LOGIT_FLOOR


def topk_divergence(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    kind: str = "reverse_kl",
    tail: str = "bucket",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    inplace: bool = False,
) -> DivergenceOutput:
    """Divergence between the student and a teacher known at K tokens per position.

    Args:
        student_logits: [T, V / tp_size] any float dtype, as for `divergence`.
        teacher_ids: [T, K] int64 global ids below the vocabulary, distinct within a row; -1 where a
            row has fewer.
        teacher_logprobs: [T, K] log-probs at `temperature`, normalised over the full vocabulary;
            those of ids -1 are not looked at.
        tail: "bucket" or "renormalize".
        chunk_tokens: rows per collective (one all-gather of K + 2 scalars per row); default all.
        kind, beta, alpha, temperature, vocab_size, tp_group, backend, inplace: see `divergence`.

    Returns:
        `DivergenceOutput`; teacher_entropy_T is the entropy of the teacher's K or K + 1 outcomes,
        the student's is over the full vocabulary.

    Raises:
        LossArgumentError: an option, an id or a shape that does not fit.
    """
    num_tokens, width = student_logits.shape
    require(tail in ("bucket", "renormalize"), "loss.tail", f"{tail!r}", "bucket or renormalize")
    require(
        teacher_ids.shape == teacher_logprobs.shape and teacher_ids.shape[:1] == (num_tokens,),
        "teacher_ids",
        f"shape {tuple(teacher_ids.shape)} beside {tuple(teacher_logprobs.shape)}",
        f"give ({num_tokens}, K) for both",
    )
    shard = make_shard(width, width, vocab_size, tp_group)
    problem = make_problem(kind, beta, alpha, temperature, None, shard, "eager", student_logits)
    check_ids(teacher_ids, shard)
    loss, student_entropy, teacher_entropy = _TopK.apply(
        student_logits,
        teacher_ids,
        teacher_logprobs.detach(),
        problem,
        tail == "bucket" and has_tail(teacher_ids, shard),
        chunk_tokens or max(1, num_tokens),
        inplace,
    )
    return DivergenceOutput(loss, student_entropy, teacher_entropy)


def check_ids(ids: Tensor, shard: VocabShard) -> None:
    """Raises LossArgumentError for an id outside the vocabulary."""
    if ids.numel():
        low, high = ids.aminmax()
        require(
            int(low) >= -1 and int(high) < shard.vocab_size,
            "teacher_ids",
            f"ids from {int(low)} to {int(high)}",
            f"give ids below the vocabulary, {shard.vocab_size}, or -1 for none",
        )


def has_tail(ids: Tensor, shard: VocabShard) -> bool:
    """Whether there are tokens besides the K, in some row."""
    return ids.shape[1] < shard.vocab_size or bool((ids < 0).any())


def _masses(problem: Problem, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One streaming pass and one all-gather.

    Args:
        logits: [C, shard.num_columns].
        ids: [C, K] global.

    Returns:
        fp64: log p of the ids [C, K], log p of all other tokens [C], log of the total mass [C],
        student entropy [C].
    """
    shard, inv_tau = problem.shard, problem.inv_tau
    num_rows = logits.shape[0]
    zero = logits.new_zeros(num_rows, dtype=torch.float64)
    mass, rest, entropy = zero - 1e30, zero - 1e30, zero
    picked = zero[:, None].expand(num_rows, ids.shape[1])
    if logits.shape[1]:
        local, owned = shard.local_ids(ids)
        wide = row_kernels.widen(logits.gather(1, local)).double()
        picked = torch.where(owned, wide, 0.0)

        def of_tile(rows: slice) -> list[Tensor]:
            scaled = row_kernels.widen(logits[rows]) * inv_tau
            top = scaled.amax(dim=1, keepdim=True)
            e = torch.exp(scaled - top)
            total, dot = e.sum(dim=1), (e * (scaled - top)).sum(dim=1)
            # The tail is summed without S: as a difference of near-equal masses it would be lost.
            # Ids of other shards point at column 0 and are added with weight 0.
            inside = torch.zeros_like(e).scatter_add_(1, local[rows], owned[rows].to(e.dtype))
            tail = torch.where(inside > 0, 0.0, e).sum(dim=1)
            return [top[:, 0], total, dot, tail]

        top, total, dot, tail = stack_tiles(map(of_tile, tiles(logits)), num_rows)
        mass, entropy = top + total.log(), total.log() - dot / total
        rest = torch.where(tail > 0, top + tail.clamp(min=1e-300).log(), -1e30)
    gathered = shard.all_gather(torch.stack([mass, rest, entropy, *picked.unbind(1)]))
    log_total = gathered[:, 0].logsumexp(0)
    log_w = gathered[:, 0] - log_total
    student_entropy = (log_w.exp() * (gathered[:, 2] - log_w)).sum(0)
    log_p = gathered[:, 3:].sum(0).t() * inv_tau - log_total[:, None]
    return log_p, gathered[:, 1].logsumexp(0) - log_total, log_total, student_entropy


def _outcomes(
    log_p: Tensor, log_rest: Tensor, log_q: Tensor, absent: Tensor, bucket: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs of the outcomes compared, [C, K or K + 1], normalised, of student and teacher; an
    absent one has no mass on either side."""
    log_p = log_p.masked_fill(absent, _FLOOR)
    log_q = log_q.double().masked_fill(absent, _FLOOR)
    if bucket:
        teacher_tail = (1 - log_q.exp().sum(1)).clamp(min=_LEAST_TAIL).log()
        log_p = torch.cat([log_p, log_rest[:, None]], dim=1)
        log_q = torch.cat([log_q, teacher_tail[:, None]], dim=1)
    log_p, log_q = log_p.clamp(min=_FLOOR), log_q.clamp(min=_FLOOR)
    return log_p.log_softmax(1), log_q.log_softmax(1)


def forward_rows(
    problem: Problem, z: Tensor, ids: Tensor, teacher_logprobs: Tensor, bucket: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Divergence and entropies of C rows; one all-gather.

    Args:
        z: [C, shard.num_columns] student logits without padding, any float dtype.
        ids, teacher_logprobs: [C, K], see `topk_divergence`.
        bucket: whether all other tokens are one more outcome.

    Returns:
        ([loss, student entropy, teacher entropy] [C] fp64, the same on every rank, and the state
        for `gradient_rows`). The entropy bonus is over the whole vocabulary, the K and the tail.
    """
    log_p, log_rest, log_total, entropy = _masses(problem, z, ids)
    coef = problem.entropy_coef
    bonus = coef * log_p.exp() * (log_p + entropy[:, None])
    log_p, log_q = _outcomes(log_p, log_rest, teacher_logprobs, ids < 0, bucket)
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    value, pull = torch.zeros_like(p), torch.zeros_like(p)
    for part in problem.parts:
        value += part.weight * part.value(p, q, d)
        pull += part.weight * part.pull(p, q, d)
    grad = pull - p * pull.sum(1, keepdim=True)
    # A token of the tail has the share p_j / p_tail of the tail's gradient.
    tail_rate = torch.zeros_like(log_total)
    if bucket:
        tail_rate = torch.where(p[:, -1] > 0, grad[:, -1] / p[:, -1], 0.0)
        grad = grad[:, :-1]
    loss = value.sum(1) - coef * entropy
    state = [grad + bonus, log_total, tail_rate + coef * (entropy - log_total)]
    return [loss, entropy, -(q * log_q).sum(1)], state


def gradient_rows(
    problem: Problem,
    z: Tensor,
    ids: Tensor,
    state: list[Tensor],
    upstream: Tensor,
    bucket: bool,
    out: Tensor,
) -> None:
    """Writes upstream_t dD_t/dz into `out`, no collective.

    Args:
        z, ids, state, bucket: as given to and returned by `forward_rows`.
        upstream: [C] gradient of the scalar with respect to each row's loss.
        out: [C, shard.num_columns], any float dtype; may be z itself.
    """
    if not z.shape[1]:
        return
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    grad, log_total, tail_rate = (x.to(wide) for x in state)
    row_weight = upstream.to(wide) * problem.inv_tau
    if bucket or problem.entropy_coef:
        for rows in tiles(z):
            scaled = row_kernels.widen(z[rows]) * problem.inv_tau
            rate = tail_rate[rows, None]
            if problem.entropy_coef:
                rate = rate + scaled * problem.entropy_coef
            scaled -= log_total[rows, None]
            out[rows] = scaled.exp_() * rate * row_weight[rows, None]
    else:
        out.zero_()
    local, owned = problem.shard.local_ids(ids)
    row, k = owned.nonzero(as_tuple=True)
    out[row, local[row, k]] = (grad * row_weight[:, None])[row, k].to(out.dtype)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        ids: Tensor,
        teacher_logprobs: Tensor,
        problem: Problem,
        bucket: bool,
        chunk: int,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        true_logits = student_logits[:, : problem.shard.num_columns]
        results, states = [], []
        for start in range(0, max(1, student_logits.shape[0]), chunk):
            rows = slice(start, start + chunk)
            values, state = forward_rows(
                problem, true_logits[rows], ids[rows], teacher_logprobs[rows], bucket
            )
            results.append(values)
            states.append(state)
        wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        loss, *entropies = (torch.cat(c).to(wide) for c in zip(*results, strict=True))
        state = [torch.cat(c).to(wide) for c in zip(*states, strict=True)]
        ctx.problem, ctx.bucket, ctx.inplace = problem, bucket, inplace
        ctx.save_for_backward(student_logits, ids, *state)
        ctx.mark_non_differentiable(*entropies)
        return (loss, *entropies)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        student_logits, ids, *state = ctx.saved_tensors
        problem: Problem = ctx.problem
        logits = student_logits.detach()
        columns = problem.shard.num_columns
        out = logits if ctx.inplace else torch.empty_like(logits)
        gradient_rows(
            problem, logits[:, :columns], ids, state, upstream[0], ctx.bucket, out[:, :columns]
        )
        out[:, columns:] = 0
        return (out, *(None,) * 6)
