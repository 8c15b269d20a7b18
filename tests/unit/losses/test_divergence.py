"""`divergence`: values and gradients of every kind of the table against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaopd.losses import DIVERGENCES, DivergenceOutput, LossArgumentError, divergence
from tests.unit.losses.reference import (
    SETTINGS,
    random_logits,
    reference,
    reference_gradient,
    relative_error,
)

KINDS = list(DIVERGENCES)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(z: Tensor, u: Tensor, weights: Tensor, **options) -> tuple[DivergenceOutput, Tensor]:
    leaf = z.clone().requires_grad_()
    out = divergence(leaf, u, **{**SETTINGS, "backend": "eager", **options})
    (out.loss_T * weights).sum().backward()
    assert leaf.grad is not None
    return out, leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("gap", [0.05, 1.0, 6.0])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_match_fp64(kind, gap, temperature):
    vocab, width = 500, 512
    z, u, w = random_logits(7, width, gap)
    loss, grad = reference_gradient(kind, z[:, :vocab], u[:, :vocab], w, temperature)
    out, found = run(z, u, w, kind=kind, temperature=temperature, vocab_size=vocab)
    assert out.loss_T.dtype == torch.float32
    torch.testing.assert_close(out.loss_T.double(), loss, rtol=1e-5, atol=1e-7)
    assert relative_error(found[:, :vocab], grad) < 3e-6
    assert torch.equal(found[:, vocab:], torch.zeros(7, width - vocab))
    # To the rounding of fp32 entries, which are as large as the loss.
    assert (found.sum(1).abs() < 1e-6 * loss.clamp(min=1)).all()
    assert not out.student_entropy_T.requires_grad
    for entropy, x in ((out.student_entropy_T, z), (out.teacher_entropy_T, u)):
        exact = torch.distributions.Categorical(
            logits=x[:, :vocab].double() / temperature
        ).entropy()
        torch.testing.assert_close(entropy.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matches_finite_differences_of_the_value(kind):
    z, u, _ = random_logits(1, 6, 1.5, seed=3, spread=1.0)
    z, u = z.double(), u.double()
    _, grad = run(z, u, torch.ones(1), kind=kind, temperature=0.8)
    step = 1e-5
    for j in range(6):
        bump = torch.zeros_like(z)
        bump[0, j] = step
        up, down = (
            divergence(z + s * bump, u, kind=kind, temperature=0.8, **SETTINGS).loss_T.item()
            for s in (1, -1)
        )
        assert grad[0, j].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_equal_distributions_give_zero(kind, offset):
    z, _, w = random_logits(5, 300, 1.0)
    z = (z * 8).round() / 8  # shifted without rounding
    out, grad = run(z, z + offset, w, kind=kind)
    bound = 0.0 if offset == 0 else 2e-7
    assert out.loss_T.abs().max() <= bound
    assert grad.abs().max() <= bound


@pytest.mark.parametrize("shape", ["flat", "peaked"])
@pytest.mark.parametrize("gap", [3.2e-3, 2e-2])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "alpha", "mixed"])
def test_small_divergences_keep_their_digits(kind, gap, shape):
    z, u, w = random_logits(6, 8192, gap, spread=4.0 if shape == "peaked" else 0.5)
    loss, grad = reference_gradient(kind, z, u, w)
    out, found = run(z, u, w, kind=kind)
    assert float(loss.min()) < 3e-4
    assert ((out.loss_T.double() - loss).abs() / loss).max() < 1e-5
    assert relative_error(found, grad) < 1e-6


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "alpha", "mixed"])
@pytest.mark.parametrize("flat", ["student", "teacher"])
def test_peaked_beside_flat_is_redone_exactly(kind, flat):
    # The one-pass form would subtract numbers thousands of times the result here.
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, 4096, generator=generator) * 1e-3
    u = z + torch.randn(4, 4096, generator=generator) * 1e-3
    u[:, 0] += 2.5
    if flat == "teacher":
        z, u = u, z
    loss, grad = reference_gradient(kind, z, u, torch.ones(4))
    out, found = run(z, u, torch.ones(4), kind=kind)
    assert ((out.loss_T.double() - loss).abs() / loss).max() < 1e-5
    assert relative_error(found, grad) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits(kind, dtype):
    z, u, w = random_logits(6, 1000, 1.0)
    z, u = z.to(dtype), u.to(dtype)
    loss, grad = reference_gradient(kind, z, u, w)
    out, found = run(z, u, w, kind=kind)
    assert found.dtype == dtype
    assert ((out.loss_T.double() - loss).abs() / loss).max() < 1e-4
    assert relative_error(found, grad) < 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_full_vocabulary(kind):
    z, u, w = random_logits(2, 152_064, 0.5)
    loss, grad = reference_gradient(kind, z[:, :151_936], u[:, :151_936], w)
    out, found = run(z, u, w, kind=kind, vocab_size=151_936)
    assert ((out.loss_T.double() - loss).abs() / loss).max() < 1e-5
    assert relative_error(found[:, :151_936], grad) < 3e-6
    assert not found[:, 151_936:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_students_and_teachers_padded_differently(kind):
    z, u, w = random_logits(4, 40, 1.0)
    loss, grad = reference_gradient(kind, z[:, :32], u[:, :32], w)
    for width_z, width_u in ((32, 40), (40, 32), (36, 40)):
        out, found = run(z[:, :width_z], u[:, :width_u], w, kind=kind, vocab_size=32)
        torch.testing.assert_close(out.loss_T.double(), loss, rtol=1e-5, atol=1e-7)
        assert relative_error(found[:, :32], grad) < 3e-6
        assert not found[:, 32:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_masked_and_extreme_logits_are_finite(kind):
    z, u, w = random_logits(6, 64, 1.0)
    z[0, 5] = u[0, 5] = -math.inf  # masked on both sides: as if the column were not there
    z[1, 7] = -math.inf
    u[2, 9] = -math.inf
    z[3, 1], u[3, 2] = 1e4, -1e4
    z[4], u[4] = -1e4, 1e4
    z[5, :32], u[5, 32:] = -1e4, -1e4
    out, grad = run(z, u, w, kind=kind)
    assert torch.isfinite(out.loss_T).all()
    assert torch.isfinite(grad).all()
    assert grad[0, 5] == 0
    # Without probability the student is still pulled where the divergence is of the teacher's
    # making.
    assert -1 <= grad[1, 7] <= 0
    keep = [j for j in range(64) if j != 5]
    loss, _ = reference_gradient(kind, z[:1, keep], u[:1, keep], w[:1])
    assert out.loss_T[0].item() == pytest.approx(loss.item(), rel=1e-5)
    loss, expected = reference_gradient(kind, z[3:], u[3:], w[3:])
    torch.testing.assert_close(out.loss_T[3:].double(), loss, rtol=1e-5, atol=1e-6)
    # A log-ratio of 1e4 has an fp32 rounding of 1e-3, and the gradient is a difference of two.
    bound = 1e-6 * loss.clamp(min=1)[:, None] + 1e-5 * expected.abs()
    assert ((grad[3:].double() - expected).abs() <= bound).all()


def test_nan_logits_stay_visible():
    z, u, _ = random_logits(2, 16, 1.0)
    z[1, 3] = math.nan
    loss = divergence(z, u).loss_T
    assert torch.isfinite(loss[0])
    assert torch.isnan(loss[1])


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    z = torch.zeros(0, 16)
    out, grad = run(z, z, torch.zeros(0), kind=kind)
    assert out.loss_T.shape == (0,)
    assert grad.shape == (0, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_place_change_nothing(kind):
    z, u, w = random_logits(9, 200, 1.0)
    out, grad = run(z, u, w, kind=kind)
    for options in ({"chunk_tokens": 1}, {"chunk_tokens": 4}, {"inplace": True}):
        other, other_grad = run(z, u, w, kind=kind, **options)
        torch.testing.assert_close(other.loss_T, out.loss_T, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(other_grad, grad, rtol=1e-5, atol=1e-8)


def test_inplace_overwrites_the_students_logits():
    z, u, w = random_logits(3, 50, 1.0)
    logits = z.clone().requires_grad_()
    hidden = logits * 1.0
    (divergence(hidden, u, inplace=True).loss_T * w).sum().backward()
    _, grad = reference_gradient("reverse_kl", z, u, w)
    assert relative_error(hidden.detach(), grad) < 3e-6
    assert relative_error(logits.grad, grad) < 3e-6


@pytest.mark.parametrize("logprob_temperature", [None, 0.7, 1.3])
def test_label_logprobs_come_with_the_divergence(logprob_temperature):
    z, u, _ = random_logits(5, 80, 1.0)
    labels = torch.tensor([0, 79, 3, 3, 41])
    out = divergence(
        z, u, temperature=1.3, labels_T=labels, logprob_temperature=logprob_temperature
    )
    tau = logprob_temperature or 1.3
    for found, x in ((out.student_logprobs_T, z), (out.teacher_logprobs_T, u)):
        exact = (x.double() / tau).log_softmax(1).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
        assert not found.requires_grad


def test_ends_of_the_ranges_are_the_kls():
    z, u, w = random_logits(4, 100, 1.0)

    def same(kind, settings, limit):
        out, grad = run(z, u, w, kind=kind, **settings)
        other, other_grad = run(z, u, w, kind=limit)
        assert torch.equal(out.loss_T, other.loss_T)
        assert torch.equal(grad, other_grad)

    same("jsd", {"beta": 0.0}, "forward_kl")
    same("jsd", {"beta": 1.0}, "reverse_kl")
    same("skew_forward_kl", {"alpha": 0.0}, "forward_kl")
    same("skew_reverse_kl", {"alpha": 0.0}, "reverse_kl")
    same("alpha", {"alpha": 0.0}, "forward_kl")
    same("alpha", {"alpha": 1.0}, "reverse_kl")
    same("mixed", {"beta": 1.0}, "reverse_kl")
    for beta, limit in ((1e-4, "forward_kl"), (1 - 1e-4, "reverse_kl")):
        scaled = divergence(z, u, kind="jsd", beta=beta).loss_T / (beta * (1 - beta))
        torch.testing.assert_close(scaled, divergence(z, u, kind=limit).loss_T, rtol=3e-3, atol=0)


@pytest.mark.parametrize("order", [-0.5, 0.01, 0.5, 1.7, 2.0])
def test_orders_of_the_alpha_family(order):
    z, u, w = random_logits(4, 300, 0.7)
    loss, grad = reference_gradient("alpha", z, u, w, alpha=order)
    out, found = run(z, u, w, kind="alpha", alpha=order)
    torch.testing.assert_close(out.loss_T.double(), loss, rtol=3e-5, atol=1e-7)
    assert relative_error(found, grad) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "kl"},
        {"kind": "jsd", "beta": 1.5},
        {"kind": "skew_forward_kl", "alpha": 1.0},
        {"temperature": 0.0},
        {"vocab_size": 17},
        {"backend": "fast"},
        {"labels_T": torch.zeros(3, dtype=torch.int64)},
    ],
)
def test_bad_options_are_refused(options):
    z = torch.zeros(2, 16)
    with pytest.raises(LossArgumentError):
        divergence(z, z, **options)


def test_a_backward_can_be_repeated():
    z, u, w = random_logits(3, 30, 1.0)
    leaf = z.clone().requires_grad_()
    loss = (divergence(leaf, u).loss_T * w).sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, second)


def test_reference_covers_the_table():
    z, u, _ = random_logits(1, 4, 1.0)
    for kind in KINDS:
        assert reference(kind, z, u).shape == (1,)
