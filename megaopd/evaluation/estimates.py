"""Figures of an evaluation, each estimated without bias and with an interval.

A figure is a mean over prompts of a number in [0, 1]. The n samples of a prompt are not
independent evidence: what is uncertain is mostly which prompts were asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist, fmean

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        value: the mean, in [0, 1].
        low, high: ends of the interval with `CONFIDENCE`, for prompts like these.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(per_prompt: Sequence[float], num_samples: int = 1) -> Estimate:
    """Mean and interval of figures in [0, 1], one for each prompt.

    The interval is Wilson's (J. Am. Stat. Assoc. 22, 1927), which stays in [0, 1] and has a width
    where all figures are 0 or all 1, with the effective sample size in place of the number of
    trials (Korn and Graubard, Survey Methodology 24, 1998): m (1 - m) / var(m) independent trials
    with mean m would vary as much as these prompts do.

    Args:
        num_samples: of each prompt; the effective size is at most prompts x samples.

    Raises:
        ValueError: there are no figures.
    """
    if not per_prompt:
        raise ValueError("no prompt has a figure")
    num = len(per_prompt)
    mean = fmean(per_prompt)
    size = float(num)
    spread = mean * (1 - mean)
    if num > 1 and spread > 0:
        variance = sum((x - mean) ** 2 for x in per_prompt) / (num - 1) / num
        most = float(num * num_samples)
        size = min(most, spread / variance) if variance > 0 else most
    centre = (mean + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z * math.sqrt(spread / size + _Z**2 / (4 * size**2)) / (1 + _Z**2 / size)
    # Rounding must not exclude a mean at an end of the range.
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k samples of a prompt hold a correct one, estimated without bias from n.

    1 - C(n - c, k) / C(n, k): the share of the k-subsets of the samples with a correct one (Chen et
    al., arXiv 2107.03374, eq. 1). 1 - (1 - c/n)^k would be too low.

    Raises:
        ValueError: k is not in 1..n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples")
    missed = Fraction(math.comb(num_samples - num_correct, k), math.comb(num_samples, k))
    return float(1 - missed)


def majority(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """Score of the answer that most samples of a prompt give (Wang et al., arXiv 2203.11171).

    Among answers that equally many give one is drawn: the expected score is returned. A sample
    without an answer has no vote; without any vote the score is 0. An answer's score is the mean of
    its samples'.
    """
    votes: dict[str, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(score)
    most = max(map(len, votes.values()), default=0)
    return fmean([fmean(own) for own in votes.values() if len(own) == most] or [0.0])


def default_ks(num_samples: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to the number of samples, which is among them."""
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i < num_samples]
    return (*powers, num_samples)


@dataclass(frozen=True)
class Figures:
    """What the samples of some prompts amount to.

    Attributes:
        num_prompts: with samples.
        num_samples: of each prompt.
        mean: mean@n, the mean score.
        pass_at: k -> pass@k; correct is a sample with full marks.
        majority: maj@n; with one sample it is the mean over those that give an answer.
        lengths: name -> response tokens: mean, median, p90, max, mean of the correct and of the
            wrong (None where there are none).
        truncated: share of the responses that were cut at the length limit.
        unanswered: share of the responses in which no answer is found.
    """

    num_prompts: int
    num_samples: int
    mean: Estimate
    pass_at: Mapping[int, Estimate]
    majority: Estimate
    lengths: Mapping[str, float | None]
    truncated: Estimate
    unanswered: float


def quantile(values: Sequence[int], share: float) -> float:
    """The smallest of `values` that `share` of them do not exceed."""
    ordered = sorted(values)
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])
