"""Weights of samples, and how the losses of their tokens become one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megaopd.config import Config
from megaopd.credit.pass_rates import PassRates
from megaopd.credit.responses import Responses


def uniform(responses: Responses, config: Config, rates: PassRates) -> Tensor:
    return torch.ones(len(responses.samples), dtype=torch.float64)


def reward_weighted(responses: Responses, config: Config, rates: PassRates) -> Tensor:
    """exp(reward / reward_beta), as a softmax over the samples of a prompt times their number, or
    as it is: normalised over the batch it is the batch's softmax (`reward_beta` of
    OPSD_OnPolicyDistillation)."""
    logits = responses.reward_tensor / config.credit.reward_beta
    if config.credit.reward_softmax == "batch":
        return (logits - logits.max()).exp()
    tops = torch.full_like(logits, -torch.inf)
    tops = tops.scatter_reduce(0, responses.groups, logits, "amax")[responses.groups]
    exponentials = (logits - tops).exp()
    sizes = responses.group_sums(torch.ones_like(logits))
    return sizes * exponentials / responses.group_sums(exponentials)


def paced(responses: Responses, config: Config, rates: PassRates) -> Tensor:
    """p^a (1 - p)^b of the prompt's pass rate p: PACED, arXiv 2603.11178."""
    c = config.credit
    p = torch.tensor([rates[s.prompt.prompt_id] for s in responses.samples], dtype=torch.float64)
    return p**c.paced_a * (1 - p) ** c.paced_b


# By credit.weights: (samples and rewards, the run's configuration, pass rates with this batch in
# them) -> a weight >= 0 per sample, [N] fp64, on any scale: `sample_weights` normalises them.
WEIGHTS: dict[str, Callable[[Responses, Config, PassRates], Tensor]] = {
    "uniform": uniform,
    "reward_weighted": reward_weighted,
    "paced": paced,
}
NEED_REWARDS = ("reward_weighted", "paced")


def _per_token(responses: Responses, config: Config) -> Tensor:
    return torch.ones_like(responses.num_tokens)


def _per_sample(responses: Responses, config: Config) -> Tensor:
    """The loss is divided by the number n of all loss tokens: n / (N n_i) makes it the mean over
    samples of each one's mean. Samples without a loss token are none."""
    n = responses.num_tokens
    num = (n > 0).sum().clamp(min=1)
    return torch.where(n > 0, n.sum() / (num * n.clamp(min=1)), 0.0)


def _constant(responses: Responses, config: Config) -> Tensor:
    """n / (N L): each sample's sum over L tokens, the same L for all; Dr.GRPO."""
    n = responses.num_tokens
    num = max(1, len(responses.samples))
    return torch.full_like(n, float(n.sum()) / (num * config.rollout.max_new_tokens))


# By credit.aggregation: the factor of a sample's tokens, [N] fp64, beside the division by the
# number of all loss tokens.
AGGREGATIONS: dict[str, Callable[[Responses, Config], Tensor]] = {
    "token": _per_token,
    "sample": _per_sample,
    "constant": _constant,
}


def sample_weights(responses: Responses, config: Config, rates: PassRates) -> tuple[Tensor, Tensor]:
    """Weights of the samples, normalised over the global batch, and the factors of their tokens.

    sum_i w_i f_i n_i = sum_i f_i n_i: the weighted mean of the loss is one, whatever the scale of
    the weights. Where all are 0 they stay 0, and the step has nothing to learn.

    Returns:
        (w [N] fp64, w_i f_i at each loss token [R] fp32).
    """
    weights = WEIGHTS[config.credit.weights](responses, config, rates)
    factors = AGGREGATIONS[config.credit.aggregation](responses, config)
    mass = factors * responses.num_tokens
    total = (weights * mass).sum()
    if total > 0:
        weights = weights * (mass.sum() / total)
    return weights, responses.to_tokens(weights * factors)
