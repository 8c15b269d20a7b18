"""Causal attention over packed sequences, and the norm, for Megatron's local spec.

Used where TransformerEngine is not there. Megatron's own `DotProductAttention` knows no packing,
and its `WrappedTorchNorm` no sequence parallelism. Nothing here builds a [T, T] mask: each
sequence of the pack is attended to by itself, by torch's varlen kernel on a GPU and by one SDPA
call a sequence elsewhere.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedAttention(MegatronModule):
    """`core_attention` over THD tensors: [T, heads, head_dim], queries grouped over KV heads."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """Returns [T, heads * head_dim].

        Args:
            query: [T, heads, head_dim].
            key: [T, kv_heads, head_dim].
            value: [T, kv_heads, head_dim].
            packed_seq_params: starts of the sequences; every sequence is causal.

        Raises:
            ValueError: the input is not packed.
        """
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            raise ValueError("PackedAttention takes packed sequences (qkv_format='thd') only")
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            out = _varlen(query, key, value, packed_seq_params, self.softmax_scale)
        else:
            out = _each_sequence(query, key, value, packed_seq_params, self.softmax_scale)
        return out.reshape(query.size(0), -1)


def _each_sequence(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, scale: float | None
) -> Tensor:
    lengths = (packed.cu_seqlens_q[1:] - packed.cu_seqlens_q[:-1]).tolist()
    gqa = query.size(1) != key.size(1)
    outs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        # [t, heads, d] -> [heads, t, d]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=gqa
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    accepts = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scale} if scale is not None else {}
    # torch 2.10 spells causality `is_causal`, later versions as a window without a right side.
    options.update({"window_size": (-1, 0)} if "window_size" in accepts else {"is_causal": True})
    if query.size(1) != key.size(1):
        if "enable_gqa" in accepts:
            options["enable_gqa"] = True
        else:
            repeats = query.size(1) // key.size(1)
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    cu, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    out = varlen_attn(query, key, value, cu, cu, longest, longest, **options)
    assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
    return out


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as Megatron builds one, usable with sequence parallelism.

    Under sequence parallelism a rank norms only its slice of the tokens, so its weight gradient is
    partial; the mark on the weight makes `finalize_model_grads` sum it over the tensor-parallel
    group.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
