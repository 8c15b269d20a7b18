"""The response tokens of a global batch, samples end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megaopd.batch import Sample


@dataclass(frozen=True)
class Responses:
    """Samples, and tables over their R response tokens in the order of `PackedBatch.rows_T`.

    Attributes:
        samples: the N samples of the global batch.
        rewards: one of each in [0, 1], or whatever the user's own gives; None where nothing needs
            them.
    """

    samples: Sequence[Sample]
    rewards: Sequence[float] | None = None

    @cached_property
    def lengths(self) -> Tensor:
        """[N] response tokens, tools' included."""
        return torch.tensor([len(s.response_ids) for s in self.samples], dtype=torch.int64)

    @cached_property
    def mask(self) -> Tensor:
        """[R] bool, where the model produced the token."""
        return torch.tensor([own for s in self.samples for own in s.response_mask]).bool()

    @cached_property
    def num_tokens(self) -> Tensor:
        """[N] fp64, loss tokens of each sample."""
        counts = [sum(s.response_mask) for s in self.samples]
        return torch.tensor(counts, dtype=torch.float64)

    @cached_property
    def reward_tensor(self) -> Tensor:
        """[N] fp64."""
        assert self.rewards is not None, "rewards are scored where the configuration needs them"
        return torch.tensor(self.rewards, dtype=torch.float64)

    @cached_property
    def groups(self) -> Tensor:
        """[N] int64: the same number for samples of one prompt, from 0."""
        numbers: dict[str, int] = {}
        found = [numbers.setdefault(s.prompt.prompt_id, len(numbers)) for s in self.samples]
        return torch.tensor(found, dtype=torch.int64)

    def to_tokens(self, values: Tensor) -> Tensor:
        """[N] -> [R] fp32: a sample's value at its loss tokens, 0 off the mask."""
        return (values.repeat_interleave(self.lengths) * self.mask).float()

    def group_sums(self, values: Tensor) -> Tensor:
        """[N] -> [N]: the sum over the samples of the same prompt."""
        num = int(self.groups.max()) + 1 if len(self.groups) else 0
        return values.new_zeros(num).index_add_(0, self.groups, values)[self.groups]
