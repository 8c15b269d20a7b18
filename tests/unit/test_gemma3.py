"""What Gemma 3 has and other families do not, against transformers' own modules."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma3TextConfig
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding

from megaopd.errors import CheckpointError, ConfigError

# megaopd first: it lets megatron be imported where there is no CUDA.
from megaopd.models.build import ACTIVATIONS, _scale_output  # isort: split

from megatron.core.transformer.transformer_config import TransformerConfig

from megaopd.models import supported
from megaopd.models.arch import WindowArch, read_arch
from megaopd.models.families import hf_shapes
from megaopd.models.norms import RMSNorm
from tests.helpers.tiny_models import edit_config, tiny_config

GEMMA3_1B = {  # as google/gemma-3-1b-it has it, in transformers 4's spelling
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}


def _write(path: Any, **fields: Any) -> Any:
    config = Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"], **(tiny_config(Gemma3TextConfig) | fields)
    )
    config.save_pretrained(path)
    return path


def test_the_published_1b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3_1B))
    arch = read_arch(tmp_path)
    layers = tuple(i for i in range(26) if i % 6 != 5)
    local = {"rope_type": "default", "rope_theta": 10_000}
    assert arch.window == WindowArch(512, layers, local)
    assert [arch.window_size(i) for i in (0, 4, 5, 6)] == [512, 512, None, 512]
    assert arch.rope == {"rope_type": "default", "rope_theta": 1_000_000}
    assert arch.tied is True  # the class's default
    assert arch.embedding_scale == 1152**0.5
    assert arch.attention_scale == 1 / 16
    # 999,885,952 parameters, as published.
    shapes = [torch.Size(shape) for shape in hf_shapes(arch).values()]
    assert sum(shape.numel() for shape in shapes) == 999_885_952


def test_the_scaling_of_the_larger_models_is_of_full_attention_alone(tmp_path):
    config = GEMMA3_1B | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch = read_arch(tmp_path)
    assert arch.rope == {"rope_type": "linear", "rope_theta": 1_000_000, "factor": 8.0}
    assert arch.window is not None
    assert arch.window.rope == {"rope_type": "default", "rope_theta": 10_000}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: true is not"),
        ({"hidden_activation": "relu"}, 'hidden_activation: "relu" is not supported'),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
            'rope_type: "yarn" is not supported',
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2.0}}},
            'rope_type: "yarn" is not supported',
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8.0}},
            'rope_type: "linear" is not supported; name it "rope_type"',
        ),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path, fields, message):
    edit_config(_write(tmp_path), **fields)
    with pytest.raises(ConfigError) as caught:
        read_arch(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: is 0"),
        ({"sliding_window": None}, "sliding_window: is missing"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": -1}}},
            "rope_theta: is -1",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense(tmp_path, fields, message):
    edit_config(_write(tmp_path), **fields)
    with pytest.raises(CheckpointError) as caught:
        read_arch(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_norm(dtype):
    """To the bit, but where the order of a sum tips a rounding: 1 is added in fp32."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        layernorm_zero_centered_gamma=True,
        params_dtype=dtype,
    )
    norm, theirs = RMSNorm(config, 64, eps=1e-3), Gemma3RMSNorm(64, eps=1e-3).to(dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        norm.weight.copy_(0.01 * torch.randn(64, generator=generator))
        theirs.weight.copy_(norm.weight)
    x = torch.randn(500, 64, generator=generator).to(dtype)
    found, wanted = norm(x), theirs(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)
    if dtype == torch.bfloat16:
        assert (found != wanted).float().mean() < 1e-3
        rounded = F.rms_norm(x, (64,), 1 + norm.weight, 1e-3)
        assert (rounded != wanted).float().mean() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_embedding(dtype):
    """To the bit: sqrt(1152) = 33.94 is 34 in bf16."""
    theirs = Gemma3TextScaledWordEmbedding(32, 1152, 0, embed_scale=1152**0.5)
    torch.nn.init.normal_(theirs.weight, generator=torch.Generator().manual_seed(5))
    theirs = theirs.to(dtype)
    ids = torch.arange(1, 32)
    plain = F.embedding(ids, theirs.weight)
    found = _scale_output(1152**0.5, theirs, (), plain)
    assert found.equal(theirs(ids))
    assert found.dtype == dtype
    assert (found / plain).median().item() == pytest.approx(
        34.0 if dtype == torch.bfloat16 else 1152**0.5
    )


def test_activations_are_those_of_transformers():
    assert set(ACTIVATIONS) == set(supported.ACTIVATIONS)
    x = torch.linspace(-6, 6, 1001)
    for name, activation in ACTIVATIONS.items():
        assert activation(x).equal(ACT2FN[name](x)), name
