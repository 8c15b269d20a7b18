"""Exact full-vocabulary divergence from a teacher's hidden states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.batch import HiddenSignal
from megaopd.losses.dense import divergence
from megaopd.losses.fused import linear_divergence
from megaopd.losses.output import DivergenceOutput
from megaopd.losses.signals.terms import LossRows, LossSettings, LossTerms, at_rows


def full_objective(settings: LossSettings, rows: LossRows, signal: HiddenSignal) -> LossTerms:
    """Whoever sampled the tokens, the divergence at each position is exact: stale samples need no
    correction."""
    c = settings.config
    form = linear_divergence if c.fused else _unfused_divergence
    out = form(
        rows.hidden_LH,
        rows.head_VH,
        signal.hidden_LH.to(rows.hidden_LH.device, non_blocking=True),
        signal.head.shard(),
        kind=c.kind,
        beta=c.beta,
        alpha=c.alpha,
        temperature=c.temperature,
        vocab_size=settings.vocab_size,
        tp_group=settings.tp_group,
        chunk_tokens=c.chunk_tokens,
        backend=c.backend,
        labels_T=rows.labels_L,
        logprob_temperature=settings.sampler_temperature,
        entropy_coef=c.entropy_coef,
        weights_T=rows.weights_L,
    )
    assert out.loss_sum is not None  # weights were given
    assert out.student_logprobs_T is not None  # labels were given
    return LossTerms(
        out.loss_sum,
        out.student_logprobs_T,
        {
            "loss/divergence": out.loss_T + c.entropy_coef * out.student_entropy_T,
            "student/entropy": out.student_entropy_T,
            "teacher/entropy": out.teacher_entropy_T,
        },
    )


class _SumGradient(torch.autograd.Function):
    """x forward, the sum over the group's gradients backward: each rank's is its shard's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        total = upstream[0].clone(memory_format=torch.contiguous_format)
        if ctx.group is not None and ctx.group.size() > 1:
            dist.all_reduce(total, group=ctx.group)
        return total, None


def _unfused_divergence(
    hidden_LH: Tensor,
    head_VH: Tensor,
    teacher_hidden_LH: Tensor,
    teacher_head_VH: Tensor,
    *,
    weights_T: Tensor,
    **options: Any,
) -> DivergenceOutput:
    """`linear_divergence` with token weights, by way of whole logits and autograd."""
    kept = weights_T.nonzero()[:, 0]
    logits = _SumGradient.apply(hidden_LH[kept], options["tp_group"]) @ head_VH.t()
    options["labels_T"] = options["labels_T"][kept]
    out = divergence(logits, teacher_hidden_LH[kept] @ teacher_head_VH.t(), **options)
    loss_sum = (out.loss_T * weights_T[kept]).sum()
    columns = {n: x.detach() for n, x in vars(out).items() if x is not None}
    names, values = list(columns), at_rows(list(columns.values()), kept, len(weights_T))
    return replace(out, loss_sum=loss_sum, **dict(zip(names, values, strict=True)))
