"""Norms: their values, their marks, and the norm between an output and the residual stream."""

import pytest
import torch

# megaopd first: it lets megatron be imported where there is no CUDA.
from megaopd.models.norms import NormedResidual, RMSNorm  # isort: split

from megatron.core.transformer.transformer_config import TransformerConfig


def _config(dtype: torch.dtype = torch.float64, sequence_parallel: bool = False):
    return TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        layernorm_epsilon=1e-3,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
    )


def _norm(dtype: torch.dtype, sequence_parallel: bool = False) -> RMSNorm:
    return RMSNorm(_config(dtype, sequence_parallel), 64, eps=1e-3, persist_layer_norm=False)


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_the_norm_tells_megatron_whether_its_gradient_is_partial(sequence_parallel):
    weight = _norm(torch.float32, sequence_parallel).weight
    assert weight.sequence_parallel is sequence_parallel


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.bfloat16, 2**-7)])
def test_rms_norm(dtype, rtol):
    norm = _norm(dtype)
    assert norm.weight.dtype == dtype
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * torch.randn(64, generator=generator))
    x = (0.05 * torch.randn(7, 64, generator=generator)).to(dtype)  # where eps matters
    out = norm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), _exact(x) * norm.weight.double(), rtol=rtol, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_an_output_is_normed_before_it_is_added(training):
    add = NormedResidual(_config(sequence_parallel=True), RMSNorm, tp_group=None)
    assert [name for name, _ in add.named_parameters()] == ["norm.weight"]
    assert add.norm.weight.sequence_parallel is True
    generator = torch.Generator().manual_seed(3)
    output, residual, weight = (
        torch.randn(n, generator=generator).double() for n in ((5, 1, 64), (5, 1, 64), (64,))
    )
    with torch.no_grad():
        add.norm.weight.copy_(weight)
        before = output.clone(), residual.clone()
        found = add(training, False)((output, None), residual, 0.0)
    torch.testing.assert_close(found, residual + _exact(output) * weight, rtol=1e-12, atol=1e-12)
    assert output.equal(before[0])
    assert residual.equal(before[1])
