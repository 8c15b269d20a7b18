"""Several teachers whose log-probabilities are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megaopd.batch import HiddenSignal, Sample
from megaopd.protocols import Student, Teacher
from megaopd.teacher.head import HeadSlot, HostedHead


class AverageTeacher:
    """A `Teacher` with log q = sum_k w_k log q_k + const, sum_k w_k = 1: the normalised geometric
    mean of its members' distributions.

    It is what the average of the members' reverse KLs asks of the student: sum_k w_k KL(p || q_k) =
    KL(p || q) + a constant that does not depend on p. Its logits are sum_k w_k h_k W_k^T, so it is
    a teacher like any other: its hidden states are the members' side by side, [h_1, h_2, ...], and
    its head their heads, [w_1 W_1, w_2 W_2, ...]; exact over the whole vocabulary.

    Args:
        members: teachers of hidden states, of one dtype, whose weights do not change.
        weights: what each counts; divided by their sum, and rounded to the heads' dtype.
        slot: where the head goes on the device.

    Attributes:
        metrics: sums of the members' own, of the last `score`.
    """

    def __init__(
        self, members: Sequence[Teacher], weights: Sequence[float], slot: HeadSlot
    ) -> None:
        self.members = tuple(members)
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.slot = slot
        self.metrics: dict[str, float] = {}
        self._head: HostedHead | None = None

    def score(self, samples: Sequence[Sample]) -> list[HiddenSignal]:
        """Every member scores the samples; the signals are theirs, side by side."""
        by_member = [member.score(samples) for member in self.members]
        self.metrics = {}
        for member in self.members:
            for key, value in member.metrics.items():
                self.metrics[key] = self.metrics.get(key, 0.0) + value
        return [self._joined(signals) for signals in zip(*by_member, strict=True)]

    def follow(self, student: Student) -> None:
        """Its members' weights stay as they are."""

    def close(self) -> None:
        """Each of the members by itself."""
        for member in self.members:
            member.close()

    def _joined(self, signals: Sequence[object]) -> HiddenSignal:
        hidden, rows = [], []
        for signal, weight in zip(signals, self.weights, strict=True):
            assert isinstance(signal, HiddenSignal)
            hidden.append(signal.hidden_LH)
            if self._head is None:
                rows.append((signal.head.shard() * weight).cpu())
        if self._head is None:
            self._head = HostedHead(torch.cat(rows, dim=1), self.slot)
        return HiddenSignal(torch.cat(hidden, dim=1), self._head)
