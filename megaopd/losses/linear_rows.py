"""Losses of single rows of logits = hidden @ head^T that need no teacher's logits beside them.

As in `fused`, the logits exist chunk by chunk, their gradient overwrites them, and two matmuls
carry it to the hidden states and the head, all in the forward; the backward multiplies by a scalar.
The hidden gradient is a sum over vocabulary shards: one all-reduce of [T, H] in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaopd.losses.fused import HeadGradient, default_chunk
from megaopd.losses.validation import require
from megaopd.losses.vocab_shard import VocabShard

RowLoss = Callable[[Tensor, slice, bool], list[Tensor]]
"""(logits z [C, shard.num_columns], which rows they are, whether to write the gradient) -> columns
[C], the same on every rank; the first is the loss of each row. With the flag it overwrites z with
the gradient of that loss."""


def linear_rows(
    hidden: Tensor,
    head: Tensor,
    row_loss: RowLoss,
    *,
    shard: VocabShard,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The sum of `row_loss` over all rows; called by every rank of the shard's group.

    Args:
        hidden: [T, H], replicated over the group.
        head: [V / tp_size, H] this rank's rows, dtype of hidden. Without requires_grad its gradient
            is not computed.
        row_loss: see `RowLoss`; its own collectives are called once per chunk.
        chunk_tokens: rows whose logits are alive at a time; None takes that of
            `linear_divergence`.

    Returns:
        (sum of the first column, differentiable; all columns [T], detached), fp32, or fp64 for fp64
        hidden states.
    """
    enabled = torch.is_grad_enabled()
    plan = _Plan(
        row_loss=row_loss,
        shard=shard,
        chunk=chunk_tokens or default_chunk(hidden, hidden.shape[0]),
        hidden_grad=enabled and hidden.requires_grad,
        head_grad=enabled and head.requires_grad,
    )
    loss_sum, *columns = _LinearRows.apply(hidden, head, plan)
    return loss_sum, columns


@dataclass(frozen=True)
class _Plan:
    """What the autograd function needs to know besides the tensors."""

    row_loss: RowLoss
    shard: VocabShard
    chunk: int
    hidden_grad: bool
    head_grad: bool


class _LinearRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, plan: _Plan) -> tuple[Tensor, ...]:
        num_rows, num_columns = hidden.shape[0], plan.shard.num_columns
        true_head = head[:num_columns]
        num_chunks = -(-num_rows // plan.chunk)
        head_grad = HeadGradient(head, num_columns, num_chunks) if plan.head_grad else None
        hidden_grad = torch.empty_like(hidden) if plan.hidden_grad else None
        buffer = head.new_empty(min(plan.chunk, num_rows), num_columns)

        found = []
        for start in range(0, max(1, num_rows), plan.chunk):
            rows = slice(start, start + plan.chunk)
            h = hidden[rows]
            z = buffer[: h.shape[0]]
            torch.mm(h, true_head.t(), out=z)
            found.append(plan.row_loss(z, rows, plan.hidden_grad or plan.head_grad))
            if hidden_grad is not None:
                torch.mm(z, true_head, out=hidden_grad[rows])
            if head_grad is not None:
                head_grad.add(z, h)

        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        columns = [torch.cat(column).to(wide) for column in zip(*found, strict=True)]
        ctx.shard, ctx.hidden_grad = plan.shard, hidden_grad
        ctx.head_grad = None if head_grad is None else head_grad.result()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*columns)
        return (columns[0].sum(), *columns)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream[0] is None:
            return None, None, None
        hidden_grad, head_grad = ctx.hidden_grad, ctx.head_grad
        require(
            hidden_grad is not None or head_grad is not None,
            "linear_rows",
            "a second backward through the same call",
            "call it again",
        )
        # Scaled in place and handed out: nothing of the head's size is made a second time.
        ctx.hidden_grad = ctx.head_grad = None
        for grad in (hidden_grad, head_grad):
            if grad is not None:
                grad.mul_(upstream[0])
        if hidden_grad is not None:
            ctx.shard.all_reduce(hidden_grad)
        return hidden_grad, head_grad, None
