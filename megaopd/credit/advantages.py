"""Advantages of the sampled tokens, for a policy gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megaopd.batch import TokenScores
from megaopd.config import Config
from megaopd.credit.responses import Responses
from megaopd.errors import ConfigError

# Beside the standard deviation of a prompt's rewards.
_EPSILON = 1e-6


def teacher(responses: Responses, scores: TokenScores | None, config: Config) -> Tensor:
    """sum_{s >= t} discount^(s - t) (log q - log p)_s - b_t.

    With discount 0 and no baseline it is -(log p - log q) of the token itself (on-policy
    distillation, thinkingmachines.ai/blog/on-policy-distillation), whose policy gradient has the
    expectation of the full reverse KL's gradient; with discount 1 that of the sequence-level KL.
    b_t depends on what stands before the token, never on the token: it changes the variance alone.
    As E_y[log q - log p] = -KL(p || q) = H(p) + E_p[log q], `divergence` takes b = -KL(p || q), and
    `entropy` b = H(p) - H(q), which is it where both are close.
    """
    assert scores is not None, "scored where the configuration needs it"
    gain = scores.teacher_logprobs_R.double() - scores.student_logprobs_R.double()
    gain = torch.where(responses.mask, gain, 0.0)
    returns = discounted(gain, responses.lengths, config.credit.discount)
    baseline = BASELINES[config.credit.baseline](scores)
    if bool((torch.isnan(baseline) & responses.mask).any()):
        raise ConfigError(
            "credit.baseline",
            f"{config.credit.baseline}, and a teacher on servers tells the log-probs of a few "
            "tokens alone",
            "set it to none, or take the teacher onto the trainer's ranks",
        )
    return torch.where(responses.mask, returns - baseline, 0.0)


# By credit.baseline: what is taken off the teacher's advantage, [R].
BASELINES: dict[str, Callable[[TokenScores], Tensor]] = {
    "none": lambda s: torch.zeros_like(s.student_logprobs_R),
    "entropy": lambda s: s.student_entropy_R - s.teacher_entropy_R,
    "divergence": lambda s: -s.divergence_R,
}


def discounted(values_R: Tensor, lengths: Tensor, discount: float) -> Tensor:
    """sum_{s >= t} discount^(s - t) values_s within each sample, [R]."""
    if discount == 0 or not len(values_R):
        return values_R
    inside = torch.arange(int(lengths.max())) < lengths[:, None]  # [N, longest]
    padded = values_R.new_zeros(inside.shape)
    padded[inside] = values_R
    total = values_R.new_zeros(len(lengths))
    for t in reversed(range(padded.shape[1])):
        total = padded[:, t] + discount * total
        padded[:, t] = total
    return padded[inside]


def reward(responses: Responses, scores: TokenScores | None, config: Config) -> Tensor:
    """(r_i - mean) / std over the samples of the prompt, at all tokens of the sample: GRPO, arXiv
    2402.03300 (4.1.2); without the division Dr.GRPO, arXiv 2503.20783.

    The standard deviation is that of a sample (n - 1). One sample alone has advantage 0.
    """
    r = responses.reward_tensor
    sizes = responses.group_sums(torch.ones_like(r))
    centred = r - responses.group_sums(r) / sizes
    if config.credit.normalise_std:
        variance = responses.group_sums(centred**2) / (sizes - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + _EPSILON)
    return responses.to_tokens(centred).double()


# What makes up an advantage, each with the coefficient credit.NAME_coef; those of 0 are not
# computed: (samples and rewards, what student and teacher say or None, the run's configuration) ->
# [R] fp64, 0 off the mask.
ADVANTAGES: dict[str, Callable[[Responses, TokenScores | None, Config], Tensor]] = {
    "teacher": teacher,
    "reward": reward,
}
