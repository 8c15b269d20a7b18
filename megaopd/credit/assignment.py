"""Weights and advantages of a step, as the configuration asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megaopd.batch import Sample, TokenScores
from megaopd.config import Config
from megaopd.credit.advantages import ADVANTAGES
from megaopd.credit.pass_rates import PassRates
from megaopd.credit.responses import Responses
from megaopd.credit.weights import NEED_REWARDS, sample_weights


@dataclass(frozen=True)
class Worth:
    """What the response tokens of a global batch are worth, [R] fp32 by `PackedBatch.rows_T`.

    Attributes:
        weights_R: None is 1 each.
        advantages_R: None where the loss has none.
        metrics: name -> value, equal on every rank.
    """

    weights_R: Tensor | None = None
    advantages_R: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class CreditAssignment:
    """Says what every response token of a step is worth; keeps the prompts' pass rates.

    Called with the same arguments on every rank, it gives the same on every rank.

    Args:
        config: the run.
        score: samples -> their rewards, equal on every rank; called where the configuration needs
            rewards.
    """

    def __init__(
        self, config: Config, score: Callable[[Sequence[Sample]], Sequence[float]]
    ) -> None:
        self.config, self.score = config, score
        self.pass_rates = PassRates(config.credit.paced_memory)
        advantages = ADVANTAGES if config.loss.objective == "policy_gradient" else ()
        self.coefs = {
            name: coef for name in advantages if (coef := getattr(config.credit, f"{name}_coef"))
        }

    @property
    def needs_scores(self) -> bool:
        """Whether it asks what student and teacher say about each token."""
        return "teacher" in self.coefs

    @property
    def needs_rewards(self) -> bool:
        return "reward" in self.coefs or self.config.credit.weights in NEED_REWARDS

    def __call__(self, samples: Sequence[Sample], scores: TokenScores | None) -> Worth:
        """What the tokens of the global batch are worth.

        Args:
            scores: what student and teacher say about them; None unless `needs_scores`.
        """
        rewards = self.score(samples) if self.needs_rewards else None
        responses = Responses(samples, rewards)
        metrics: dict[str, float] = {}
        if rewards is not None:
            self.pass_rates.update(samples, rewards)
            metrics |= self._reward_metrics(responses)
        if scores is not None:
            metrics |= _score_metrics(responses, scores)
        weights_R = self._weights(responses, metrics)
        return Worth(weights_R, self._advantages(responses, scores, metrics), metrics)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same weights."""
        return {"pass_rates": self.pass_rates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pass_rates.load_state_dict(state["pass_rates"])

    def _weights(self, responses: Responses, metrics: dict[str, float]) -> Tensor | None:
        c = self.config.credit
        if (c.weights, c.aggregation) == ("uniform", "token"):
            return None
        weights, weights_R = sample_weights(responses, self.config, self.pass_rates)
        if c.weights != "uniform":
            total = float(weights.sum())
            effective = total**2 / float((weights**2).sum()) if total else 0.0
            metrics["credit/weight_max"] = float(weights.max())
            metrics["credit/effective_samples"] = effective
        return weights_R

    def _advantages(
        self, responses: Responses, scores: TokenScores | None, metrics: dict[str, float]
    ) -> Tensor | None:
        if self.config.loss.objective != "policy_gradient":
            return None
        total = torch.zeros(len(responses.mask), dtype=torch.float64)
        for name, coef in self.coefs.items():
            total += coef * ADVANTAGES[name](responses, scores, self.config)
        own = total[responses.mask]
        if len(own):
            metrics["credit/advantage_mean"] = float(own.mean())
            metrics["credit/advantage_std"] = float(own.std(correction=0))
        return total.float()

    def _reward_metrics(self, responses: Responses) -> dict[str, float]:
        r = responses.reward_tensor
        sizes = responses.group_sums(torch.ones_like(r))
        spread = responses.group_sums((r - responses.group_sums(r) / sizes) ** 2)
        found = {
            "credit/reward_mean": float(r.mean()),
            # Of samples whose prompt's rewards are all the same: their advantage is 0.
            "credit/no_spread_fraction": float((spread < 1e-12).double().mean()),
        }
        if self.config.credit.weights == "paced":
            rates = [self.pass_rates[s.prompt.prompt_id] for s in responses.samples]
            found["credit/pass_rate_mean"] = sum(rates) / len(rates)
        return found


def _score_metrics(responses: Responses, scores: TokenScores) -> dict[str, float]:
    """Means over the loss tokens of what the teacher told."""
    found = {}
    for name, values in (
        ("loss/divergence", scores.divergence_R),
        ("teacher/entropy", scores.teacher_entropy_R),
    ):
        own = values[responses.mask].double()
        if len(own) and not bool(torch.isnan(own).any()):
            found[name] = float(own.mean())
    return found
