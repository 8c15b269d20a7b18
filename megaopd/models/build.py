"""Builds a Megatron-Core `GPTModel` from a Hugging Face architecture."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaopd.batch import PackedBatch
from megaopd.config import ParallelConfig
from megaopd.models.arch import ModelArch, rope_inv_freq
from megaopd.models.attention import PackedAttention, RMSNorm
from megaopd.parallel.groups import ParallelGroups

try:
    import transformer_engine  # noqa: F401

    HAVE_TE = torch.cuda.is_available()
except ImportError:
    HAVE_TE = False

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class HiddenGPTModel(GPTModel):
    """A `GPTModel` that ends in its last hidden states, after the final norm; its head is apart.

    Logits are never formed here: the divergence multiplies hidden states and head chunk by chunk.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    @property
    def head(self) -> Tensor:
        """This rank's rows of the LM head, [padded_vocab_size / tp_size, H]; last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def forward(self, batch: PackedBatch) -> Tensor:
        """Runs this stage on a micro-batch.

        Returns:
            On the last stage the hidden states [T, H], the same on all tensor-parallel ranks; their
            incoming gradient is taken as already summed over those ranks. Elsewhere what the next
            stage receives.
        """
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        hidden = super().forward(
            batch.tokens_T[None], batch.positions_T[None], None, packed_seq_params=packed
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden.squeeze(1)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and head over all ranks: the next multiple of 128 * tp_size."""
    multiple = 128 * tp_size
    return math.ceil(vocab_size / multiple) * multiple


def transformer_config(arch: ModelArch, parallel: ParallelConfig, dtype: str) -> TransformerConfig:
    """Megatron's configuration of `arch` under `parallel`."""
    params_dtype = DTYPES[dtype]
    _, rope_attention_scaling = rope_inv_freq(arch)
    softmax_scale = None
    if rope_attention_scaling != 1.0:
        # YaRN scales cos and sin, so queries and keys; their product takes the square.
        softmax_scale = rope_attention_scaling**2 / math.sqrt(arch.head_dim)
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
        qk_layernorm=arch.qk_norm,
        add_qkv_bias=arch.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        softmax_scale=softmax_scale,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=dtype == "bf16",
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # Megatron asks it of variable lengths, MoE or not
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        gradient_accumulation_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _layer_spec(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """TransformerEngine's layer where it imports, else Megatron's local one with our attention."""
    if HAVE_TE:
        return specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = specs.get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
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


def build_model(
    arch: ModelArch,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    dtype: str,
    vocab_rows: int,
) -> HiddenGPTModel:
    """Builds this rank's part of the model; its weights are not initialised.

    Args:
        vocab_rows: rows of embedding and head over all tensor-parallel ranks, padding included; the
            same for student and teacher, so that their vocabulary partitions agree.
    """
    config = transformer_config(arch, parallel, dtype)
    model = HiddenGPTModel(
        config,
        _layer_spec(config),
        vocab_size=vocab_rows,
        max_sequence_length=arch.max_positions,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        pg_collection=groups.collection,
    )
    _mark_shards(model)
    inv_freq, _ = rope_inv_freq(arch)
    model.rotary_pos_emb.inv_freq = inv_freq.to(groups.device)
    return model.to(groups.device)
