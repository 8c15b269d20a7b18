"""What a sample is worth: weights and advantages, computed over the global batch of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CreditConfig:
    """What a sample, and each of its tokens, counts in the loss: weights, and the advantages of
    `loss.objective` policy_gradient."""

    weights: Literal["uniform", "reward_weighted", "paced"] = "uniform"
    """Weight of a sample, normalised over the global batch: `uniform` 1; `reward_weighted` grows
    with exp(reward / reward_beta); `paced` (arXiv 2603.11178) is p^paced_a (1 - p)^paced_b, p the
    pass rate of the sample's prompt."""
    reward: str = ""
    """How a training sample is scored, as eval.reward is; empty is eval.reward."""
    reward_beta: float = 1.0
    """Temperature of the rewards in `reward_weighted`; the smaller, the more the best sample
    counts."""
    reward_softmax: Literal["prompt", "batch"] = "prompt"
    """Samples that compete in `reward_weighted`: those of one prompt, so that each prompt counts
    the same, or all of the batch, where hard prompts count less."""
    paced_a: float = 1.0
    """Exponent of the pass rate in `paced`."""
    paced_b: float = 1.0
    """Exponent of the fail rate in `paced`."""
    paced_memory: float = 0.5
    """What a prompt's earlier samples count in its pass rate, once new ones come: 0 forgets them, 1
    counts all alike."""
    aggregation: Literal["token", "sample", "constant"] = "token"
    """How the losses of tokens become one: `token` is their mean over the global batch; `sample`
    the mean over samples of each one's mean, as in GRPO; `constant` each sample's sum divided by
    rollout.max_new_tokens, averaged over samples, as in Dr.GRPO (arXiv 2503.20783)."""
    teacher_coef: float = 1.0
    """Coefficient of the teacher's advantage, -(log p - log q) of the sampled token. With the
    reference as the teacher (teacher.kind self) it is that of the KL to it."""
    discount: float = 0.0
    """What a token gets of the teacher's advantages of the tokens after it, to the power of their
    distance: 0 is its own alone, 1 the return of a sequence-level KL."""
    baseline: Literal["none", "entropy", "divergence"] = "none"
    """What is taken off the teacher's advantage, to lower its variance: `entropy` the student's
    entropy less the teacher's, `divergence` -KL(p || q) over the whole vocabulary."""
    reward_coef: float = 0.0
    """Coefficient of the reward's advantage: the reward less the mean of the prompt's samples
    (GRPO, arXiv 2402.03300). Needs rollout.n > 1."""
    normalise_std: bool = True
    """Divide the reward's advantage by the standard deviation over the prompt's samples; false as
    in Dr.GRPO."""
