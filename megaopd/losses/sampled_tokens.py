"""Objectives on the sampled token: policy gradient, estimators of the KL as losses, likelihood.

With y drawn from p and d = log p(y) - log q(y), E_y[d grad log p(y)] = grad KL(p || q): a policy
gradient with the advantage -d, and k2 = d^2 / 2 as a loss, have the gradient of the full reverse KL
and more variance; k3 as a loss has that of the forward KL (`estimators` has the table).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megaopd.batch import TeacherSignal
from megaopd.losses.importance import importance
from megaopd.losses.label_rows import LabelRows
from megaopd.losses.signals.labels import TokenLoss, label_terms
from megaopd.losses.signals.sampled import LEAST_D
from megaopd.losses.signals.terms import LossRows, LossSettings, LossTerms, at_rows
from megaopd.losses.teacher_logprobs import teacher_logprobs
from megaopd.losses.validation import require


def policy_gradient(
    settings: LossSettings, rows: LossRows, signal: TeacherSignal | None
) -> LossTerms:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = p(y) / p_sampler(y): PPO's clipped
    surrogate, arXiv 1707.06347 (7), without the teacher, whose word is in A.

    Raises:
        LossArgumentError: there are no advantages, or tokens that the student did not sample.
    """
    c = settings.config
    scored, kept = rows.scored()
    scored.require_sampled("loss.objective=policy_gradient")
    require(
        scored.advantages_L is not None,
        "loss.objective",
        "policy_gradient without advantages",
        "compute them with megaopd.credit",
    )
    assert scored.advantages_L is not None
    advantages = scored.advantages_L

    def token_loss(found: LabelRows, chunk: slice) -> TokenLoss:
        a = advantages[chunk].to(found.logprobs.dtype)
        ratio = torch.exp(found.logprobs - scored.sampler_logprobs_L[chunk])
        clipped = torch.where(a < 0, ratio < 1 - c.clip_low, ratio > 1 + c.clip_high) & (a != 0)
        bounded = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
        value = -torch.minimum(ratio * a, bounded * a)
        metrics = {"loss/policy_gradient": value, "loss/clip_fraction": clipped.to(value.dtype)}
        return TokenLoss(value, torch.where(clipped, 0.0, -ratio * a), metrics)

    return label_terms(settings, scored, kept, len(rows.weights_L), token_loss)


def _k2(d: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * d * d, d


def _k3(d: Tensor) -> tuple[Tensor, Tensor]:
    return torch.expm1(-d) + d, -torch.expm1(-d)


# By loss.estimator: d -> (value, its derivative). k1 = d is no loss: its gradient, grad log p(y),
# has expectation 0 and no teacher in it.
ESTIMATORS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"k2": _k2, "k3": _k3}


def estimator(settings: LossSettings, rows: LossRows, signal: TeacherSignal) -> LossTerms:
    """k2 or k3 as a loss on the sampled token, see `estimators`; weighted with what `importance`
    makes of p(y) over the sampler's probability of it.

    `loss/divergence` is k3 whatever is trained: unbiased, and never negative.

    Raises:
        LossArgumentError: the teacher does not tell a sampled token's log-prob, or the student did
            not sample a token.
    """
    c = settings.config
    scored, kept = rows.scored()
    scored.require_sampled("loss.objective=estimator")
    teacher = teacher_logprobs(settings, scored, kept, signal)

    def token_loss(found: LabelRows, chunk: slice) -> TokenLoss:
        d = (found.logprobs - teacher.logprobs[chunk]).clamp(min=LEAST_D)
        value, slope = ESTIMATORS[c.estimator](d)
        counts, metrics = importance(found.logprobs - scored.sampler_logprobs_L[chunk], c)
        metrics |= {"loss/estimator": counts * value, "loss/divergence": counts * _k3(d)[0]}
        return TokenLoss(counts * value, counts * slope, metrics)

    terms = label_terms(settings, scored, kept, len(rows.weights_L), token_loss)
    if teacher.entropy is not None:
        (entropy,) = at_rows([teacher.entropy], kept, len(rows.weights_L))
        terms.metrics["teacher/entropy"] = entropy
    return terms


def likelihood(settings: LossSettings, rows: LossRows, signal: TeacherSignal | None) -> LossTerms:
    """-log p(y), of tokens that anybody wrote: supervised fine-tuning, and with samples of the
    teacher sequence-level distillation (Kim and Rush, arXiv 1606.07947)."""
    scored, kept = rows.scored()

    def token_loss(found: LabelRows, chunk: slice) -> TokenLoss:
        value = -found.logprobs
        return TokenLoss(value, -torch.ones_like(value), {"loss/likelihood": value})

    return label_terms(settings, scored, kept, len(rows.weights_L), token_loss)
