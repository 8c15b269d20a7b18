"""What every objective takes, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch.distributed as dist
from torch import Tensor

from megaopd.config import LossConfig
from megaopd.losses.validation import require


@dataclass(frozen=True)
class LossSettings:
    """What is the same for all micro-batches.

    Attributes:
        config: which divergence, its parameters, and how it is computed.
        vocab_size: true vocabulary size; padded entries have probability and gradient 0.
        sampler_temperature: of the sampler's log-probs.
        tp_group: the student's tensor-parallel group; None is a group of one.
    """

    config: LossConfig
    vocab_size: int
    sampler_temperature: float
    tp_group: dist.ProcessGroup | None

    def require_server_temperature(self) -> None:
        """Raises LossArgumentError unless the loss has the temperature of servers' log-probs."""
        require(
            self.config.temperature == 1,
            "loss.temperature",
            f"{self.config.temperature} with a teacher on servers, whose log-probs are those at "
            "temperature 1",
            "set it to 1",
        )

    def chunk_tokens(self, num_rows: int) -> int | None:
        """Rows of logits alive at a time; all of them where the loss is not fused."""
        return self.config.chunk_tokens if self.config.fused else max(1, num_rows)


@dataclass(frozen=True)
class LossRows:
    """The loss tokens of a micro-batch, L of them.

    Attributes:
        hidden_LH: the student's hidden states, equal on the ranks of the tensor-parallel group.
        head_VH: this rank's rows of the student's LM head.
        labels_L: int64 the sampled tokens.
        sampler_logprobs_L: fp32 their log-probs under the sampler.
        weights_L: fp32 weights of their loss; a token of weight 0 is not computed.
        sampled_L: bool, whether the student sampled the token; elsewhere sampler_logprobs_L means
            nothing.
        advantages_L: fp32 advantages of the tokens; None where none were computed.
    """

    hidden_LH: Tensor
    head_VH: Tensor
    labels_L: Tensor
    sampler_logprobs_L: Tensor
    weights_L: Tensor
    sampled_L: Tensor
    advantages_L: Tensor | None = None

    def scored(self) -> tuple[LossRows, Tensor]:
        """The tokens that are computed, and where they are among these, int64."""
        kept = self.weights_L.nonzero()[:, 0]
        advantages = None if self.advantages_L is None else self.advantages_L[kept]
        return replace(
            self,
            hidden_LH=self.hidden_LH[kept],
            labels_L=self.labels_L[kept],
            sampler_logprobs_L=self.sampler_logprobs_L[kept],
            weights_L=self.weights_L[kept],
            sampled_L=self.sampled_L[kept],
            advantages_L=advantages,
        ), kept

    def require_sampled(self, objective: str) -> None:
        """Raises LossArgumentError unless the student sampled all tokens: expectations over its
        distribution are estimated from its own tokens alone."""
        others = int((~self.sampled_L).sum())
        require(
            others == 0,
            "rollout.mixture",
            f"{others} tokens that the student did not sample, with {objective}",
            "train on the student's samples alone, or choose loss.objective=divergence with a "
            "teacher that tells more than the sampled tokens, or likelihood",
        )


@dataclass(frozen=True)
class LossTerms:
    """What the loss tokens add; equal on the ranks of the tensor-parallel group, 0 for tokens of
    weight 0.

    Attributes:
        loss_sum: scalar, the sum of weight times loss; differentiable.
        student_logprobs_L: log-probs of the labels at the sampler's temperature, detached.
        metrics: name -> [L], detached; names are entries of `objective.METRICS`; student/entropy is
            always there.
    """

    loss_sum: Tensor
    student_logprobs_L: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def at_rows(columns: list[Tensor], kept: Tensor, num_rows: int) -> list[Tensor]:
    """Columns of the kept rows -> columns [num_rows] with 0 elsewhere."""
    return [x.new_zeros(num_rows).index_copy(0, kept, x) for x in columns]
