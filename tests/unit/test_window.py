"""Sliding windows in Megatron's terms; two RoPEs in the place of one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megaopd.models.arch import WindowArch, read_arch, rope_inv_freq
from megaopd.models.attention import PackedAttention, window_of

# megaopd first: it lets megatron be imported where there is no CUDA.
from megaopd.models.window import (  # isort: split
    PairedRoPESelfAttention,
    RotaryPair,
    adapt_layer,
    set_rotary,
    window_config,
)

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import get_sliding_window_causal_mask

from tests.helpers.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def arch(tmp_path_factory):
    return read_arch(make_tiny_model(tmp_path_factory.mktemp("gemma3"), "Gemma3ForCausalLM"))


def _config(arch, **fields):
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=64,
        num_attention_heads=4,
        **window_config(arch),
        **fields,
    )


def test_megatron_and_transformers_mean_the_same_window(arch):
    config = _config(arch)
    assert [window_of(config, i + 1) for i in range(4)] == [4, None, 4, None]
    hidden = get_sliding_window_causal_mask(9, 9, config.window_size).cpu()
    seen = [row.logical_not().nonzero().flatten().tolist() for row in hidden]
    assert seen[2] == [0, 1, 2]
    assert seen[8] == [5, 6, 7, 8]  # the token itself and the 3 before it


def test_no_window_leaves_megatron_as_it_is(arch):
    plain = replace(arch, window=None)
    assert window_config(plain) == {}
    assert window_of(_config(plain), 1) is None
    layer = get_gpt_layer_local_spec()
    assert adapt_layer(layer, plain, _config(plain)).submodules.self_attention.module is (
        SelfAttention
    )


@pytest.mark.parametrize("own_rope", [True, False])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_layer_of_a_model_with_windows(arch, cp_size, own_rope):
    """Megatron's own attention stands for TransformerEngine's here: it is only left in place."""
    assert arch.window is not None
    if not own_rope:
        arch = replace(arch, window=WindowArch(arch.window.size, arch.window.layers))
    config = _config(arch, context_parallel_size=cp_size)
    attention = adapt_layer(get_gpt_layer_local_spec(), arch, config).submodules.self_attention
    assert attention.module is (PairedRoPESelfAttention if own_rope else SelfAttention)
    core = PackedAttention if cp_size > 1 else DotProductAttention
    assert attention.submodules.core_attention is core


def test_both_ropes_travel_in_one_tensor(arch):
    assert arch.window is not None
    full = RotaryEmbedding(16, 1.0, use_cpu_initialization=True, cp_group=None)
    model = SimpleNamespace(rotary_pos_emb=full)
    set_rotary(model, arch, torch.device("cpu"))
    pair = model.rotary_pos_emb
    assert isinstance(pair, RotaryPair)
    assert not list(pair.parameters())
    assert not pair.state_dict()
    both = pair(10, packed_seq=True, cp_group=None)
    assert both.shape == (2, 10, 1, 1, 16)
    for angles, rope in zip(both, (arch.rope, arch.window.rope), strict=True):
        inv_freq, _ = rope_inv_freq(arch, rope)
        wanted = torch.outer(torch.arange(10.0), inv_freq)
        torch.testing.assert_close(angles[:, 0, 0], torch.cat((wanted, wanted), -1))
    assert not both[0].equal(both[1])
