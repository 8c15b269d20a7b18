"""Sliding-window attention in Megatron's terms: configuration, and a RoPE of the window's layers.

Megatron hands every layer one tensor of rotary angles. Where the window's layers have a RoPE of
their own, that tensor holds both and each layer takes its own; so it passes through pipeline
chunks and recomputation as it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaopd.models.arch import ModelArch, rope_inv_freq
from megaopd.models.attention import PackedAttention, window_of


def window_config(arch: ModelArch) -> dict[str, Any]:
    """The arguments of `TransformerConfig` that a sliding window needs; none without one.

    Megatron's window counts the tokens to the left and right of the token itself, transformers'
    the token too.
    """
    if arch.window is None:
        return {}
    return {
        "window_size": (arch.window.size - 1, 0),
        # Despite its name, it says of every layer whether it has the window.
        "window_attn_skip_freq": [int(i in arch.window.layers) for i in range(arch.num_layers)],
    }


class RotaryPair(torch.nn.Module):
    """Two rotary embeddings in the place of one.

    Args:
        full: that of the full-attention layers.
        inv_freq: inverse frequencies of the window's layers, fp32 [head_dim / 2].
    """

    def __init__(self, full: RotaryEmbedding, inv_freq: Tensor) -> None:
        super().__init__()
        self.full = full
        self.window = copy.copy(full)  # all but its frequencies
        self.window.inv_freq = inv_freq

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        return self.full.get_rotary_seq_len(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the angles of the full-attention layers and of the window's, [2, ...]."""
        return torch.stack((self.full(*args, **kwargs), self.window(*args, **kwargs)))


class PairedRoPESelfAttention(SelfAttention):
    """Self-attention that takes its layer's angles from what a `RotaryPair` gave."""

    def forward(
        self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As Megatron's.

        Args:
            rotary_pos_emb: [2, max_seqlen, 1, 1, head_dim].
        """
        if rotary_pos_emb is not None:
            windowed = window_of(self.config, self.layer_number) is not None
            rotary_pos_emb = rotary_pos_emb[int(windowed)]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)


def adapt_layer(layer: ModuleSpec, arch: ModelArch, config: TransformerConfig) -> ModuleSpec:
    """Makes the spec of a layer one of a model with a sliding window; changes and returns it."""
    if arch.window is None:
        return layer
    attention = layer.submodules.self_attention
    if arch.window.rope is not None:
        attention.module = PairedRoPESelfAttention
    if config.context_parallel_size > 1:
        # TransformerEngine's ring of context-parallel ranks knows no window.
        attention.submodules.core_attention = PackedAttention
    return layer


def set_rotary(model: Any, arch: ModelArch, device: torch.device) -> None:
    """Gives a chunk (a `GPTModel`) the rotary frequencies of its architecture."""
    model.rotary_pos_emb.inv_freq = rope_inv_freq(arch)[0].to(device)
    if arch.window is not None and arch.window.rope is not None:
        inv_freq, _ = rope_inv_freq(arch, arch.window.rope)
        model.rotary_pos_emb = RotaryPair(model.rotary_pos_emb, inv_freq.to(device))
