"""The loss of training, weighted and summed over the loss tokens of a micro-batch.

`FORMS` has an entry for each `loss.objective`. How a divergence is computed depends on what the
teacher says: `OBJECTIVES` has an entry for each kind of `megaopd.batch.TeacherSignal`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.batch import HiddenSignal, PackedBatch, TeacherSignal, TokenSignal, TopKSignal
from megaopd.config import LossConfig
from megaopd.losses.label_rows import LabelRows
from megaopd.losses.sampled_tokens import estimator, likelihood, policy_gradient
from megaopd.losses.schedule import loss_at
from megaopd.losses.scores import scores
from megaopd.losses.selection import SELECTIONS, keep_in_batch
from megaopd.losses.signals.hidden import full_objective
from megaopd.losses.signals.labels import TokenLoss, label_terms
from megaopd.losses.signals.sampled import sampled_objective
from megaopd.losses.signals.terms import LossRows, LossSettings, LossTerms
from megaopd.losses.signals.top_k import top_k_objective
from megaopd.losses.validation import require

OBJECTIVES: dict[type, Callable[[LossSettings, LossRows, Any], LossTerms]] = {
    HiddenSignal: full_objective,
    TopKSignal: top_k_objective,
    TokenSignal: sampled_objective,
}


def _divergence(settings: LossSettings, rows: LossRows, signal: TeacherSignal) -> LossTerms:
    return OBJECTIVES[type(signal)](settings, rows, signal)


FORMS: dict[str, Callable[[LossSettings, LossRows, Any], LossTerms]] = {
    "divergence": _divergence,
    "policy_gradient": policy_gradient,
    "estimator": estimator,
    "likelihood": likelihood,
}


def needs_teacher(config: LossConfig) -> bool:
    """Whether the loss asks the teacher, at any step."""
    selection = SELECTIONS.get(config.selection)
    chosen_by_teacher = selection is not None and selection.kind is not None
    return config.objective in ("divergence", "estimator") or chosen_by_teacher


YARDSTICKS: dict[type, str] = {
    HiddenSignal: "eval/reverse_kl",
    TopKSignal: "eval/reverse_kl_lower_bound",
    TokenSignal: "eval/reverse_kl_estimate",
}
"""What the reverse KL that is measured with a kind of signal is called: it is exact, bounded from
below by merging tokens, or estimated from one token a position."""

METRICS = (
    "loss/divergence",
    "loss/policy_gradient",
    "loss/estimator",
    "loss/likelihood",
    "loss/entropy",
    "loss/clip_fraction",
    "loss/importance_clip_fraction",
    "loss/selected_fraction",
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
        loss_sum: fp32 scalar, sum over the loss tokens of weight times loss; differentiable.
        num_tokens: int32 scalar, the number of loss tokens, of the selected ones where there is a
            selection; the one normaliser of the gradient.
        num_scored: int32 scalar, the loss tokens whose weight is not 0; the others are not
            computed.
        sums: metric name -> fp32 scalar, a sum over the scored tokens, to be divided by the number
            of those that have that metric.
        mismatch_max: fp32 scalar, the largest |trainer - engine| log-prob of a loss token.
        counts: metric name -> how many tokens have it, where that is not num_scored.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    num_scored: Tensor
    sums: dict[str, Tensor]
    mismatch_max: Tensor
    counts: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """The loss on samples, of the student's own or others', and what is measured on the way.

    Args:
        config: which loss, its parameters, and how it is computed.
        vocab_size: true vocabulary size; padded entries have probability and gradient 0.
        rollout_temperature: temperature of the sampler's log-probs.
        tp_group: the student's tensor-parallel group; None is a group of one.
        cp_group: its context-parallel group, likewise.
    """

    def __init__(
        self,
        config: LossConfig,
        vocab_size: int,
        rollout_temperature: float,
        tp_group: dist.ProcessGroup | None,
        cp_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config, self.cp_group = config, cp_group
        self.settings = LossSettings(
            replace(config, schedule={}), vocab_size, rollout_temperature, tp_group
        )

    def start_step(self, step: int) -> None:
        """From here on the loss is that of `step`, see `loss.schedule`."""
        self.settings = replace(self.settings, config=loss_at(self.config, step))

    def __call__(
        self,
        hidden_TH: Tensor,
        head_VH: Tensor,
        batch: PackedBatch,
        signal: TeacherSignal | None,
    ) -> ObjectiveOutput:
        """Every rank of the tensor- and context-parallel groups calls it; those of the former hold
        the same result.

        Only the loss tokens' rows go into the loss; the others have no gradient.

        Args:
            hidden_TH: the student's hidden states [T, H], equal on the ranks of tp_group.
            head_VH: this rank's rows of the student's LM head.
            signal: the teacher's word; None where the loss does not ask for it (`needs_teacher`).
        """
        c = self.settings.config
        rows = _loss_rows(hidden_TH, head_VH, batch)
        selected = torch.ones_like(rows.sampled_L)
        if c.selection != "none" and c.selection_ratio < 1:
            selected = self._selected(rows, batch, signal)
            rows = replace(rows, weights_L=torch.where(selected, rows.weights_L, 0.0))
        terms = FORMS[c.objective](self.settings, rows, signal)
        scored = rows.weights_L != 0
        metrics = dict(terms.metrics)
        if c.entropy_coef:
            metrics["loss/entropy"] = -c.entropy_coef * metrics["student/entropy"]
        sums = {name: _masked_sum(values, scored) for name, values in metrics.items()}
        counts = {}
        if c.selection != "none":
            sums["loss/selected_fraction"] = selected.sum().float()
            counts["loss/selected_fraction"] = batch.loss_mask_T.sum()
        # The engine sampled the tokens, so expm1(d) - d with d = log p_trainer - log p_engine is an
        # unbiased, non-negative estimate of KL(engine || trainer) (k3, joschu.net/blog/kl-approx).
        own = scored & rows.sampled_L
        delta = torch.where(own, terms.student_logprobs_L - rows.sampler_logprobs_L, 0.0)
        sums["rollout/mismatch_kl"] = _masked_sum(torch.expm1(delta) - delta, own)
        counts["rollout/mismatch_kl"] = own.sum()
        return ObjectiveOutput(
            loss_sum=terms.loss_sum,
            num_tokens=selected.sum().to(torch.int32),
            num_scored=scored.sum().to(torch.int32),
            sums=sums,
            mismatch_max=(delta.abs().max() if delta.numel() else delta.new_zeros(())).float(),
            counts=counts,
        )

    def scores(
        self, hidden_TH: Tensor, head_VH: Tensor, batch: PackedBatch, signal: TeacherSignal
    ) -> Tensor:
        """[5, L], the fields of `TokenScores`, of the micro-batch's loss tokens; no gradient. Every
        rank of the tensor-parallel group calls it and holds the same."""
        return scores(self.settings, _loss_rows(hidden_TH, head_VH, batch), signal)

    @torch.no_grad()
    def _selected(self, rows: LossRows, batch: PackedBatch, signal: TeacherSignal | None) -> Tensor:
        """Which of the loss tokens are trained on, [L] bool."""
        c = self.settings.config
        kind = SELECTIONS[c.selection].kind
        require(
            kind is None or not isinstance(signal, TokenSignal),
            "loss.selection",
            f"{c.selection} with a teacher that tells the sampled tokens alone (teacher.top_k 0), "
            "which is no divergence",
            "choose entropy, or set teacher.top_k=64",
        )
        config = replace(c, objective="divergence", kind=kind or c.kind, entropy_coef=0.0)
        settings = replace(self.settings, config=config)
        # All tokens of a response compete, whatever they weigh.
        rows = replace(rows, weights_L=torch.ones_like(rows.weights_L))
        if kind is None:
            scored, kept = rows.scored()
            terms = label_terms(settings, scored, kept, len(rows.weights_L), _nothing)
            divergence = torch.zeros_like(terms.metrics["student/entropy"])
        else:
            assert signal is not None  # see `needs_teacher`
            terms = _divergence(settings, rows, signal)
            divergence = terms.metrics["loss/divergence"]
        entropy = terms.metrics["student/entropy"]
        choice = (c.selection, c.selection_ratio, c.selection_lowest)
        return keep_in_batch(*choice, batch, entropy, divergence, self.cp_group)


def _loss_rows(hidden_TH: Tensor, head_VH: Tensor, batch: PackedBatch) -> LossRows:
    mask, advantages = batch.loss_mask_T, batch.advantages_T
    rows_L = mask.nonzero()[:, 0]
    return LossRows(
        hidden_LH=hidden_TH[rows_L],
        head_VH=head_VH,
        labels_L=batch.labels_T[rows_L],
        sampler_logprobs_L=batch.rollout_logprobs_T[rows_L],
        weights_L=batch.token_weights_T[rows_L],
        sampled_L=(mask if batch.sampled_T is None else batch.sampled_T)[rows_L],
        advantages_L=None if advantages is None else advantages[rows_L],
    )


def _nothing(found: LabelRows, chunk: slice) -> TokenLoss:
    zero = torch.zeros_like(found.logprobs)
    return TokenLoss(zero, zero)


def _masked_sum(values_L: Tensor, mask_L: Tensor) -> Tensor:
    return torch.where(mask_L, values_L.detach(), 0.0).sum()
