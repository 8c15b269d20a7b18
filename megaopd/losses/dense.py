"""`divergence`: from logits that exist already, [T, V / tp_size] of student and teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.losses.engine import Problem, forward_rows, gradient_rows
from megaopd.losses.output import DivergenceOutput, check_labels, make_problem
from megaopd.losses.validation import require
from megaopd.losses.vocab_shard import make_shard, reshard_columns


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    inplace: bool = False,
    labels_T: Tensor | None = None,
    logprob_temperature: float | None = None,
    entropy_coef: float = 0.0,
) -> DivergenceOutput:
    """Exact per-token divergence between two vocabulary-parallel softmaxes.

    Forward and backward never hold a temporary of the size of the logits; the backward writes the
    gradient (into the student's logits if `inplace`) and runs no collective.

    Args:
        student_logits: [T, V_s / tp_size] any float dtype; rank r holds the global ids from r *
            width.
        teacher_logits: [T, V_t / tp_size]; gets no gradient. If its width differs from the
            student's and there is more than one rank, its columns are exchanged by one all-to-all
            per call.
        kind: an entry of `DIVERGENCES`.
        beta: weight of the teacher in jsd's mixture, of the reverse KL in mixed.
        alpha: skew of the skewed KLs, order of alpha.
        temperature: tau; softmax(logits / tau) on both sides. The loss is not multiplied by tau^2.
        vocab_size: true vocabulary; columns whose global id is at or past it have probability 0 and
            gradient 0. Default: all columns that both sides have.
        tp_group: the tensor-parallel group, None for one shard. All its ranks make the call.
        chunk_tokens: rows per collective; default all.
        backend: "eager", "compiled" or "auto".
        inplace: the backward overwrites `student_logits` with the gradient.
        labels_T: [T] int64 global ids; the output then holds their log-probs under both models.
        logprob_temperature: temperature of those log-probs; default the divergence's own.
        entropy_coef: the loss is less by it times the student's entropy, gradient included.

    Returns:
        `DivergenceOutput` with a differentiable loss_T.

    Raises:
        LossArgumentError: an option or a shape that does not fit.
    """
    num_tokens = student_logits.shape[0]
    require(
        student_logits.dim() == 2 == teacher_logits.dim() and num_tokens == teacher_logits.shape[0],
        "logits",
        f"shapes {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}",
        "give [T, V] for both with the same T",
    )
    check_labels(labels_T, num_tokens)
    shard = make_shard(student_logits.shape[1], teacher_logits.shape[1], vocab_size, tp_group)
    problem = make_problem(
        *(kind, beta, alpha, temperature, logprob_temperature, shard, backend, student_logits),
        entropy_coef,
    )
    teacher = reshard_columns(teacher_logits.detach(), shard)
    chunk = chunk_tokens or max(1, num_tokens)
    loss, student_entropy, teacher_entropy, *logprobs = _Divergence.apply(
        student_logits, teacher, labels_T, problem, chunk, inplace
    )
    return DivergenceOutput(loss, student_entropy, teacher_entropy, *logprobs)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        problem: Problem,
        chunk: int,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        true_logits = student_logits.detach()[:, : problem.shard.num_columns]
        outputs, states = [], []
        # One round even for T = 0, so that the outputs have their dtype.
        for start in range(0, max(1, student_logits.shape[0]), chunk):
            rows = slice(start, start + chunk)
            values, state = forward_rows(
                problem,
                true_logits[rows],
                teacher_logits[rows],
                None if labels is None else labels[rows],
            )
            outputs.append(values.as_list())
            states.append(state)
        joined = [torch.cat(column) for column in zip(*outputs, strict=True)]
        ctx.problem, ctx.inplace = problem, inplace
        ctx.save_for_backward(student_logits, teacher_logits, torch.cat(states))
        ctx.mark_non_differentiable(*joined[1:])
        ctx.set_materialize_grads(False)
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream[0] is None:
            return (None,) * 6
        student_logits, teacher_logits, state = ctx.saved_tensors
        columns = ctx.problem.shard.num_columns
        logits = student_logits.detach()
        out = logits if ctx.inplace else torch.empty_like(logits)
        gradient_rows(
            ctx.problem,
            logits[:, :columns],
            teacher_logits,
            state,
            upstream[0],
            out[:, :columns],
        )
        out[:, columns:] = 0
        return (out, *(None,) * 5)
