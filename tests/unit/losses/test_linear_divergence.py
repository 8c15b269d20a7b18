"""`linear_divergence` against the logits form and fp64, in each of its ways to the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaopd.losses import DIVERGENCES, LossArgumentError, divergence, linear_divergence
from tests.unit.losses.reference import SETTINGS, reference_gradient, relative_error

KINDS = list(DIVERGENCES)
T, VOCAB, WIDTH, H_STUDENT, H_TEACHER = 11, 90, 96, 16, 24


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, head = normal(T, H_STUDENT), normal(WIDTH, H_STUDENT) * 0.4
    teacher_hidden, teacher_head = normal(T, H_TEACHER), normal(WIDTH, H_TEACHER) * 0.3
    weights = torch.rand(T, generator=generator) + 0.1
    weights[[0, 4]] = 0
    return *(x.to(dtype) for x in (hidden, head, teacher_hidden, teacher_head)), weights


def exact(kind: str, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head, teacher_hidden, teacher_head, weights = inputs()
    z = hidden.double() @ head[:VOCAB].double().t()
    u = teacher_hidden.double() @ teacher_head[:VOCAB].double().t()
    loss, grad = reference_gradient(kind, z, u, weights, temperature)
    return loss, grad @ head[:VOCAB].double(), grad.t() @ hidden.double()


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 64])
@pytest.mark.parametrize("way", ["weights", "upstream"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_fp64(kind, way, chunk_tokens):
    hidden, head, teacher_hidden, teacher_head, weights = inputs()
    hidden.requires_grad_()
    head.requires_grad_()
    out = linear_divergence(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        kind=kind,
        temperature=0.9,
        vocab_size=VOCAB,
        chunk_tokens=chunk_tokens,
        weights_T=weights if way == "weights" else None,
        **SETTINGS,
    )
    loss, hidden_grad, head_grad = exact(kind, 0.9)
    kept = weights > 0 if way == "weights" else weights >= 0
    torch.testing.assert_close(out.loss_T[kept].double(), loss[kept], rtol=1e-5, atol=1e-6)
    if way == "weights":
        assert not out.loss_T[~kept].any()
        assert not out.loss_T.requires_grad
        assert out.loss_sum.item() == pytest.approx((loss * weights).sum().item(), rel=1e-5)
        (3.0 * out.loss_sum).backward()
        scale = 3.0
    else:
        assert out.loss_sum is None
        (out.loss_T * weights).sum().backward()
        scale = 1.0
    assert relative_error(hidden.grad, scale * hidden_grad) < 1e-5
    assert relative_error(head.grad[:VOCAB], scale * head_grad) < 1e-5
    assert not head.grad[VOCAB:].any()


@pytest.mark.parametrize("way", ["weights", "upstream"])
def test_frozen_head_gets_no_gradient(way):
    hidden, head, teacher_hidden, teacher_head, weights = inputs()
    hidden.requires_grad_()
    out = linear_divergence(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        vocab_size=VOCAB,
        chunk_tokens=3,
        weights_T=weights if way == "weights" else None,
    )
    (out.loss_sum if way == "weights" else (out.loss_T * weights).sum()).backward()
    _, hidden_grad, _ = exact("reverse_kl")
    assert relative_error(hidden.grad, hidden_grad) < 1e-5
    assert head.grad is None


def test_tied_embeddings_add_both_gradients():
    hidden, head, teacher_hidden, teacher_head, weights = inputs()
    table = head.clone().requires_grad_()
    ids = torch.arange(T) * 7 % VOCAB
    out = linear_divergence(
        table[ids] + hidden, table, teacher_hidden, teacher_head, weights_T=weights
    )
    out.loss_sum.backward()
    other = head.clone().requires_grad_()
    logits = (other[ids] + hidden) @ other.t()
    loss = divergence(logits, teacher_hidden @ teacher_head.t()).loss_T
    (loss * weights).sum().backward()
    torch.testing.assert_close(table.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [4, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_heads(kind, chunk_tokens):
    hidden, head, teacher_hidden, teacher_head, weights = inputs(torch.bfloat16)
    hidden.requires_grad_()
    head.requires_grad_()
    out = linear_divergence(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        kind=kind,
        vocab_size=VOCAB,
        chunk_tokens=chunk_tokens,
        weights_T=weights,
        **SETTINGS,
    )
    out.loss_sum.backward()
    z, u = (hidden @ head.t())[:, :VOCAB], (teacher_hidden @ teacher_head.t())[:, :VOCAB]
    loss, grad = reference_gradient(kind, z, u, weights)
    kept = weights > 0
    assert relative_error(out.loss_T[kept], loss[kept]) < 1e-4
    assert hidden.grad.dtype == head.grad.dtype == torch.bfloat16
    assert relative_error(hidden.grad, grad @ head[:VOCAB].double()) < 5e-3
    assert relative_error(head.grad[:VOCAB], grad.t() @ hidden.double()) < 5e-3


def test_labels_and_entropies_agree_with_the_logits_form():
    hidden, head, teacher_hidden, teacher_head, weights = inputs()
    labels = torch.arange(T) * 8 % VOCAB
    options = {"vocab_size": VOCAB, "labels_T": labels, "logprob_temperature": 0.8}
    out = linear_divergence(
        hidden, head, teacher_hidden, teacher_head, weights_T=weights, chunk_tokens=2, **options
    )
    whole = divergence(hidden @ head.t(), teacher_hidden @ teacher_head.t(), **options)
    kept = weights > 0
    for name in ("student_entropy_T", "student_logprobs_T", "teacher_logprobs_T"):
        found, expected = getattr(out, name), getattr(whole, name)
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=1e-5)
        assert not found[~kept].any()


@pytest.mark.parametrize("num_tokens", [0, T])
def test_without_loss_tokens_gradients_are_zero(num_tokens):
    hidden, head, teacher_hidden, teacher_head, _ = inputs()
    hidden, teacher_hidden = hidden[:num_tokens].clone(), teacher_hidden[:num_tokens]
    hidden.requires_grad_()
    head.requires_grad_()
    labels = torch.zeros(num_tokens, dtype=torch.int64)
    weights = torch.zeros(num_tokens)
    out = linear_divergence(
        hidden, head, teacher_hidden, teacher_head, labels_T=labels, weights_T=weights
    )
    out.loss_sum.backward()
    assert out.loss_sum == 0
    assert out.student_logprobs_T.shape == (num_tokens,)
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(head.grad, torch.zeros_like(head))


def test_evaluation_needs_no_gradient():
    hidden, head, teacher_hidden, teacher_head, weights = inputs()
    head.requires_grad_()
    with torch.no_grad():
        out = linear_divergence(hidden, head, teacher_hidden, teacher_head, weights_T=weights)
    assert not out.loss_sum.requires_grad
    assert out.loss_sum > 0


def test_no_array_of_all_logits_is_made():
    """The largest allocation is one chunk of logits or the head's gradient."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, hidden_size = 64, 512, 8
    hidden = torch.randn(tokens, hidden_size, generator=generator).requires_grad_()
    head = torch.randn(width, hidden_size, generator=generator).requires_grad_()
    teacher = torch.randn(tokens, hidden_size, generator=generator)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else (result,):
                if isinstance(x, Tensor) and x._base is None:
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // 4)
            return result

    for weights in (torch.ones(tokens), None):
        with Largest() as largest:
            out = linear_divergence(
                hidden, head, teacher, head.detach(), chunk_tokens=8, weights_T=weights
            )
            (out.loss_T.sum() if weights is None else out.loss_sum).backward()
        assert largest.elements <= max(8 * width, width * hidden_size)


def test_bad_shapes_are_refused():
    hidden, head, teacher_hidden, teacher_head, weights = inputs()
    with pytest.raises(LossArgumentError, match="student_hidden"):
        linear_divergence(hidden, head.double(), teacher_hidden, teacher_head)
    with pytest.raises(LossArgumentError, match="weights_T"):
        linear_divergence(hidden, head, teacher_hidden, teacher_head, weights_T=weights[:-1])
