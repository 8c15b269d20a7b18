"""config.json -> ModelArch, in both spellings; what is refused; RoPE against transformers' own."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from megaopd.errors import CheckpointError, ConfigError
from megaopd.models.arch import ModelArch, MoEArch, WindowArch, read_arch, rope_inv_freq
from megaopd.models.families import FAMILIES
from megaopd.models.supported import ROPE_TYPES
from tests.helpers.tiny_models import (
    ROPE_VARIANTS,
    TP3_CONFIG,
    WINDOW_ROPE,
    edit_config,
    tiny_config,
)

MOE = "Qwen3MoeForCausalLM"
GEMMA3 = "Gemma3ForCausalLM"
GLM = {"qkv_bias": True, "rope_interleaved": True}
# What sets a family's tiny model apart from Llama's.
DIFFERENCES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
    MOE: {"qk_norm": True, "moe": MoEArch(4, 2, 48, True, (0, 1, 2, 3))},
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": GLM | {"post_norms": True},
    GEMMA3: {
        "qk_norm": True,
        "post_norms": True,
        "window": WindowArch(4, (0, 2), WINDOW_ROPE),
        "activation": "gelu_pytorch_tanh",
        "zero_centered_norm": True,
        "embedding_scale": 72**0.5,
        "attention_scale": 24**-0.5,
    },
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


def write_config(path, family, rope="default", **overrides):
    """Writes config.json as transformers 5 does, without a model."""
    config_class = getattr(transformers, family).config_class
    fields = tiny_config(config_class, rope) | {"pad_token_id": 0} | overrides
    config_class(architectures=[family], **fields).save_pretrained(path)
    return path


def to_version_4(path):
    """Rewrites config.json the way transformers 4 spells RoPE, layers and dtype."""
    rope = json.loads((path / "config.json").read_text())["rope_parameters"]
    own, spelled = {}, "type"
    if "sliding_attention" in rope:
        own, spelled = {"rope_local_base_freq": WINDOW_ROPE["rope_theta"]}, "rope_type"
        rope = rope["full_attention"]
    theta = rope.pop("rope_theta")
    own |= {k: rope.pop(k) for k in ("partial_rotary_factor",) if k in rope}
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {spelled: rope.pop("rope_type"), **rope}
    edit_config(
        path,
        remove=("rope_parameters", "dtype", "layer_types"),
        rope_theta=theta,
        rope_scaling=scaling,
        torch_dtype="float32",
        **own,
    )


def as_gemma3(fields):
    """Fields of a config.json, with an activation or a RoPE where Gemma 3 has them."""
    fields = dict(fields)
    if isinstance(fields.get("rope_parameters"), dict):
        fields["rope_parameters"] = {"full_attention": fields["rope_parameters"]}
    if "hidden_act" in fields:
        fields["hidden_activation"] = fields.pop("hidden_act")
    return fields


def rope_of(family, variant):
    """`ModelArch.rope` of a family; GLM rotates half a head."""
    partial = {"partial_rotary_factor": 0.5} if FAMILIES[family].partial_rope else {}
    return ROPE_VARIANTS[variant] | partial


def skip_refused(family, rope):
    if FAMILIES[family].partial_rope and rope == "yarn":
        pytest.skip("refused: test_yarn_of_a_part_of_a_head")
    if family == GEMMA3 and rope == "yarn":
        pytest.skip("refused: test_gemma3.py")


def test_every_field(tmp_path, family):
    write_config(tmp_path, family, **TP3_CONFIG, tie_word_embeddings=True, rms_norm_eps=3e-5)
    llama = ModelArch(
        family=family,
        num_layers=4,
        hidden_size=72,
        num_heads=9,
        num_kv_heads=3,
        head_dim=8,
        ffn_hidden_size=96,
        vocab_size=509,
        max_positions=256,
        norm_eps=3e-5,
        tied=True,
        qk_norm=False,
        qkv_bias=False,
        rope=rope_of(family, "default"),
    )
    assert read_arch(tmp_path) == replace(llama, **DIFFERENCES[family])


@pytest.mark.parametrize("rope", sorted(ROPE_VARIANTS))
def test_version_4_reads_like_version_5(tmp_path, family, rope):
    skip_refused(family, rope)
    write_config(tmp_path, family, rope)
    version_5 = read_arch(tmp_path)
    to_version_4(tmp_path)
    assert read_arch(tmp_path) == version_5
    assert version_5.rope == rope_of(family, rope)


def test_absent_fields_have_the_family_defaults(tmp_path):
    write_config(tmp_path, "LlamaForCausalLM")
    edit_config(
        tmp_path,
        remove=("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_parameters"),
        hidden_size=128,
    )
    arch = read_arch(tmp_path)
    assert (arch.num_kv_heads, arch.head_dim, arch.tied) == (4, 32, False)
    assert arch.rope == {"rope_type": "default", "rope_theta": 10_000.0}


def test_rope_variants_cover_the_supported_types():
    assert {variant["rope_type"] for variant in ROPE_VARIANTS.values()} == set(ROPE_TYPES)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("rope", sorted(ROPE_VARIANTS))
def test_rope_is_the_rotary_embedding_of_transformers(tmp_path, family, rope, version):
    skip_refused(family, rope)
    write_config(tmp_path, family, rope)
    if version == 4:
        to_version_4(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 1
    theirs = AutoModelForCausalLM.from_config(config).model.rotary_emb
    arch = read_arch(tmp_path)
    inv_freq, scaling = rope_inv_freq(arch)
    assert inv_freq.dtype == torch.float32
    assert arch.rotary_dim == (8 if FAMILIES[family].partial_rope else 16)
    assert inv_freq.shape == (arch.rotary_dim // 2,)
    kind = "full_attention_" if arch.window and arch.window.rope else ""
    torch.testing.assert_close(inv_freq, getattr(theirs, f"{kind}inv_freq"), rtol=0, atol=0)
    assert scaling == getattr(theirs, f"{kind}attention_scaling")
    if kind:
        window, scaling_of_window = rope_inv_freq(arch, arch.window.rope)
        assert window.equal(theirs.sliding_attention_inv_freq)
        assert not window.equal(inv_freq)
        assert scaling_of_window == 1.0
    if rope == "default":
        assert scaling == 1.0
        assert inv_freq[0] == 1.0
    else:
        default, _ = rope_inv_freq(read_arch(write_config(tmp_path / "default", family)))
        assert not torch.equal(inv_freq, default)
    assert (scaling != 1.0) == (rope == "yarn")


@pytest.mark.parametrize(
    ("fields", "where", "value"),
    [
        ({"hidden_act": "gelu"}, "hidden_act", '"gelu"'),
        ({"attention_bias": True}, "attention_bias", "true"),
        ({"mlp_bias": True}, "mlp_bias", "true"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "fp8"),
        ({"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer_types", "chunked"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type", "dynamic"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "factor": 2.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                }
            },
            "rope_type",
            "longrope",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "zork"}}, "rope_type", "zork"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_would_be_computed_wrong_is_refused(tmp_path, family, fields, where, value):
    has_biases = FAMILIES[family].qkv_bias is not False
    if (where == "attention_bias" and has_biases) or (
        where == "partial_rotary_factor" and FAMILIES[family].partial_rope
    ):
        pytest.skip(f"{family} has it")
    if family == GEMMA3:
        fields = as_gemma3(fields)
        where = "hidden_activation" if where == "hidden_act" else where
    write_config(tmp_path, family)
    edit_config(tmp_path, **fields)
    with pytest.raises(ConfigError) as caught:
        read_arch(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/config.json: {where}: ")
    assert value in message
    assert "\n" not in message
    assert len(message) < len(str(tmp_path)) + 250


@pytest.mark.parametrize("family", ["GlmForCausalLM", "Glm4ForCausalLM"])
def test_biases_as_the_file_says(tmp_path, family):
    """GLM-4's 9B models have them, its 32B ones do not; the class's default is with."""
    write_config(tmp_path, family)
    edit_config(tmp_path, remove=("attention_bias",))
    assert read_arch(tmp_path).qkv_bias is True
    edit_config(tmp_path, attention_bias=False)
    assert read_arch(tmp_path).qkv_bias is False
    assert read_arch(write_config(tmp_path, "Qwen2ForCausalLM")).qkv_bias is True


def test_a_part_of_a_head_is_rotated(tmp_path):
    write_config(tmp_path, "Glm4ForCausalLM")
    edit_config(tmp_path, rope_parameters=ROPE_VARIANTS["default"] | {"partial_rotary_factor": 1.0})
    assert read_arch(tmp_path).rotary_dim == 16
    for factor, rotary_dim in ((0.2, 3), (0.0, 0), (1.5, 24)):
        rope = ROPE_VARIANTS["default"] | {"partial_rotary_factor": factor}
        edit_config(tmp_path, rope_parameters=rope)
        with pytest.raises(CheckpointError, match=f"rotates {rotary_dim} of 16 features"):
            read_arch(tmp_path)


@pytest.mark.parametrize("family", ["GlmForCausalLM", "Glm4ForCausalLM"])
def test_yarn_of_a_part_of_a_head(tmp_path, family):
    write_config(tmp_path, family, rope_parameters=dict(ROPE_VARIANTS["yarn"]))
    with pytest.raises(ConfigError, match='rope_type: "yarn" is not supported'):
        read_arch(tmp_path)


def test_the_window_of_mistral(tmp_path):
    """Version 0.1 has one, and the class where the file does not say; later versions have none."""
    write_config(tmp_path, "MistralForCausalLM")
    assert read_arch(tmp_path).window is None
    edit_config(tmp_path, sliding_window=8)
    assert read_arch(tmp_path).window == WindowArch(8, (0, 1, 2, 3))
    edit_config(tmp_path, remove=("sliding_window",))
    assert read_arch(tmp_path).window == WindowArch(4096, (0, 1, 2, 3))


def test_sliding_window_of_the_later_layers(tmp_path):
    write_config(tmp_path, "Qwen3ForCausalLM")
    edit_config(
        tmp_path,
        remove=("layer_types",),
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
    )
    arch = read_arch(tmp_path)
    assert arch.window == WindowArch(8, (2, 3))
    assert [arch.window_size(layer) for layer in range(4)] == [None, None, 8, 8]
    # The window begins after the last layer: no layer slides.
    edit_config(tmp_path, max_window_layers=4)
    arch = read_arch(tmp_path)
    assert arch.window is None
    assert arch.window_size(3) is None
    # Qwen3's own files carry a window that is switched off.
    edit_config(tmp_path, max_window_layers=2, use_sliding_window=False)
    assert read_arch(tmp_path).window is None


def test_sliding_window_by_layer(tmp_path):
    """As transformers 5 writes it."""
    layer_types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    fields = {"layer_types": layer_types, "use_sliding_window": True, "sliding_window": 8}
    write_config(tmp_path, "Qwen3ForCausalLM", **fields)
    assert read_arch(tmp_path).window == WindowArch(8, (0, 3))
    edit_config(tmp_path, layer_types=["full_attention"] * 4)
    assert read_arch(tmp_path).window is None
    edit_config(tmp_path, layer_types=layer_types, sliding_window=0)
    with pytest.raises(CheckpointError, match="sliding_window: is 0; give a positive number"):
        read_arch(tmp_path)
    edit_config(tmp_path, use_sliding_window=False)
    with pytest.raises(CheckpointError, match="sliding_window: is missing"):
        read_arch(tmp_path)
    edit_config(tmp_path, layer_types=layer_types[:3])
    with pytest.raises(CheckpointError, match="number of `layer_types`"):
        read_arch(tmp_path)


def test_sliding_window_of_all_layers(tmp_path):
    """Where a class knows no types of layers, as transformers computes it."""
    write_config(tmp_path, MOE)
    edit_config(tmp_path, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert read_arch(tmp_path).window == WindowArch(8, (0, 1, 2, 3))
    # With its own null, or without the field, which has another default.
    edit_config(tmp_path, sliding_window=None)
    assert read_arch(tmp_path).window is None
    edit_config(tmp_path, remove=("sliding_window",))
    assert read_arch(tmp_path).window == WindowArch(4096, (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, (0, 1, 2, 3)),
        ({"mlp_only_layers": [0, 2]}, (1, 3)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
        ({"decoder_sparse_step": 5}, None),
    ],
    ids=str,
)
def test_layers_that_are_mixtures(tmp_path, fields, layers):
    """The layers in which transformers builds experts."""
    write_config(tmp_path, MOE, **fields)
    moe = read_arch(tmp_path).moe
    assert (moe and moe.layers) == layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    assert theirs == (layers or ())


def test_versions_4_and_5_name_the_experts_differently(tmp_path):
    """transformers 5 writes num_local_experts; version 4, and so Qwen's own files, num_experts."""
    write_config(tmp_path, MOE, num_experts=6, norm_topk_prob=False)
    version_5 = read_arch(tmp_path)
    edit_config(tmp_path, remove=("num_local_experts",), num_experts=6)
    assert read_arch(tmp_path) == version_5
    assert version_5.moe == MoEArch(6, 2, 48, False, (0, 1, 2, 3))


def test_head_dim_of_a_mixture_without_one(tmp_path):
    write_config(tmp_path, MOE)
    edit_config(tmp_path, remove=("head_dim",), hidden_size=128)
    assert read_arch(tmp_path).head_dim == 32


@pytest.mark.parametrize(
    ("fields", "error", "found"),
    [
        ({"shared_expert_intermediate_size": 64}, ConfigError, "shared experts"),
        ({"norm_topk_prob": True, "num_experts_per_tok": 1}, ConfigError, "norm_topk_prob"),
        ({"layer_types": ["sliding_attention"] * 4}, ConfigError, "layer_types"),
        ({"num_experts_per_tok": 5}, CheckpointError, "5 of 4 experts"),
        ({"moe_intermediate_size": 0}, CheckpointError, "moe_intermediate_size: is 0"),
        ({"num_local_experts": 0}, CheckpointError, "num_experts: is 0"),
        ({"decoder_sparse_step": 0}, CheckpointError, "decoder_sparse_step: is 0"),
        ({"mlp_only_layers": "all"}, CheckpointError, "mlp_only_layers"),
    ],
    ids=str,
)
def test_mixtures_that_are_refused(tmp_path, fields, error, found):
    write_config(tmp_path, MOE)
    edit_config(tmp_path, **fields)
    with pytest.raises(error) as caught:
        read_arch(tmp_path)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_architecture_lists_the_known_ones(tmp_path):
    write_config(tmp_path, "LlamaForCausalLM")
    edit_config(tmp_path, architectures=["GPT2LMHeadModel"])
    with pytest.raises(ConfigError) as caught:
        read_arch(tmp_path)
    assert "GPT2LMHeadModel is not supported" in str(caught.value)
    for family in FAMILIES:
        assert family in str(caught.value)


@pytest.mark.parametrize(
    "field",
    [
        "architectures",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
def test_missing_field(tmp_path, family, field):
    write_config(tmp_path, family)
    edit_config(tmp_path, remove=(field,))
    with pytest.raises(CheckpointError, match=f"config.json: {field}: is missing"):
        read_arch(tmp_path)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"hidden_size": "abc"}, 'hidden_size: is "abc"'),
        ({"num_hidden_layers": 0}, "num_hidden_layers: is 0"),
        ({"vocab_size": 2.5}, "vocab_size: is 2.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide 4"),
        ({"head_dim": -1}, "head_dim"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta: is 0"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": "x"}, 'rope_parameters: is "x"'),
        ({"rope_scaling": 2.0}, "rope_scaling: is 2.0"),
    ],
    ids=str,
)
def test_senseless_field(tmp_path, family, fields, found):
    write_config(tmp_path, family)
    edit_config(tmp_path, **(as_gemma3(fields) if family == GEMMA3 else fields))
    with pytest.raises(CheckpointError) as caught:
        read_arch(tmp_path)
    assert found in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 4


def test_unreadable_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        read_arch(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        read_arch(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"hidden_size": 64,')
    with pytest.raises(CheckpointError, match=r"cannot be read as JSON \(.*line 1"):
        read_arch(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        read_arch(tmp_path)
