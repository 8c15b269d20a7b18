"""What a config.json may say that this package computes as transformers does, and what it may not.

`unsupported` is read before anything else is made of a configuration. The other functions find what
classes of transformers spell differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from megaopd.models.families import Family

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # what gates the MLP, by transformers' name
FULL, SLIDING = "full_attention", "sliding_attention"

_SHARED_EXPERTS = ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts")

# Changes the logits or the mask wherever it has a value.
_WITH_A_VALUE = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
)


def activation_of(config: PreTrainedConfig) -> tuple[str, str]:
    """(the field's name, its value)."""
    name = "hidden_activation" if hasattr(type(config), "hidden_activation") else "hidden_act"
    return name, getattr(config, name)


def ropes_of(config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The RoPE of the model, or of its full-attention layers, and that of its window layers where
    they have their own."""
    both = config.rope_parameters
    if isinstance(both.get(FULL), dict):
        return both[FULL], both[SLIDING]
    return both, None


def layer_types_of(config: PreTrainedConfig) -> list[str] | None:
    """The attention of every layer; None where the class has one for all, and ignores the field."""
    return config.layer_types if hasattr(type(config), "layer_types") else None


def unsupported(
    raw: dict[str, Any], config: PreTrainedConfig, family: Family
) -> Iterator[tuple[str, Any, str]]:
    """Yields (field, value, what to do) of every feature that would silently be computed wrong."""
    remedy = "use a model without it"
    where, activation = activation_of(config)
    if activation not in ACTIVATIONS:
        yield where, activation, f"use a model with one of {', '.join(ACTIVATIONS)}"
    for name in _WITH_A_VALUE:
        value = getattr(config, name, None)
        if value is not None and value is not False:
            yield name, value, remedy
    if raw.get("attention_bias") and family.qkv_bias is False:
        yield "attention_bias", raw["attention_bias"], remedy
    if raw.get("mlp_bias"):
        yield "mlp_bias", raw["mlp_bias"], remedy
    if raw.get("quantization_config") is not None:
        yield "quantization_config", raw["quantization_config"], "dequantise the weights first"
    for name in _SHARED_EXPERTS:
        if raw.get(name):
            yield name, raw[name], "use a model without shared experts"
    if getattr(config, "norm_topk_prob", False) and config.num_experts_per_tok == 1:
        # Every weight is 1: the router has no gradient, and Megatron-Core no such routing.
        yield "norm_topk_prob", True, "use a model that sends a token to more than one expert"
    known = layer_types_of(config)
    for layer_type in known or raw.get("layer_types") or ():
        # A class without the field ignores it; what the file's author meant is not computed.
        if layer_type not in ((FULL,) if known is None else (FULL, SLIDING)):
            yield "layer_types", layer_type, "use a model with full or sliding-window attention"
    if any(isinstance(value, dict) for value in ropes_of(config)[0].values()):
        yield "rope_parameters", config.rope_parameters, "use a model with one RoPE for all layers"
        return
    for rope in filter(None, ropes_of(config)):
        if rope["rope_type"] not in ROPE_TYPES:
            yield "rope_type", rope["rope_type"], f"use one of {', '.join(ROPE_TYPES)}"
        elif rope["rope_type"] == "yarn" and ropes_of(config)[1] is not None:
            # Its factor on cos and sin is computed as a part of the attention's scale, of which
            # Megatron has one for all layers.
            yield "rope_type", "yarn", "use a model with another RoPE, or with one for all layers"
        elif rope["rope_type"] == "yarn" and family.partial_rope:
            # Its factor on cos and sin would leave out the features that are not rotated.
            yield "rope_type", "yarn", "use a model that does not rotate a part of each head alone"
        if rope.get("type", rope["rope_type"]) != rope["rope_type"]:
            # transformers 4's name, which the class of a model with two RoPEs ignores.
            yield "rope_type", rope["type"], 'name it "rope_type" if it is meant'
        factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0)
        if not family.partial_rope and factor != 1.0:
            yield "partial_rotary_factor", factor, remedy
