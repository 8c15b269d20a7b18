"""An average of teachers is the geometric mean of their distributions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megaopd.batch import HiddenSignal, Sample
from megaopd.losses import linear_divergence
from megaopd.protocols import Student
from megaopd.teacher.average import AverageTeacher
from megaopd.teacher.head import HeadSlot, ModelHead

VOCAB, TOKENS = 11, 5


class Fixed:
    """A teacher of two micro-batches with the same hidden states at every call."""

    def __init__(self, hidden_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = [torch.randn(TOKENS, hidden_size, generator=generator) for _ in range(2)]
        self.head = torch.randn(VOCAB, hidden_size, generator=generator)
        self.metrics = {"perf/hand_over_bytes": float(seed)}
        self.closed = False

    def score(self, samples: Sequence[Sample]) -> list[HiddenSignal]:
        return [HiddenSignal(hidden, ModelHead(self.head)) for hidden in self.hidden]

    def logprobs(self, index: int) -> Tensor:
        return (self.hidden[index] @ self.head.t()).log_softmax(-1)

    def follow(self, student: Student) -> None:
        raise AssertionError("its weights do not change")

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_it_is_the_weighted_geometric_mean(weights: tuple[float, float]) -> None:
    members = [Fixed(6, 1), Fixed(4, 2)]
    average = AverageTeacher(members, weights, HeadSlot(torch.device("cpu")))
    for _ in range(2):  # the head is made once
        signals = average.score(())
    assert average.metrics == {"perf/hand_over_bytes": 3.0}
    for index, signal in enumerate(signals):
        found = (signal.hidden_LH @ signal.head.shard().t()).log_softmax(-1)
        mixed = sum(
            weight / sum(weights) * member.logprobs(index)
            for weight, member in zip(weights, members, strict=True)
        )
        assert isinstance(mixed, Tensor)
        torch.testing.assert_close(found, mixed.log_softmax(-1), rtol=1e-5, atol=1e-5)
    average.close()
    assert all(member.closed for member in members)


def test_its_gradient_is_the_average_of_the_members_reverse_kls() -> None:
    members = [Fixed(6, 1), Fixed(4, 2)]
    average = AverageTeacher(members, (3.0, 1.0), HeadSlot(torch.device("cpu")))
    hidden = torch.randn(TOKENS, 7, generator=torch.Generator().manual_seed(3))
    head = torch.randn(VOCAB, 7, generator=torch.Generator().manual_seed(4))

    def gradient(signal: HiddenSignal) -> Tensor:
        x = hidden.clone().requires_grad_()
        out = linear_divergence(x, head, signal.hidden_LH, signal.head.shard())
        return torch.autograd.grad(out.loss_T.sum(), x)[0]

    own = [gradient(member.score(())[0]) for member in members]
    together = gradient(average.score(())[0])
    torch.testing.assert_close(together, 0.75 * own[0] + 0.25 * own[1], rtol=1e-4, atol=1e-5)
