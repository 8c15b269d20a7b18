"""The model families, and the parameters of a model of each.

A family is one entry of `FAMILIES`: its configuration class in transformers, what its decoder layer
has beyond Llama's, and the pieces its layers are made of. A piece lists the `ParamMapping`s of one
part of a decoder layer and serves every family that has that part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megaopd.models.mapping import (
    QKV,
    GatedMLP,
    ParamMapping,
    Replicated,
    RowParallel,
    Shape,
    Vocab,
)

if TYPE_CHECKING:  # arch reads FAMILIES
    from megaopd.models.arch import ModelArch

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

# (arch, Megatron's prefix of the layer, Hugging Face's prefix of the layer) -> its parameters
Piece = Callable[["ModelArch", str, str], Iterator[ParamMapping]]


def layer_norms(norms: Mapping[str, str]) -> Piece:
    """The norms over hidden states: Megatron's module in a layer -> Hugging Face's."""

    def piece(arch: ModelArch, ours: str, theirs: str) -> Iterator[ParamMapping]:
        for mine, name in norms.items():
            yield ParamMapping(
                f"{ours}.{mine}.weight",
                (f"{theirs}.{name}.weight",),
                Replicated((arch.hidden_size,)),
            )

    return piece


def attention(arch: ModelArch, ours: str, theirs: str) -> Iterator[ParamMapping]:
    """Grouped-query attention; q/k norms and QKV biases where the family has them."""
    ours, theirs = f"{ours}.self_attention", f"{theirs}.self_attn"

    def qkv(kind: str) -> tuple[str, ...]:
        return tuple(f"{theirs}.{x}_proj.{kind}" for x in "qkv")

    sizes = (arch.num_heads, arch.num_kv_heads, arch.head_dim)
    yield ParamMapping(
        f"{ours}.linear_qkv.weight", qkv("weight"), QKV(*sizes, cols=arch.hidden_size)
    )
    if arch.qkv_bias:
        yield ParamMapping(f"{ours}.linear_qkv.bias", qkv("bias"), QKV(*sizes, cols=None))
    if arch.qk_norm:
        for x in "qk":
            yield ParamMapping(
                f"{ours}.{x}_layernorm.weight",
                (f"{theirs}.{x}_norm.weight",),
                Replicated((arch.head_dim,)),
            )
    yield ParamMapping(
        f"{ours}.linear_proj.weight",
        (f"{theirs}.o_proj.weight",),
        RowParallel(arch.hidden_size, arch.num_heads * arch.head_dim),
    )


def gated_mlp(*gate_and_up: str) -> Piece:
    """A gated MLP without biases; one name means that gate and up are one tensor."""

    def piece(arch: ModelArch, ours: str, theirs: str) -> Iterator[ParamMapping]:
        fused = len(gate_and_up) == 1
        yield ParamMapping(
            f"{ours}.mlp.linear_fc1.weight",
            tuple(f"{theirs}.mlp.{name}.weight" for name in gate_and_up),
            GatedMLP(arch.ffn_hidden_size, arch.hidden_size, fused),
        )
        yield ParamMapping(
            f"{ours}.mlp.linear_fc2.weight",
            (f"{theirs}.mlp.down_proj.weight",),
            RowParallel(arch.hidden_size, arch.ffn_hidden_size),
        )

    return piece


def experts(arch: ModelArch, ours: str, theirs: str) -> Iterator[ParamMapping]:
    """A mixture of gated MLPs without biases, and its router; no shared expert."""
    assert arch.moe is not None
    moe = arch.moe
    router = Replicated((moe.num_experts, arch.hidden_size))
    yield ParamMapping(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.gate.weight",), router)
    for e in range(moe.num_experts):
        mine, expert = f"{ours}.mlp.experts.{e}", f"{theirs}.mlp.experts.{e}"
        yield ParamMapping(
            f"{mine}.linear_fc1.weight",
            (f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight"),
            GatedMLP(moe.ffn_hidden_size, arch.hidden_size),
            expert=e,
        )
        yield ParamMapping(
            f"{mine}.linear_fc2.weight",
            (f"{expert}.down_proj.weight",),
            RowParallel(arch.hidden_size, moe.ffn_hidden_size),
            expert=e,
        )


PRE_NORMS = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
}
# Before and behind attention and MLP.
GLM4_NORMS = PRE_NORMS | {
    "self_attn_bda.norm": "post_self_attn_layernorm",
    "mlp_bda.norm": "post_mlp_layernorm",
}

GEMMA3_NORMS = {
    "input_layernorm": "input_layernorm",
    "self_attn_bda.norm": "post_attention_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "mlp_bda.norm": "post_feedforward_layernorm",
}

block_norms = layer_norms(PRE_NORMS)
split_mlp, fused_mlp = gated_mlp("gate_proj", "up_proj"), gated_mlp("gate_up_proj")


@dataclass(frozen=True)
class Family:
    """What sets a family apart.

    Attributes:
        config_class: name of the class in transformers that gives config.json's absent fields their
            defaults; looked up when a model of the family is read.
        qk_norm: queries and keys are normalised per head.
        qkv_bias: query, key and value projections (and only they) have biases; None is as
            config.json's `attention_bias` says.
        post_norms: the outputs of attention and MLP are normalised before they are added to the
            residual stream.
        partial_rope: only the first features of a head are rotated, a share that config.json's
            `partial_rotary_factor` gives.
        rope_interleaved: the features that are rotated together lie side by side, not half a head
            apart.
        zero_centered_norm: norms multiply by 1 + their weight.
        scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
        layer: the pieces of a decoder layer.
        moe_layer: the pieces of a decoder layer whose MLP is a mixture of experts; empty for a
            family that has none.
    """

    config_class: str
    qk_norm: bool = False
    qkv_bias: bool | None = False
    post_norms: bool = False
    zero_centered_norm: bool = False
    scaled_embedding: bool = False
    partial_rope: bool = False
    rope_interleaved: bool = False
    layer: tuple[Piece, ...] = (block_norms, attention, split_mlp)
    moe_layer: tuple[Piece, ...] = ()


# By the name in config.json's `architectures`.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("LlamaConfig"),
    "MistralForCausalLM": Family("MistralConfig"),
    "Qwen2ForCausalLM": Family("Qwen2Config", qkv_bias=True),
    "Qwen3ForCausalLM": Family("Qwen3Config", qk_norm=True),
    "Qwen3MoeForCausalLM": Family(
        "Qwen3MoeConfig", qk_norm=True, moe_layer=(block_norms, attention, experts)
    ),
    "GlmForCausalLM": Family(
        "GlmConfig",
        qkv_bias=None,
        partial_rope=True,
        rope_interleaved=True,
        layer=(block_norms, attention, fused_mlp),
    ),
    "Glm4ForCausalLM": Family(
        "Glm4Config",
        qkv_bias=None,
        post_norms=True,
        partial_rope=True,
        rope_interleaved=True,
        layer=(layer_norms(GLM4_NORMS), attention, fused_mlp),
    ),
    "Gemma3ForCausalLM": Family(
        "Gemma3TextConfig",
        qk_norm=True,
        post_norms=True,
        zero_centered_norm=True,
        scaled_embedding=True,
        layer=(layer_norms(GEMMA3_NORMS), attention, split_mlp),
    ),
}


def param_mappings(arch: ModelArch) -> dict[str, ParamMapping]:
    """Returns every parameter of the whole model by canonical name, in the order of the network.

    With tied embeddings there is no output layer: its weight is the embedding's.
    """
    vocab = Vocab(arch.vocab_size, arch.hidden_size)
    mappings = [ParamMapping(EMBEDDING, ("model.embed_tokens.weight",), vocab)]
    family = FAMILIES[arch.family]
    for i in range(arch.num_layers):
        for piece in family.moe_layer if arch.is_moe_layer(i) else family.layer:
            mappings.extend(piece(arch, f"decoder.layers.{i}", f"model.layers.{i}"))
    mappings.append(
        ParamMapping(
            "decoder.final_layernorm.weight",
            ("model.norm.weight",),
            Replicated((arch.hidden_size,)),
        )
    )
    if not arch.tied:
        mappings.append(ParamMapping(OUTPUT_LAYER, ("lm_head.weight",), vocab))
    return {mapping.megatron: mapping for mapping in mappings}


def hf_shapes(arch: ModelArch) -> dict[str, Shape]:
    """Returns the shape of every Hugging Face tensor of the model, by name."""
    shapes: dict[str, Shape] = {}
    for mapping in param_mappings(arch).values():
        shapes.update(zip(mapping.hf, mapping.layout.hf_shapes(), strict=True))
    return shapes
