"""`linear_divergence`: from hidden states and LM heads; the logits exist chunk by chunk only.

Per chunk of C tokens: two matmuls make the logits of student and teacher, the engine reduces them
to scalars, the gradient overwrites the student's logits, and two matmuls carry it to the hidden
states and the head. Three ways to the gradient, all without a [T, V] array:

- token weights known beforehand: everything happens in the forward (4 matmuls in all), the backward
  multiplies by the upstream scalar;
- no weights, frozen head: the hidden gradient of each token's loss is made in the forward and
  scaled by the upstream gradient of that token in the backward (3 matmuls);
- no weights, trained head: the backward makes the logits again (6 matmuls).

The hidden gradient is a sum over vocabulary shards: one all-reduce of [T, H] in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.losses.engine import Problem, forward_rows, gradient_rows
from megaopd.losses.output import DivergenceOutput, check_labels, make_problem
from megaopd.losses.validation import require
from megaopd.losses.vocab_shard import make_shard

# Rows of logits alive at a time: enough for the matmuls to run at full speed.
_CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
# Rows of the head whose gradient is made at a time when it is accumulated in a wider dtype.
_HEAD_BLOCK = 8192


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
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
    weights_T: Tensor | None = None,
    reduce_hidden_grad: bool = True,
) -> DivergenceOutput:
    """`divergence` of hidden @ head^T on both sides, without ever holding those logits whole.

    Args:
        student_hidden: [T, H_s] after the final norm, replicated over `tp_group`.
        student_head: [V / tp_size, H_s] this rank's rows, dtype of student_hidden. Without
            requires_grad its gradient is not computed.
        teacher_hidden: [T, H_t], no gradient.
        teacher_head: [V / tp_size, H_t] the same global ids as student_head, no gradient.
        kind, beta, alpha, temperature, vocab_size, tp_group, backend: see `divergence`.
        labels_T, logprob_temperature, entropy_coef: see `divergence`.
        chunk_tokens: tokens whose logits are alive at a time; default at most 256 on a CPU,
            2048 on a GPU.
        inplace: accepted for symmetry; the logits are always overwritten.
        weights_T: [T] token weights, the same on every rank of the group. The output then holds
            loss_sum = sum(weights_T * loss_T), which alone is differentiable; tokens of weight 0
            are left out of all the work and their entries of every [T] output are 0.
        reduce_hidden_grad: all-reduce the hidden gradient over `tp_group`; False leaves this rank's
            partial sum, for a caller that reduce-scatters it (sequence parallelism).

    Returns:
        `DivergenceOutput`; loss_T is differentiable without weights_T, loss_sum with them.

    Raises:
        LossArgumentError: an option or a shape that does not fit.
    """
    num_tokens = student_hidden.shape[0]
    pairs = ((student_hidden, student_head, "student"), (teacher_hidden, teacher_head, "teacher"))
    for hidden, head, side in pairs:
        require(
            hidden.dim() == 2
            and head.dim() == 2
            and hidden.shape == (num_tokens, head.shape[1])
            and hidden.dtype == head.dtype,
            f"{side}_hidden",
            f"{hidden.dtype} {tuple(hidden.shape)} with a head of {head.dtype} {tuple(head.shape)}",
            "give [T, H] and [V, H] of one dtype",
        )
    size = 1 if tp_group is None else tp_group.size()
    require(
        size == 1 or student_head.shape[0] == teacher_head.shape[0],
        "teacher_head",
        f"{teacher_head.shape[0]} rows per rank beside the student's {student_head.shape[0]}",
        "load the teacher's head in the student's vocabulary partition",
    )
    check_labels(labels_T, num_tokens)
    shard = make_shard(student_head.shape[0], teacher_head.shape[0], vocab_size, tp_group)
    problem = make_problem(
        *(kind, beta, alpha, temperature, logprob_temperature, shard, backend, student_hidden),
        entropy_coef,
    )

    kept = None
    if weights_T is not None:
        require(
            weights_T.shape == (num_tokens,),
            "weights_T",
            f"shape {tuple(weights_T.shape)}",
            f"give one weight per token, ({num_tokens},)",
        )
        weights_T = weights_T.detach()
        kept = weights_T.nonzero()[:, 0]
        if kept.numel() == num_tokens:
            kept = None
    rows = num_tokens if kept is None else kept.numel()
    chunk_tokens = chunk_tokens or default_chunk(student_hidden, rows)
    weights = weights_T
    if kept is not None and weights_T is not None:
        weights = weights_T[kept]
        labels_T = labels_T if labels_T is None else labels_T[kept]
        student_hidden, teacher_hidden = student_hidden[kept], teacher_hidden[kept]

    needs_grad = torch.is_grad_enabled()
    plan = _Plan(
        problem=problem,
        chunk=chunk_tokens,
        hidden_grad=needs_grad and student_hidden.requires_grad,
        head_grad=needs_grad and student_head.requires_grad,
        reduce_hidden_grad=reduce_hidden_grad,
    )
    loss_sum, *outputs = _LinearDivergence.apply(
        student_hidden,
        student_head,
        teacher_hidden.detach(),
        teacher_head.detach(),
        labels_T,
        weights,
        plan,
    )
    if kept is not None:
        outputs = [x.new_zeros(num_tokens).index_copy(0, kept, x) for x in outputs]
    loss, student_entropy, teacher_entropy, *logprobs = outputs
    student_logprobs, teacher_logprobs = logprobs or (None, None)
    return DivergenceOutput(
        loss,
        student_entropy,
        teacher_entropy,
        student_logprobs,
        teacher_logprobs,
        loss_sum=None if weights_T is None else loss_sum,
    )


def default_chunk(like: Tensor, num_rows: int) -> int:
    """Rows of logits to hold at a time on `like`'s device, at least 1: chunks of about one size."""
    most = _CHUNK_TOKENS.get(like.device.type, _CHUNK_TOKENS["cpu"])
    return max(1, -(-num_rows // max(1, -(-num_rows // most))))


@dataclass(frozen=True)
class _Plan:
    """What the autograd function needs to know besides the tensors."""

    problem: Problem
    chunk: int
    hidden_grad: bool
    head_grad: bool
    reduce_hidden_grad: bool


class HeadGradient:
    """Sum over chunks of dz^T h, fp32 if the head is narrower and there is more than one chunk."""

    def __init__(self, head: Tensor, num_columns: int, num_chunks: int) -> None:
        self.head = head
        self.num_columns = num_columns
        self.direct = num_chunks == 1 or head.dtype in (torch.float32, torch.float64)
        self.dtype = head.dtype if self.direct else torch.float32
        self.total: Tensor | None = None

    def add(self, dz: Tensor, hidden: Tensor) -> None:
        started = self.total is not None
        if self.total is None:
            self.total = self._allocate()
        true_rows = self.total[: self.num_columns]
        if self.direct:
            # beta = 0 makes the first product overwrite: no pass to fill with zeros.
            true_rows.addmm_(dz.t(), hidden, beta=float(started))
        else:
            for start in range(0, self.num_columns, _HEAD_BLOCK):
                block = slice(start, start + _HEAD_BLOCK)
                product = dz[:, block].t() @ hidden
                if started:
                    true_rows[block] += product
                else:
                    true_rows[block] = product

    def _allocate(self) -> Tensor:
        """Padding is 0; the true rows are written by the first chunk."""
        total = torch.empty(self.head.shape, dtype=self.dtype, device=self.head.device)
        total[self.num_columns :].zero_()
        return total

    def result(self) -> Tensor:
        """The sum in the head's dtype; called once."""
        if self.total is None:
            return torch.zeros_like(self.head)
        if self.total.dtype == self.head.dtype:
            return self.total
        # Rounded front to back into the same memory: a rounded row ends before any row that has not
        # been read begins, so a second array of the head's size is never alive.
        rounded = self.total.view(self.head.dtype).view(-1)[: self.total.numel()]
        rounded = rounded.view(self.total.shape)
        for first in range(0, self.total.shape[0], _HEAD_BLOCK):
            block = slice(first, first + _HEAD_BLOCK)
            rounded[block] = self.total[block].to(self.head.dtype)
        return rounded


def _chunk_logits(
    plan: _Plan, num_rows: int, student_head: Tensor, teacher_head: Tensor
) -> tuple[Tensor, Tensor]:
    """Buffers for the logits of one chunk, without padding."""
    columns, rows = plan.problem.shard.num_columns, min(plan.chunk, num_rows)
    return student_head.new_empty(rows, columns), teacher_head.new_empty(rows, columns)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, ...]:
        problem, num_rows = plan.problem, student_hidden.shape[0]
        columns = problem.shard.num_columns
        head, teacher_rows = student_head[:columns], teacher_head[:columns]
        make_head_grad = plan.head_grad and weights is not None
        make_hidden_grad = plan.hidden_grad and (weights is not None or not plan.head_grad)
        num_chunks = -(-num_rows // plan.chunk)
        head_grad = HeadGradient(student_head, columns, num_chunks) if make_head_grad else None
        hidden_grad = torch.empty_like(student_hidden) if make_hidden_grad else None
        z_buffer, u_buffer = _chunk_logits(plan, num_rows, student_head, teacher_head)

        outputs, states = [], []
        for start in range(0, max(1, num_rows), plan.chunk):
            rows = slice(start, start + plan.chunk)
            h = student_hidden[rows]
            z, u = z_buffer[: h.shape[0]], u_buffer[: h.shape[0]]
            torch.mm(h, head.t(), out=z)
            torch.mm(teacher_hidden[rows], teacher_rows.t(), out=u)
            values, state = forward_rows(problem, z, u, None if labels is None else labels[rows])
            outputs.append(values.as_list())
            states.append(state)
            if head_grad is None and hidden_grad is None:
                continue
            upstream = torch.ones_like(values.loss) if weights is None else weights[rows]
            gradient_rows(problem, z, u, state, upstream, z)
            if rows.stop >= num_rows:
                del u, u_buffer  # room for the head's gradient, if this is the only chunk
            if hidden_grad is not None:
                torch.mm(z, head, out=hidden_grad[rows])
            if head_grad is not None:
                head_grad.add(z, h)

        joined = [torch.cat(column) for column in zip(*outputs, strict=True)]
        ctx.plan, ctx.weighted = plan, weights is not None
        ctx.hidden_grad = hidden_grad
        ctx.head_grad = None if head_grad is None else head_grad.result()
        ctx.precomputed = make_head_grad or make_hidden_grad
        if not ctx.precomputed and (plan.hidden_grad or plan.head_grad):
            ctx.save_for_backward(
                student_hidden, student_head, teacher_hidden, teacher_head, torch.cat(states)
            )
        ctx.set_materialize_grads(False)
        if weights is None:
            loss_sum = joined[0].new_zeros(())
            ctx.mark_non_differentiable(loss_sum, *joined[1:])
        else:
            loss_sum = torch.dot(weights.to(joined[0].dtype), joined[0])
            ctx.mark_non_differentiable(*joined)
        return (loss_sum, *joined)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        received = upstream[0] if ctx.weighted else upstream[1]
        if received is None:
            return (None,) * 7
        if not ctx.precomputed:
            hidden_grad, head_grad = _recomputed_gradients(ctx, received)
        else:
            hidden_grad, head_grad = ctx.hidden_grad, ctx.head_grad
            require(
                hidden_grad is not None or head_grad is not None,
                "linear_divergence",
                "a second backward through the same call",
                "call it again",
            )
            # Scaled in place and handed out: nothing of the head's size is made a second time.
            ctx.hidden_grad = ctx.head_grad = None
            for grad in (hidden_grad, head_grad):
                if grad is not None:
                    grad.mul_(received[:, None] if received.dim() else received)
        if hidden_grad is not None and ctx.plan.reduce_hidden_grad:
            ctx.plan.problem.shard.all_reduce(hidden_grad)
        return (hidden_grad, head_grad, *(None,) * 5)


def _recomputed_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Makes the logits again, chunk by chunk, now that the upstream gradient [T] is known."""
    plan: _Plan = ctx.plan
    student_hidden, student_head, teacher_hidden, teacher_head, state = ctx.saved_tensors
    num_rows, columns = student_hidden.shape[0], plan.problem.shard.num_columns
    head, teacher_rows = student_head[:columns], teacher_head[:columns]
    num_chunks = -(-num_rows // plan.chunk)
    head_grad = HeadGradient(student_head, columns, num_chunks) if plan.head_grad else None
    hidden_grad = torch.empty_like(student_hidden) if plan.hidden_grad else None
    z_buffer, u_buffer = _chunk_logits(plan, num_rows, student_head, teacher_head)
    for start in range(0, num_rows, plan.chunk):
        rows = slice(start, start + plan.chunk)
        h = student_hidden[rows]
        z, u = z_buffer[: h.shape[0]], u_buffer[: h.shape[0]]
        torch.mm(h, head.t(), out=z)
        torch.mm(teacher_hidden[rows], teacher_rows.t(), out=u)
        gradient_rows(plan.problem, z, u, state[rows], upstream[rows], z)
        if rows.stop >= num_rows:
            del u, u_buffer
        if hidden_grad is not None:
            torch.mm(z, head, out=hidden_grad[rows])
        if head_grad is not None:
            head_grad.add(z, h)
    return hidden_grad, None if head_grad is None else head_grad.result()
