"""k1, k2, k3: expectations by enumerating every token of a small vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaopd.losses import LossArgumentError, sampled_divergence
from tests.unit.losses.reference import random_logits, reference, reference_gradient


def expected(estimator: str, use: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E over y ~ p of the value and of the gradient with y fixed, beside z and u."""
    z, u, _ = random_logits(1, 12, 1.0, seed=2, spread=1.0)
    z = z.double().requires_grad_()
    log_p, log_q = z.log_softmax(1)[0], u.double().log_softmax(1)[0]
    p = log_p.detach().exp()
    value = sampled_divergence(log_p, log_q, estimator=estimator, use=use)
    if use == "advantage":
        assert not value.requires_grad
        # A policy gradient is maximised; as a loss it has the opposite sign.
        objective = -(p * value.double() * log_p).sum()
    else:
        objective = (p * value.double()).sum()
    (grad,) = torch.autograd.grad(objective, z)
    return (p * value.detach()).sum(), grad, z.detach(), u


def gradient(kind: str, z: Tensor, u: Tensor) -> Tensor:
    return reference_gradient(kind, z, u, torch.ones(1))[1]


def test_k1_as_an_advantage_has_the_reverse_kls_gradient():
    value, grad, z, u = expected("k1", "advantage")
    torch.testing.assert_close(grad, gradient("reverse_kl", z, u), rtol=1e-5, atol=1e-7)
    assert -value.item() == pytest.approx(reference("reverse_kl", z, u).item(), rel=1e-5)


def test_k2_as_a_loss_has_the_reverse_kls_gradient():
    _, grad, z, u = expected("k2", "loss")
    torch.testing.assert_close(grad, gradient("reverse_kl", z, u), rtol=1e-5, atol=1e-7)


def test_k3_as_a_loss_estimates_the_reverse_kl_and_has_the_forward_kls_gradient():
    value, grad, z, u = expected("k3", "loss")
    assert value.item() == pytest.approx(reference("reverse_kl", z, u).item(), rel=1e-5)
    torch.testing.assert_close(grad, gradient("forward_kl", z, u), rtol=1e-5, atol=1e-7)


def test_k3_as_an_advantage_has_the_difference_of_both_gradients():
    _, grad, z, u = expected("k3", "advantage")
    difference = gradient("reverse_kl", z, u) - gradient("forward_kl", z, u)
    torch.testing.assert_close(grad, difference, rtol=1e-5, atol=1e-7)


def test_k1_as_a_loss_is_refused_because_its_expected_gradient_is_zero():
    z, u, _ = random_logits(1, 12, 1.0)
    z = z.double().requires_grad_()
    log_p, log_q = z.log_softmax(1), u.double().log_softmax(1)
    (grad,) = torch.autograd.grad((log_p.detach().exp() * (log_p - log_q)).sum(), z)
    assert grad.abs().max() < 1e-12
    with pytest.raises(LossArgumentError, match="expectation 0"):
        sampled_divergence(log_p, log_q, estimator="k1", use="loss")


@pytest.mark.parametrize("options", [{"estimator": "k4"}, {"use": "reward"}])
def test_unknown_names_are_refused(options):
    with pytest.raises(LossArgumentError):
        sampled_divergence(torch.zeros(1), torch.zeros(1), **options)
