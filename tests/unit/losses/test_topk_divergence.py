"""`topk_divergence`: K = V, zero at equality, and its two forms against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaopd.losses import DIVERGENCES, LossArgumentError, topk_divergence
from tests.unit.losses.reference import (
    SETTINGS,
    from_logprobs,
    random_logits,
    reference,
    reference_gradient,
    relative_error,
)

KINDS = list(DIVERGENCES)
VOCAB, WIDTH, K = 60, 64, 7


def teacher(u: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    logprobs = (u[:, :VOCAB].double() / temperature).log_softmax(1).float()
    top = logprobs.topk(k, dim=1)
    return top.indices, top.values


def run(z: Tensor, ids: Tensor, logprobs: Tensor, weights: Tensor, **options):
    leaf = z.clone().requires_grad_()
    out = topk_divergence(leaf, ids, logprobs, vocab_size=VOCAB, **{**SETTINGS, **options})
    (out.loss_T * weights).sum().backward()
    return out, leaf.grad


def exact(kind: str, tail: str, z: Tensor, ids: Tensor, logprobs: Tensor, weights: Tensor):
    leaf = z[:, :VOCAB].double().requires_grad_()
    log_p, log_q = leaf.log_softmax(1), logprobs.double()
    picked = log_p.gather(1, ids)
    if tail == "bucket":
        outside = torch.ones_like(log_p).scatter(1, ids, 0).bool()
        rest = torch.where(outside, log_p, -math.inf).logsumexp(1, keepdim=True)
        teacher_rest = torch.log1p(-log_q.exp().sum(1, keepdim=True))
        picked, log_q = torch.cat([picked, rest], 1), torch.cat([log_q, teacher_rest], 1)
    loss = from_logprobs(kind, picked.log_softmax(1), log_q.log_softmax(1), **SETTINGS)
    (grad,) = torch.autograd.grad((loss * weights.double()).sum(), leaf)
    return loss.detach(), grad


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_match_fp64(kind, tail):
    z, u, w = random_logits(5, WIDTH, 1.0, spread=1.5)
    ids, logprobs = teacher(u, K)
    loss, grad = exact(kind, tail, z, ids, logprobs, w)
    for options in ({}, {"chunk_tokens": 2}, {"inplace": True}):
        out, found = run(z, ids, logprobs, w, kind=kind, tail=tail, **options)
        torch.testing.assert_close(out.loss_T.double(), loss, rtol=1e-5, atol=1e-6)
        assert relative_error(found[:, :VOCAB], grad) < 1e-5
        assert not found[:, VOCAB:].any()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_give_the_full_divergence(kind, tail):
    z, u, w = random_logits(5, WIDTH, 1.0)
    ids, logprobs = teacher(u, VOCAB, temperature=0.8)
    loss, grad = reference_gradient(kind, z[:, :VOCAB], u[:, :VOCAB], w, temperature=0.8)
    out, found = run(z, ids, logprobs, w, kind=kind, tail=tail, temperature=0.8)
    torch.testing.assert_close(out.loss_T.double(), loss, rtol=1e-5, atol=1e-6)
    assert relative_error(found[:, :VOCAB], grad) < 1e-5


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_no_gradient(kind, tail):
    if kind == "tvd":
        pytest.skip("its gradient is a sign: rounding of the log-probs decides it")
    z, _, w = random_logits(5, WIDTH, 1.0)
    out, grad = run(z, *teacher(z, K), w, kind=kind, tail=tail)
    assert out.loss_T.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_bucket_is_a_lower_bound(kind):
    z, u, w = random_logits(20, WIDTH, 2.0)
    full = reference(kind, z[:, :VOCAB], u[:, :VOCAB])
    last = torch.zeros(20, dtype=torch.float64)
    for k in (1, 4, 16, 59):
        out, _ = run(z, *teacher(u, k), w, kind=kind, tail="bucket")
        assert (out.loss_T >= last - 1e-5).all()
        assert (out.loss_T <= full + 1e-5).all()
        last = out.loss_T.double()


def test_a_teacher_without_tail_is_finite():
    z, u, w = random_logits(3, WIDTH, 1.0)
    u[:, 0] = 60.0
    for kind in KINDS:
        out, grad = run(z, *teacher(u, 2), w, kind=kind)
        assert torch.isfinite(out.loss_T).all()
        assert torch.isfinite(grad).all()


def test_bad_ids_are_refused():
    z, u, _ = random_logits(3, WIDTH, 1.0)
    ids, logprobs = teacher(u, K)
    ids[1, 2] = VOCAB
    with pytest.raises(LossArgumentError, match="teacher_ids"):
        topk_divergence(z, ids, logprobs, vocab_size=VOCAB)
    with pytest.raises(LossArgumentError, match="tail"):
        topk_divergence(z, ids, logprobs, tail="none")
