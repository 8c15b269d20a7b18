"""The training loss of a micro-batch against its definition on full logits."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
import torch

from megaopd.batch import HiddenSignal, PackedBatch
from megaopd.config import LossConfig
from megaopd.losses.backends import BACKENDS
from megaopd.losses.objective import Objective

T, V, H = 7, 11, 4
MASK = torch.tensor([0, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
WEIGHTS = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 1.0])


class Head:
    """A head that lies where it is used."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def shard(self) -> torch.Tensor:
        return self.rows


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, head = randn(T, H).requires_grad_(), randn(V, H).requires_grad_()
    signal = HiddenSignal(randn(int(MASK.sum()), H), Head(randn(V, H)))
    labels = torch.randint(0, V, (T,), generator=generator)
    rollout = (hidden @ head.T).log_softmax(-1).gather(-1, labels[:, None])[:, 0].detach()
    batch = PackedBatch(
        tokens_T=labels,
        labels_T=labels,
        positions_T=torch.arange(T),
        loss_mask_T=MASK,
        rollout_logprobs_T=torch.where(MASK, rollout, 0.0),
        token_weights_T=WEIGHTS,
        rows_T=torch.where(MASK, torch.arange(T), -1),
        cu_seqlens=torch.tensor([0, T], dtype=torch.int32),
        sample_ids=("a/0",),
    )
    return hidden, head, batch, signal


def test_loss_gradient_and_metrics(inputs):
    hidden, head, batch, signal = inputs
    out = Objective(LossConfig(), V, 1.0, None)(hidden, head, batch, signal)

    log_p = (hidden @ head.T).log_softmax(-1)
    teacher_TH = torch.zeros(T, H)
    teacher_TH[MASK] = signal.hidden_LH  # a row per loss token, in order
    log_q = (teacher_TH @ signal.head.shard().T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = (kl * WEIGHTS * MASK).sum()
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert int(out.num_tokens) == 4

    # A token of weight 0 is normalised over, but its metrics are not computed.
    scored = MASK & (WEIGHTS != 0)
    assert int(out.num_scored) == 3
    assert out.sums["loss/divergence"].item() == pytest.approx(kl[scored].sum().item(), rel=1e-5)
    assert out.sums["student/entropy"].item() == pytest.approx(entropy[scored].sum().item())
    assert abs(out.sums["rollout/mismatch_kl"].item()) < 1e-10
    assert out.mismatch_max.item() < 1e-5

    gradients = torch.autograd.grad(out.loss_sum, (hidden, head))
    references = torch.autograd.grad(expected, (hidden, head))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_without_loss_tokens_the_gradients_are_zero_and_not_missing(inputs):
    """A rank without a loss token takes part in the backward pass like any other."""
    hidden, head, batch, signal = inputs
    batch = replace(batch, loss_mask_T=torch.zeros(T, dtype=torch.bool))
    signal = HiddenSignal(signal.hidden_LH[:0], signal.head)
    out = Objective(LossConfig(), V, 1.0, None)(hidden, head, batch, signal)
    assert out.loss_sum.item() == 0
    assert (int(out.num_tokens), int(out.num_scored)) == (0, 0)
    assert {float(value) for value in out.sums.values()} == {0.0}
    for gradient in torch.autograd.grad(out.loss_sum, (hidden, head)):
        assert gradient.abs().sum() == 0


def test_mismatch_sees_a_wrong_engine(inputs):
    hidden, head, batch, signal = inputs
    batch.rollout_logprobs_T[MASK] += 0.1
    out = Objective(LossConfig(), V, 1.0, None)(hidden, head, batch, signal)
    # expm1(-0.1) + 0.1 for each of the three scored tokens.
    assert out.sums["rollout/mismatch_kl"].item() == pytest.approx(3 * 0.00483742, rel=1e-3)
    assert out.mismatch_max.item() == pytest.approx(0.1, rel=1e-3)


def test_config_and_losses_name_the_same_backends():
    assert typing.get_args(typing.get_type_hints(LossConfig)["backend"]) == BACKENDS
