"""The Triton kernels in Triton's interpreter, in a process of its own.

The interpreter has to be chosen before triton is imported, which torch.compile may have done
already.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from megaopd.losses import DIVERGENCES, divergence
from megaopd.losses.divergences import parts_of
from megaopd.losses.torch_backend import TorchBackend
from tests.unit.losses.reference import SETTINGS, random_logits, reference_gradient, relative_error

KINDS = list(DIVERGENCES)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout


@pytest.fixture
def small_blocks(monkeypatch):
    """The kernels with blocks smaller than the test's vocabulary."""
    from megaopd.losses import triton_backend

    monkeypatch.setattr(triton_backend, "_BLOCK", 128)
    return triton_backend


@needs_interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_triton_matches_fp64(kind, small_blocks):
    for gap in (3e-3, 1.0):
        z, u, w = random_logits(3, 500, gap)
        u = u + 5.0
        loss, grad = reference_gradient(kind, z[:, :490], u[:, :490], w, temperature=0.8)
        leaf = z.clone().requires_grad_()
        out = divergence(
            leaf, u, kind=kind, backend="triton", temperature=0.8, vocab_size=490, **SETTINGS
        )
        (out.loss_T * w).sum().backward()
        tolerance = 1e-3 if kind == "tvd" else 1e-5
        assert relative_error(out.loss_T, loss) < tolerance
        assert relative_error(leaf.grad[:, :490], grad) < 1e-5
        assert not leaf.grad[:, 490:].any()


@needs_interpreter
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_triton_takes_half_precision_in_place_with_labels(kind, small_blocks):
    z, u, w = random_logits(3, 300, 1.0)
    z, u = z.bfloat16(), u.bfloat16()
    labels = torch.tensor([0, 299, 7])
    results = []
    for backend in ("eager", "triton"):
        leaf = z.clone().requires_grad_()
        out = divergence(
            leaf,
            u,
            kind=kind,
            backend=backend,
            inplace=True,
            labels_T=labels,
            logprob_temperature=0.7,
        )
        (out.loss_T * w).sum().backward()
        results.append((out, leaf.grad))
    (eager, eager_grad), (other, other_grad) = results
    for name in ("loss_T", "student_logprobs_T", "teacher_logprobs_T", "student_entropy_T"):
        torch.testing.assert_close(getattr(other, name), getattr(eager, name), rtol=1e-5, atol=1e-5)
    # The interpreter rounds bf16 towards 0 where the hardware rounds to nearest.
    assert relative_error(other_grad, eager_grad.double()) < 1e-2


@needs_interpreter
def test_triton_elements_match_the_table(small_blocks):
    d = torch.linspace(-30, 30, 500)[None]
    z, u = d.clone(), torch.zeros(1, 500)
    for kind in KINDS:
        parts = parts_of(kind, 0.3, 0.2)
        rows = torch.tensor([[30.0, 0.0, 0.05, 0.002, 30.0]])
        for found, expected in zip(
            small_blocks.TritonBackend(parts, 1.0, None).global_sums(z, u, rows),
            TorchBackend(parts, 1.0, None, compiled=False).global_sums(z, u, rows),
            strict=True,
        ):
            torch.testing.assert_close(
                torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-6
            )
