"""The Triton kernels: computed in Triton's interpreter, and compiled for a GPU that need not be
there.

The interpreter has to be chosen before triton is imported, which torch.compile may have done
already: it gets a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megaopd.losses import DIVERGENCES, divergence, linear_divergence
from megaopd.losses.divergences import parts_of
from megaopd.losses.torch_backend import TorchBackend
from tests.helpers.distributed import run_distributed
from tests.unit.losses.reference import SETTINGS, random_logits, reference_gradient, relative_error

KINDS = list(DIVERGENCES)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")
needs_compiler = pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None,
    reason="needs triton, and not its interpreter",
)


@pytest.mark.slow
@needs_compiler
def test_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    # Skipped are this test and the compiled ones, no other.
    assert f", {1 + len(KINDS)} skipped in" in result.stdout, result.stdout


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compile_for_a_gpu(kind):
    """Down to machine code for compute capability 9.0 (H100, H200); no GPU is needed for that."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from megaopd.losses import triton_backend, triton_kernels

    backend = triton_backend.TritonBackend(parts_of(kind, 0.3, 0.2), 1.0, None)
    values = {**backend.terms, **backend.common, "EXTRA": True, "BLOCK": triton_backend._BLOCK}
    types = {"z_ptr": "*bf16", "u_ptr": "*bf16", "rows_ptr": "*fp32", "num_columns": "i32"}
    outputs = (
        (triton_kernels.forward_kernel, "*fp64"),
        (triton_kernels.sums_kernel, "*fp32"),
        (triton_kernels.gradient_kernel, "*bf16"),
    )
    for kernel, output in outputs:
        signature, constants = {}, {}
        for parameter in kernel.params:
            name = parameter.name
            if parameter.is_constexpr:
                signature[name], constants[(parameter.num,)] = "constexpr", values[name]
            elif name.endswith("_stride"):
                signature[name] = "i64"
            else:
                signature[name] = output if name == "out_ptr" else types.get(name, "fp32")
        compiled = compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": triton_backend._NUM_WARPS},
        )
        assert compiled.asm["cubin"], kernel.__name__


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
@pytest.mark.parametrize("kind", KINDS)
def test_triton_on_extreme_logits(kind, small_blocks):
    z, u, w = random_logits(4, 300, 1.0)
    z[1], u[1] = z[1] * 2e3, u[1] * 2e3
    u[2] += 1e4
    z[:, 3] = u[:, 3] = -torch.inf  # masked on both sides
    z[0, :200] = u[0, :200] = -torch.inf  # whole blocks
    z[3, :200] = -torch.inf  # on one side only
    floor = small_blocks.LOGIT_FLOOR
    loss, grad = reference_gradient(kind, z.clamp(min=floor), u.clamp(min=floor), w)
    leaf = z.clone().requires_grad_()
    out = divergence(leaf, u, kind=kind, backend="triton", **SETTINGS)
    (out.loss_T * w).sum().backward()
    torch.testing.assert_close(out.loss_T.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-4, atol=1e-6)


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
@pytest.mark.parametrize("kind", ["reverse_kl", "skew_reverse_kl"])
def test_triton_under_the_heads(kind, small_blocks):
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 8), (300, 8), (5, 12), (300, 12))
    hidden, head, *teacher = (0.6 * torch.randn(shape, generator=generator) for shape in shapes)
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.1])
    results = []
    for backend in ("eager", "triton"):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        out = linear_divergence(
            *leaves,
            *teacher,
            kind=kind,
            backend=backend,
            weights_T=weights,
            vocab_size=290,
            chunk_tokens=2,
            entropy_coef=0.2,
        )
        out.loss_sum.backward()
        results.append((out.loss_T, *(leaf.grad for leaf in leaves)))
    for eager, other in zip(*results, strict=True):
        assert relative_error(other, eager.double()) < 1e-5
    empty = linear_divergence(hidden[:0], head, teacher[0][:0], teacher[1], backend="triton")
    assert empty.loss_T.shape == (0,)


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


def _shard_errors(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    """By kind: relative errors of loss and of this rank's gradient."""
    errors = {}
    for kind in KINDS:
        z, u, w = random_logits(2, 400, 0.5)
        loss, grad = reference_gradient(kind, z[:, :390], u[:, :390], w)
        mine = slice(rank * 200, (rank + 1) * 200)
        leaf = z[:, mine].clone().requires_grad_()
        options = {"backend": "triton", "vocab_size": 390, "tp_group": dist.group.WORLD}
        out = divergence(leaf, u[:, mine], kind=kind, **options, **SETTINGS)
        (out.loss_T * w).sum().backward()
        wanted = grad[:, mine]
        found = leaf.grad[:, : wanted.shape[1]]
        errors[kind] = relative_error(out.loss_T, loss), relative_error(found, wanted)
    return errors


@needs_interpreter
def test_triton_over_two_ranks():
    for errors in run_distributed(_shard_errors, 2, timeout_s=120):
        for kind, (loss_error, gradient_error) in errors.items():
            assert loss_error < (1e-4 if kind == "tvd" else 1e-5), kind
            assert gradient_error < 1e-5, kind
