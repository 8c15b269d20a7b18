"""The loss of training: a divergence, weighted and summed over the loss tokens of a micro-batch.

How it is computed depends on what the teacher says: `OBJECTIVES` has an entry for each kind of
`megaopd.batch.TeacherSignal`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.batch import HiddenSignal, PackedBatch, TeacherSignal, TokenSignal, TopKSignal
from megaopd.config import LossConfig
from megaopd.losses.signals.hidden import full_objective
from megaopd.losses.signals.sampled import sampled_objective
from megaopd.losses.signals.terms import LossRows, LossSettings, LossTerms
from megaopd.losses.signals.top_k import top_k_objective

OBJECTIVES: dict[type, Callable[[LossSettings, LossRows, Any], LossTerms]] = {
    HiddenSignal: full_objective,
    TopKSignal: top_k_objective,
    TokenSignal: sampled_objective,
}

YARDSTICKS: dict[type, str] = {
    HiddenSignal: "eval/reverse_kl",
    TopKSignal: "eval/reverse_kl_lower_bound",
    TokenSignal: "eval/reverse_kl_estimate",
}
"""What the reverse KL that is measured with a kind of signal is called: it is exact, bounded from
below by merging tokens, or estimated from one token a position."""

METRICS = (
    "loss/divergence",
    "loss/importance_clip_fraction",
    "student/entropy",
    "teacher/entropy",
    "teacher/top_k_mass",
    "rollout/mismatch_kl",
    *YARDSTICKS.values(),
)
"""All names that `ObjectiveOutput.sums` may hold; which ones differs between kinds of signals."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """What a micro-batch adds to the global batch.

    Attributes:
        loss_sum: fp32 scalar, sum over the loss tokens of weight times divergence; differentiable.
        num_tokens: int32 scalar, the number of loss tokens; the one normaliser of the gradient.
        num_scored: int32 scalar, the loss tokens whose weight is not 0; the others are not
            computed.
        sums: metric name -> fp32 scalar, a sum over the scored tokens, to be divided by the number
            of those that have that metric.
        mismatch_max: fp32 scalar, the largest |trainer - engine| log-prob of a loss token.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    num_scored: Tensor
    sums: dict[str, Tensor]
    mismatch_max: Tensor


class Objective:
    """Divergence between student and teacher on the student's own samples.

    Args:
        config: which divergence, its parameters, and how it is computed.
        vocab_size: true vocabulary size; padded entries have probability and gradient 0.
        rollout_temperature: temperature of the sampler's log-probs.
        tp_group: the student's tensor-parallel group; None is a group of one.
    """

    def __init__(
        self,
        config: LossConfig,
        vocab_size: int,
        rollout_temperature: float,
        tp_group: dist.ProcessGroup | None,
    ) -> None:
        self.settings = LossSettings(config, vocab_size, rollout_temperature, tp_group)

    def __call__(
        self, hidden_TH: Tensor, head_VH: Tensor, batch: PackedBatch, signal: TeacherSignal
    ) -> ObjectiveOutput:
        """Every tensor-parallel rank calls it and holds the same result.

        Only the loss tokens' rows go into the divergence; the others have no gradient.

        Args:
            hidden_TH: the student's hidden states [T, H], equal on the ranks of tp_group.
            head_VH: this rank's rows of the student's LM head.
        """
        rows_L = batch.loss_mask_T.nonzero()[:, 0]
        rows = LossRows(
            hidden_LH=hidden_TH[rows_L],
            head_VH=head_VH,
            labels_L=batch.labels_T[rows_L],
            sampler_logprobs_L=batch.rollout_logprobs_T[rows_L],
            weights_L=batch.token_weights_T[rows_L],
        )
        terms = OBJECTIVES[type(signal)](self.settings, rows, signal)
        scored = rows.weights_L != 0
        # The engine sampled the tokens, so expm1(d) - d with d = log p_trainer - log p_engine is an
        # unbiased, non-negative estimate of KL(engine || trainer) (k3, joschu.net/blog/kl-approx).
        delta = torch.where(scored, terms.student_logprobs_L - rows.sampler_logprobs_L, 0.0)
        metrics = {**terms.metrics, "rollout/mismatch_kl": torch.expm1(delta) - delta}
        return ObjectiveOutput(
            loss_sum=terms.loss_sum,
            num_tokens=batch.loss_mask_T.sum().to(torch.int32),
            num_scored=scored.sum().to(torch.int32),
            sums={name: _masked_sum(values, scored) for name, values in metrics.items()},
            mismatch_max=(delta.abs().max() if delta.numel() else delta.new_zeros(())).float(),
        )


def _masked_sum(values_L: Tensor, mask_L: Tensor) -> Tensor:
    return torch.where(mask_L, values_L.detach(), 0.0).sum()
