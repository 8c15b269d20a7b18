"""The loss of training: a divergence, weighted and summed over the loss tokens of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.batch import HiddenSignal, PackedBatch
from megaopd.config import LossConfig
from megaopd.losses import DivergenceOutput, divergence, linear_divergence


@dataclass(frozen=True)
class ObjectiveOutput:
    """What a micro-batch adds to the global batch.

    Attributes:
        loss_sum: fp32 scalar, sum over the loss tokens of weight times divergence; differentiable.
        num_tokens: int32 scalar, the number of loss tokens; the one normaliser of the gradient.
        num_scored: int32 scalar, the loss tokens whose weight is not 0; the others are not
            computed.
        sums: metric name -> fp32 scalar, a sum over the scored tokens, to be divided by their
            number.
        mismatch_max: fp32 scalar, the largest |trainer - engine| log-prob of a loss token.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    num_scored: Tensor
    sums: dict[str, Tensor]
    mismatch_max: Tensor


class DivergenceObjective:
    """Exact full-vocabulary divergence between student and teacher on the student's own samples.

    Args:
        config: which divergence, its parameters, and how it is computed.
        vocab_size: true vocabulary size; padded entries have probability and gradient 0.
        rollout_temperature: temperature of the sampler's log-probs, for the mismatch metrics.
        tp_group: the student's tensor-parallel group; None is a group of one.
    """

    def __init__(
        self,
        config: LossConfig,
        vocab_size: int,
        rollout_temperature: float,
        tp_group: dist.ProcessGroup | None,
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.rollout_temperature = rollout_temperature
        self.tp_group = tp_group

    def __call__(
        self, hidden_TH: Tensor, head_VH: Tensor, batch: PackedBatch, signal: HiddenSignal
    ) -> ObjectiveOutput:
        """Every tensor-parallel rank calls it and holds the same result.

        Only the loss tokens' rows go into the divergence; the others have no gradient.

        Args:
            hidden_TH: the student's hidden states [T, H], equal on the ranks of tp_group.
            head_VH: this rank's rows of the student's LM head.
        """
        c = self.config
        rows_L = batch.loss_mask_T.nonzero()[:, 0]
        weights_L = batch.token_weights_T[rows_L]
        form = linear_divergence if c.fused else _unfused_divergence
        out = form(
            hidden_TH[rows_L],
            head_VH,
            signal.hidden_LH.to(hidden_TH.device, non_blocking=True),
            signal.head.shard(),
            kind=c.kind,
            beta=c.beta,
            alpha=c.alpha,
            temperature=c.temperature,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            chunk_tokens=c.chunk_tokens,
            backend=c.backend,
            labels_T=batch.labels_T[rows_L],
            logprob_temperature=self.rollout_temperature,
            weights_T=weights_L,
        )
        scored = weights_L != 0

        assert out.loss_sum is not None  # weights were given
        assert out.student_logprobs_T is not None  # labels were given
        # The engine sampled the tokens, so expm1(d) - d with d = log p_trainer - log p_engine is an
        # unbiased, non-negative estimate of KL(engine || trainer) (k3, joschu.net/blog/kl-approx).
        delta = torch.where(scored, out.student_logprobs_T - batch.rollout_logprobs_T[rows_L], 0.0)
        sums = {
            "loss/divergence": _masked_sum(out.loss_T, scored),
            "student/entropy": _masked_sum(out.student_entropy_T, scored),
            "teacher/entropy": _masked_sum(out.teacher_entropy_T, scored),
            "rollout/mismatch_kl": (torch.expm1(delta) - delta).sum(),
        }
        mismatch_max = delta.abs().max() if delta.numel() else delta.new_zeros(())
        return ObjectiveOutput(
            loss_sum=out.loss_sum,
            num_tokens=batch.loss_mask_T.sum().to(torch.int32),
            num_scored=scored.sum().to(torch.int32),
            sums=sums,
            mismatch_max=mismatch_max.float(),
        )


def _masked_sum(values_L: Tensor, mask_L: Tensor) -> Tensor:
    return torch.where(mask_L, values_L.detach(), 0.0).sum()


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
    logits_LV = _SumGradient.apply(hidden_LH, options["tp_group"]) @ head_VH.t()
    out = divergence(logits_LV, teacher_hidden_LH @ teacher_head_VH.t(), **options)
    return replace(out, loss_sum=(out.loss_T * weights_T).sum())
