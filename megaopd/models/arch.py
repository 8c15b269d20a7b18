"""What a model is, read from a Hugging Face config.json.

`read_arch` refuses what the rest of the package would compute differently from transformers, so
that a `ModelArch` in hand means a network that Megatron reproduces.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megaopd.errors import CheckpointError, ConfigError
from megaopd.models.families import FAMILIES, Family
from megaopd.models.supported import (
    SLIDING,
    activation_of,
    layer_types_of,
    ropes_of,
    unsupported,
)

# ModelArch's name -> config.json's; a model without them is not described at all.
_REQUIRED_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}


# MoEArch's name -> config.json's; transformers 5 writes num_local_experts for num_experts.
_MOE_SIZES = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "ffn_hidden_size": "moe_intermediate_size",
}


@dataclass(frozen=True)
class MoEArch:
    """The mixture of experts that some layers have in place of an MLP.

    Attributes:
        num_experts: experts of a layer.
        top_k: experts that a token is sent to.
        ffn_hidden_size: features between the projections of one expert.
        normalize_top_k: the weights of a token's experts are divided by their sum.
        layers: indices of the layers that are mixtures; the others have a plain MLP.
    """

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    normalize_top_k: bool
    layers: tuple[int, ...]


@dataclass(frozen=True)
class WindowArch:
    """The sliding window that some layers attend through.

    Attributes:
        size: a token attends to itself and to the size - 1 tokens before it.
        layers: indices of the layers that have the window; the others attend to everything before.
        rope: the RoPE of these layers, as `ModelArch.rope`; None is that of the other layers.
    """

    size: int
    layers: tuple[int, ...]
    rope: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class ModelArch:
    """A decoder-only transformer.

    Attributes:
        family: name of the Hugging Face architecture, a key of `FAMILIES`.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: features of one head; num_heads * head_dim need not be hidden_size.
        ffn_hidden_size: features between the MLP's projections.
        vocab_size: rows of embedding and head, without the padding of tensor parallelism.
        max_positions: the longest context.
        norm_eps: added to the mean square in RMSNorm.
        tied: the LM head is the embedding.
        qk_norm: queries and keys are normalised per head.
        qkv_bias: query, key and value projections have biases.
        rope: `rope_type` (of `supported.ROPE_TYPES`), `rope_theta`, the type's own parameters and,
            where a head is rotated in part, `partial_rotary_factor`, named as in transformers'
            `rope_parameters`.
        rope_interleaved: features 2i and 2i + 1 are rotated together; otherwise i and
            i + rotary_dim / 2.
        post_norms: the outputs of attention and MLP are normalised before they are added to the
            residual stream.
        moe: the mixture of experts; None is a model without one.
        window: the sliding window; None is full attention in every layer.
        activation: what gates the MLP, one of `supported.ACTIVATIONS`.
        zero_centered_norm: a norm multiplies by 1 + its weight.
        embedding_scale: what embeddings are multiplied by; a tied head is not.
        attention_scale: what the products of queries and keys are multiplied by; None is
            1 / sqrt(head_dim).
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied: bool
    qk_norm: bool
    qkv_bias: bool
    rope: Mapping[str, Any] = field(hash=False)
    rope_interleaved: bool = False
    post_norms: bool = False
    moe: MoEArch | None = None
    window: WindowArch | None = None
    activation: str = "silu"
    zero_centered_norm: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated, the first ones."""
        return int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers

    def window_size(self, layer: int) -> int | None:
        """Tokens that one attends to in a layer, itself included; None is all before it."""
        windowed = self.window is not None and layer in self.window.layers
        return self.window.size if self.window is not None and windowed else None


def read_arch(path: str | Path) -> ModelArch:
    """Reads `path`/config.json, as transformers 4 or 5 writes it.

    Raises:
        CheckpointError: the file is missing, is not JSON, or a field is missing or makes no sense.
        ConfigError: the architecture is not in `FAMILIES`, or has a feature that is not supported.
    """
    file = Path(path) / "config.json"
    raw = _read_json_object(file)
    architecture = _architecture(file, raw)
    family = FAMILIES[architecture]
    sizes = {ours: _size(file, raw, theirs) for ours, theirs in _REQUIRED_SIZES.items()}
    norm_eps = _number(file, raw, "rms_norm_eps")
    config = _parse(file, raw, family)
    for where, value, remedy in unsupported(raw, config, family):
        raise ConfigError(f"{file}: {where}", f"{_shown(value)} is not supported", remedy)

    rope, window_rope = _read_ropes(file, config)
    num_kv_heads = _parsed_size(file, config, "num_key_value_heads")
    head_dim = sizes["hidden_size"] // sizes["num_heads"]
    if getattr(config, "head_dim", None) is not None:  # Qwen3-MoE's class has no default for it
        head_dim = _parsed_size(file, config, "head_dim")
    if sizes["num_heads"] % num_kv_heads:
        raise CheckpointError(
            f"{file}: num_key_value_heads",
            f"{num_kv_heads} does not divide {sizes['num_heads']} attention heads",
            "correct the file",
        )
    arch = ModelArch(
        family=architecture,
        **sizes,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=norm_eps,
        tied=bool(config.tie_word_embeddings),
        qk_norm=family.qk_norm,
        qkv_bias=bool(config.attention_bias) if family.qkv_bias is None else family.qkv_bias,
        rope=rope,
        rope_interleaved=family.rope_interleaved,
        post_norms=family.post_norms,
        moe=_read_moe(file, config) if family.moe_layer else None,
        window=_read_window(file, config, window_rope),
        activation=activation_of(config)[1],
        zero_centered_norm=family.zero_centered_norm,
        embedding_scale=sizes["hidden_size"] ** 0.5 if family.scaled_embedding else 1.0,
        attention_scale=_attention_scale(file, config),
    )
    if arch.rotary_dim % 2 or not 0 < arch.rotary_dim <= head_dim:
        raise CheckpointError(
            f"{file}: partial_rotary_factor",
            f"rotates {arch.rotary_dim} of {head_dim} features of a head",
            "give a factor that makes it an even number of them",
        )
    return arch


def rope_inv_freq(arch: ModelArch, rope: Mapping[str, Any] | None = None) -> tuple[Tensor, float]:
    """Returns the inverse frequencies, fp32 [rotary_dim / 2], and the factor on cos and sin.

    Bit-equal to those of transformers' rotary embedding of the same configuration.

    Args:
        rope: that of the window's layers, where they have their own; None is `arch.rope`.
    """
    rope = arch.rope if rope is None else rope
    if rope["rope_type"] == "default":
        dim = arch.rotary_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return 1.0 / (rope["rope_theta"] ** exponents), 1.0
    config = PreTrainedConfig(
        head_dim=arch.head_dim,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        max_position_embeddings=arch.max_positions,
        rope_parameters=dict(rope),
    )
    inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    return inv_freq, float(attention_scaling)


def _shown(value: Any) -> str:
    """`value` as JSON, short enough for an error's one line."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Directories that tools of this repository make, by what their configurations call them.
_MADE_BY = {".cache/debug": "tools/prepare_debug.py", ".cache/demo": "tools/prepare_demo.py"}


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        made_by = [tool for directory, tool in _MADE_BY.items() if file.is_relative_to(directory)]
        remedy = f"run python {made_by[0]}" if made_by else ""
        raise CheckpointError(
            str(file), "no such file", remedy or "give a directory that save_pretrained wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(file), f"cannot be read as JSON ({error})", "copy the file again"
        ) from None
    if not isinstance(raw, dict):
        raise CheckpointError(str(file), "is not a JSON object", "copy the file again")
    return raw


def _architecture(file: Path, raw: dict[str, Any]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(
            f"{file}: architectures",
            "is missing" if names is None else f"is {_shown(names)}",
            'name the model\'s one class there, such as ["LlamaForCausalLM"]',
        )
    if names[0] not in FAMILIES:
        raise ConfigError(
            f"{file}: architectures",
            f"{names[0]} is not supported",
            f"use one of {', '.join(sorted(FAMILIES))}",
        )
    return names[0]


def _number(file: Path, fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name)
    if value is None:
        raise CheckpointError(
            f"{file}: {name}", "is missing", "add it, as the model's authors have it"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"{file}: {name}", f"is {_shown(value)}", "give a positive number")
    return value


def _size(file: Path, fields: Mapping[str, Any], name: str) -> int:
    value = _number(file, fields, name)
    if not isinstance(value, int):
        raise CheckpointError(f"{file}: {name}", f"is {value}", "give a positive integer")
    return value


def _parsed_size(file: Path, config: PreTrainedConfig, name: str) -> int:
    """A size that may be absent from the file; the class knows its default."""
    return _size(file, {name: getattr(config, name)}, name)


def _read_moe(file: Path, config: PreTrainedConfig) -> MoEArch | None:
    sizes = {ours: _parsed_size(file, config, theirs) for ours, theirs in _MOE_SIZES.items()}
    if sizes["top_k"] > sizes["num_experts"]:
        raise CheckpointError(
            f"{file}: num_experts_per_tok",
            f"{sizes['top_k']} of {sizes['num_experts']} experts",
            "correct the file",
        )
    step = _parsed_size(file, config, "decoder_sparse_step")
    plain = set(config.mlp_only_layers)
    layers = tuple(
        i for i in range(config.num_hidden_layers) if i not in plain and (i + 1) % step == 0
    )
    if not layers:
        return None
    return MoEArch(**sizes, normalize_top_k=bool(config.norm_topk_prob), layers=layers)


def _read_ropes(
    file: Path, config: PreTrainedConfig
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    ropes = [dict(rope) if rope is not None else None for rope in ropes_of(config)]
    for rope in ropes:
        if rope is not None:
            rope.pop("type", None)  # transformers 4's name of rope_type
            _number(file, rope, "rope_theta")
    assert ropes[0] is not None
    return ropes[0], ropes[1]


def _read_window(
    file: Path, config: PreTrainedConfig, rope: dict[str, Any] | None
) -> WindowArch | None:
    layer_types = layer_types_of(config)
    if layer_types is not None:
        layers = tuple(i for i, layer_type in enumerate(layer_types) if layer_type == SLIDING)
    elif getattr(config, "sliding_window", None) is not None:
        layers = tuple(range(config.num_hidden_layers))
    else:
        layers = ()
    if not layers:
        return None
    return WindowArch(_parsed_size(file, config, "sliding_window"), layers, rope)


def _attention_scale(file: Path, config: PreTrainedConfig) -> float | None:
    name = "query_pre_attn_scalar"
    if not hasattr(type(config), name):
        return None
    return float(_number(file, {name: getattr(config, name)}, name) ** -0.5)


def _parse(file: Path, raw: dict[str, Any], family: Family) -> PreTrainedConfig:
    """Lets transformers fill in defaults and bring both spellings of RoPE to one."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(name), dict | None):
            raise CheckpointError(f"{file}: {name}", f"is {_shown(raw[name])}", "give an object")
    try:
        return getattr(transformers, family.config_class).from_dict(copy.deepcopy(raw))
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).strip("'\"").split())
        raise CheckpointError(str(file), reason, "correct the field") from None
