"""The backends agree, and "auto" takes one that works."""

from __future__ import annotations

import pytest
import torch

from megaopd.losses import DIVERGENCES, LossArgumentError, backends, divergence
from megaopd.losses.divergences import parts_of
from tests.unit.losses.reference import SETTINGS, random_logits, relative_error

KINDS = list(DIVERGENCES)


def compare(
    kind: str,
    backend: str,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    inplace: bool = False,
    vocab: int = 690,
) -> None:
    z, u, w = random_logits(num_tokens, vocab + 10, 1.0, seed=num_tokens)
    z[0, 3] = u[0, 3] = u[1, 4] = -torch.inf
    z, u = z.to(dtype), u.to(dtype)
    found = []
    for name in ("eager", backend):
        leaf = z.clone().requires_grad_()
        options = {**SETTINGS, "inplace": inplace and name == backend}
        out = divergence(leaf, u, kind=kind, backend=name, vocab_size=vocab, **options)
        (out.loss_T * w).sum().backward()
        found.append((out, leaf.grad))
    (eager, eager_grad), (other, other_grad) = found
    torch.testing.assert_close(other.loss_T, eager.loss_T, rtol=1e-5, atol=1e-7)
    for name in ("student_entropy_T", "teacher_entropy_T"):
        torch.testing.assert_close(getattr(other, name), getattr(eager, name), rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    assert relative_error(other_grad, eager_grad.double()) < tolerance


compiles = pytest.mark.skipif(not backends.can_compile(), reason="torch.compile does not work here")
# A kernel is traced and compiled for 10 to 60 s: what all kinds share is tested in `make test` with
# one of them.
long = pytest.mark.long


@pytest.mark.slow
@compiles
def test_compiled_agrees_for_any_number_of_tokens():
    for num_tokens in (5, 9, 2):
        for inplace in (True, False):
            compare("reverse_kl", "compiled", num_tokens, inplace=inplace)


@pytest.mark.slow
@compiles
@long
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_agrees_for_every_kind(kind):
    compare(kind, "compiled", 5)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize(
    ("kind", "vocab", "dtype"),
    [
        pytest.param("reverse_kl", 8192, torch.bfloat16, marks=long),
        pytest.param("reverse_kl", 9000, torch.bfloat16, marks=long),
        pytest.param("reverse_kl", 9000, torch.float32, marks=long),
        pytest.param("reverse_kl", 691, torch.bfloat16, marks=long),
        pytest.param("reverse_kl", 691, torch.float32, marks=long),
        pytest.param("mixed", 690, torch.bfloat16, marks=long),
        pytest.param("jsd", 690, torch.bfloat16, marks=long),
    ],
)
def test_compiled_agrees_for_widths_in_blocks_and_odd_ones(kind, vocab, dtype):
    compare(kind, "compiled", 3, dtype, inplace=True, vocab=vocab)


def test_auto_is_eager_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    backends.can_compile.cache_clear()
    try:
        chosen = backends.choose_backend(
            "auto", parts_of("jsd", 0.5, 0.1), torch.device("cpu"), torch.float32, 2**30
        )
        assert chosen == "eager"
        with pytest.raises(LossArgumentError, match="backend"):
            divergence(torch.zeros(2, 8), torch.zeros(2, 8), backend="compiled")
    finally:
        backends.can_compile.cache_clear()


def test_small_calls_are_not_compiled():
    device = torch.device("cpu")
    parts = parts_of("jsd", 0.5, 0.1)
    assert backends.choose_backend("auto", parts, device, torch.float32, 1000) == "eager"
