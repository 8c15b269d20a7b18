"""Builds a Megatron-Core `GPTModel` from a Hugging Face architecture."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import LayerNormImpl, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaopd.batch import PackedBatch
from megaopd.config import ParallelConfig
from megaopd.models.arch import ModelArch, rope_inv_freq
from megaopd.models.attention import PackedAttention, PackedSequences
from megaopd.models.moe import layer_specs, mark_experts, moe_config
from megaopd.models.norms import NormedResidual, RMSNorm, keep_grad_mode
from megaopd.models.window import adapt_layer, set_rotary, window_config
from megaopd.parallel.groups import ParallelGroups
from megaopd.parallel.layout import Layout

try:
    import transformer_engine  # noqa: F401

    HAVE_TE = torch.cuda.is_available()
except ImportError:
    HAVE_TE = False

# The norm over hidden states; sharded and reduced as Megatron expects of one.
NORM = LayerNormImpl if HAVE_TE else RMSNorm


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# By the names of supported.ACTIVATIONS.
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": _gelu_tanh}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# train.recompute -> what Megatron computes again in the backward pass.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


class HiddenGPTModel(GPTModel):
    """A `GPTModel` that ends in its last hidden states, after the final norm; its head is apart.

    Logits are never formed here: the divergence multiplies hidden states and head chunk by chunk.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    @property
    def head(self) -> Tensor:
        """This rank's rows of the LM head, [padded_vocab_size / tp_size, H]; last chunk only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def forward(self, batch: PackedBatch) -> Tensor:
        """Runs this chunk on a micro-batch.

        Megatron derives the rotary positions from the starts of the sequences and the rank in the
        context-parallel group; they are the batch's `positions_T`.

        Returns:
            On the last stage the hidden states [T, H] of this rank's tokens, the same on all
            tensor-parallel ranks; their incoming gradient is taken as already summed over those
            ranks. Elsewhere what the next stage receives.
        """
        hidden = super().forward(
            batch.tokens_T[None],
            batch.positions_T[None],
            None,
            packed_seq_params=PackedSequences.of(batch, self.pg_collection.cp.size()),
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden.squeeze(1)


def _pipeline_layout(arch: ModelArch, layout: Layout) -> list[list[str]] | None:
    """What every (virtual) stage holds, in the order of the network."""
    if layout.parallel.pipeline == 1:
        return None
    stages = [["decoder"] * n for n in layout.layers_per_stage(arch.num_layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def transformer_config(
    arch: ModelArch,
    layout: Layout,
    dtype: str,
    *,
    recompute: str = "none",
    router_aux_loss_coef: float = 0.0,
) -> TransformerConfig:
    """Megatron's configuration of `arch` in `layout`."""
    parallel = layout.parallel
    interleaved = parallel.virtual_pipeline > 1
    params_dtype = DTYPES[dtype]
    _, rope_attention_scaling = rope_inv_freq(arch)
    softmax_scale = arch.attention_scale
    if rope_attention_scaling != 1.0:
        # YaRN scales cos and sin, so queries and keys; their product takes the square.
        softmax_scale = rope_attention_scaling**2 * (softmax_scale or 1 / math.sqrt(arch.head_dim))
    fused = HAVE_TE
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        layernorm_zero_centered_gamma=arch.zero_centered_norm,
        qk_layernorm=arch.qk_norm,
        add_qkv_bias=arch.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[arch.activation],
        softmax_scale=softmax_scale,
        rotary_interleaved=arch.rope_interleaved,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=dtype == "bf16",
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=_pipeline_layout(arch, layout),
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        # Stages tell each other the shape of what they send. Interleaved, two ranks would mix up
        # the shapes that go both ways at once; there all micro-batches have one length (schedule).
        variable_seq_lengths=not interleaved,
        # With two stages, batched sends would mix up the tensors likewise.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        moe_token_dispatcher_type="alltoall",  # Megatron asks it of variable lengths, MoE or not
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        bias_activation_fusion=fused and arch.activation == "silu",  # Megatron's list is shorter
        bias_dropout_fusion=fused,
        # Megatron does not tell the fused kernel for packed sequences that features interleave.
        apply_rope_fusion=fused and not arch.rope_interleaved,
        gradient_accumulation_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **RECOMPUTE[recompute],
        **window_config(arch),
        **moe_config(arch, parallel, router_aux_loss_coef, grouped=HAVE_TE),
    )


def _layer_spec(
    arch: ModelArch, config: TransformerConfig, groups: ParallelGroups, num_experts: int | None
) -> ModuleSpec:
    """A layer with a plain MLP (None) or that many experts: TransformerEngine's where it imports,
    else Megatron's local one with our attention."""
    mlp = {"num_experts": num_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    if HAVE_TE:
        layer = specs.get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm, **mlp
        )
    else:
        layer = specs.get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization="RMSNorm", **mlp
        )
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if num_experts is not None:
            # TransformerEngine has no linear layer to keep this norm in; checkpoints call it alike.
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    if arch.post_norms:
        given = {"config": config, "norm": NORM, "tp_group": groups.tp}
        add = ModuleSpec(NormedResidual, params=given)
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = add
    return adapt_layer(layer, arch, config)


def _block_spec(
    arch: ModelArch, config: TransformerConfig, groups: ParallelGroups, layers: range
) -> TransformerBlockSubmodules:
    """One chunk's layers, by their global indices, and the final norm."""
    return TransformerBlockSubmodules(
        layer_specs=layer_specs(config, layers, partial(_layer_spec, arch, config, groups)),
        layer_norm=NORM,
    )


def _mark_shards(model: HiddenGPTModel) -> None:
    """Marks the weights that tensor parallelism shards, and along which dim.

    Megatron marks them while it initialises them, which is left out here. Without the marks its
    gradient norm takes every shard but the first rank's for a replica and leaves it out.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def _require_grad(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
    """Lets the gradient through a recomputed layer whose input comes from a frozen embedding.

    Megatron computes a layer again in the backward pass of its output, which has one only where an
    input has a gradient; without, the layer's own weights would get none.
    """
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()
    return output


def _scale_output(scale: float, module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
    # Rounded to the embeddings' dtype first, as transformers does.
    return output * torch.tensor(scale, dtype=output.dtype).item()


def build_model(
    arch: ModelArch,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    dtype: str,
    vocab_rows: int,
    *,
    recompute: str = "none",
    router_aux_loss_coef: float = 0.0,
) -> list[HiddenGPTModel]:
    """Builds this rank's part of the model; its weights are not initialised.

    Args:
        parallel: the layout of `groups`.
        vocab_rows: rows of embedding and head over all tensor-parallel ranks, padding included.
        recompute: what the backward pass computes again, an entry of RECOMPUTE.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts.

    Returns:
        The chunks of this rank, one per virtual stage. The embedding is on the first chunk of the
        first stage, the head on the last chunk of the last stage.
    """
    config = transformer_config(
        arch,
        groups.layout,
        dtype,
        recompute=recompute,
        router_aux_loss_coef=router_aux_loss_coef,
    )
    with groups.active():
        return [
            _build_chunk(arch, config, groups, vocab_rows, chunk)
            for chunk in range(parallel.virtual_pipeline)
        ]


def _build_chunk(
    arch: ModelArch,
    config: TransformerConfig,
    groups: ParallelGroups,
    vocab_rows: int,
    chunk: int,
) -> HiddenGPTModel:
    num_stages, num_chunks = groups.pp.size(), groups.parallel.virtual_pipeline
    stage = chunk * num_stages + groups.pp.rank()
    layers = groups.layout.layers_per_stage(arch.num_layers)
    first = sum(layers[:stage])
    model = HiddenGPTModel(
        config,
        _block_spec(arch, config, groups, range(first, first + layers[stage])),
        vocab_size=vocab_rows,
        max_sequence_length=arch.max_positions,
        pre_process=stage == 0,
        post_process=stage == num_stages * num_chunks - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        pg_collection=groups.collection,
        vp_stage=chunk if num_chunks > 1 else None,
    )
    _mark_shards(model)
    mark_experts(model)
    keep_grad_mode(model.decoder.layers)
    if arch.embedding_scale != 1.0 and model.pre_process:
        model.embedding.register_forward_hook(partial(_scale_output, arch.embedding_scale))
    if config.recompute_granularity == "full" and model.pre_process:
        model.embedding.register_forward_hook(_require_grad)
    set_rotary(model, arch, groups.device)
    return model.to(groups.device)
