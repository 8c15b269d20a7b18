"""Causal attention over packed sequences, for Megatron's local spec.

Used where TransformerEngine is not there. Megatron's own `DotProductAttention` knows no packing.
Nothing here builds a [T, T] mask: each sequence of the pack is attended to by itself, by torch's
varlen kernel on a GPU and by one SDPA call a sequence elsewhere.

Under context parallelism a rank holds two pieces of every sequence (`PackedBatch`). It gathers the
keys and values of all ranks, and each of its pieces attends to the keys up to its own end, or
through the layer's sliding window.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megaopd.batch import PackedBatch


@dataclass(frozen=True)
class KeyPieces:
    """What each run of queries on this rank attends to; worked out once per micro-batch.

    Run i are consecutive tokens of one sequence. Its keys are that sequence's tokens from the first
    to the last of the run, so its mask is causal and aligned at the end.

    Attributes:
        query_lengths: tokens of each run; their sum is T.
        key_lengths: keys of each run.
        source: int64, which of the gathered keys each key is, run by run; None takes the keys as
            they lie (each run is a whole sequence).
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    source: Tensor | None


def key_pieces(cu_seqlens: Tensor, cp_rank: int, cp_size: int) -> KeyPieces:
    """The runs of a rank under zigzag context parallelism; each whole sequence without it.

    Args:
        cu_seqlens: [S + 1] starts of the sequences over all ranks; with cp_size > 1 every length is
            a multiple of 2 x cp_size.
    """
    starts = cu_seqlens.tolist()
    if cp_size == 1:
        lengths = tuple(end - start for start, end in itertools.pairwise(starts))
        return KeyPieces(lengths, lengths, None)
    tokens = starts[-1] // cp_size  # of each rank; the gathered keys lie rank by rank
    query_lengths, key_lengths, source = [], [], []
    for start, end in itertools.pairwise(starts):
        piece = (end - start) // (2 * cp_size)
        # Where in the gathered keys the pieces of this sequence begin, in their natural order.
        begins = [rank * tokens + start // cp_size for rank in range(cp_size)]
        begins += [begin + piece for begin in reversed(begins)]
        keys = torch.cat([torch.arange(begin, begin + piece) for begin in begins])
        for mine in (cp_rank, 2 * cp_size - 1 - cp_rank):
            query_lengths.append(piece)
            key_lengths.append(piece * (mine + 1))
            source.append(keys[: piece * (mine + 1)])
    index = torch.cat(source).to(cu_seqlens.device)
    return KeyPieces(tuple(query_lengths), tuple(key_lengths), index)


class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, with what `PackedAttention` makes of it."""

    _pieces: KeyPieces | None = None

    @classmethod
    def of(cls, batch: PackedBatch, cp_size: int) -> PackedSequences:
        """Describes `batch`.

        TransformerEngine's context parallelism asks for the padded starts. The sequences are padded
        to 2 x cp_size already; what fills them comes last, where no real token attends to it.
        """
        starts, longest = batch.cu_seqlens, batch.max_seqlen
        padded = starts if cp_size > 1 else None
        return cls(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def pieces(self, group: dist.ProcessGroup | None) -> KeyPieces:
        """The runs of this rank of the context-parallel group."""
        if self._pieces is None:
            rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
            self._pieces = key_pieces(self.cu_seqlens_q, rank, size)
        return self._pieces


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens that one attends to in a layer, itself included; None is all before it.

    Megatron counts the tokens to the left and to the right, without the token itself.

    Args:
        layer_number: global, from 1.
    """
    if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return config.window_size[0] + 1
    return None


class PackedAttention(MegatronModule):
    """`core_attention` over THD tensors: [T, heads, head_dim], queries grouped over KV heads.

    Args:
        config: its `window_size` and `window_attn_skip_freq` give the layer's sliding window.
        pg_collection: its `cp` is the context-parallel group; None is a group of one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.window = window_of(config, layer_number)
        self.cp_group = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **unused: Any,
    ) -> Tensor:
        """Returns [T, heads * head_dim]; collective over the context-parallel group.

        Args:
            query: [T, heads, head_dim].
            key: [T, kv_heads, head_dim].
            value: [T, kv_heads, head_dim].
            packed_seq_params: starts of the sequences; every sequence is causal, and a token sees
                no more of its own than the layer's window.

        Raises:
            ValueError: the input is not packed.
        """
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            raise ValueError("PackedAttention takes packed sequences (qkv_format='thd') only")
        pieces = packed_seq_params.pieces(self.cp_group)
        if pieces.source is not None:
            # One collective for both; its backward sums every rank's gradient of these keys.
            gathered = gather_from_sequence_parallel_region(
                torch.cat((key, value), dim=-1),
                tensor_parallel_output_grad=True,
                group=self.cp_group,
            )
            key, value = gathered[pieces.source].split((key.size(-1), value.size(-1)), dim=-1)
        on_kernel = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        if on_kernel and (self.window is None or _varlen_knows_windows()):
            out = _varlen(query, key, value, pieces, self.softmax_scale, self.window)
        else:
            out = _each_sequence(query, key, value, pieces, self.softmax_scale, self.window)
        return out.reshape(query.size(0), -1)


def _blocks(pieces: KeyPieces, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yields (queries, keys that the first of them to the last sees); the keys end with the last.

    Without a window each run is a block. With one, a block has no more queries than the window has
    tokens, so that its mask has at most twice as many columns, however long the sequence.
    """
    query_end = key_end = 0
    for queries, keys in zip(pieces.query_lengths, pieces.key_lengths, strict=True):
        begin, query_end = query_end, query_end + queries
        first_key, key_end = key_end, key_end + keys
        for start in range(begin, query_end, window or max(queries, 1)):
            stop = min(start + window, query_end) if window else query_end
            offset = key_end - query_end  # of a query's own key
            seen = max(first_key, start + offset - window + 1) if window else first_key
            yield slice(start, stop), slice(seen, stop + offset)


def _each_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: KeyPieces,
    scale: float | None,
    window: int | None = None,
) -> Tensor:
    gqa = query.size(1) != key.size(1)
    outs = []
    for queries, keys in _blocks(pieces, window):
        # [t, heads, d] -> [heads, t, d]
        q, k, v = (x.transpose(0, 1) for x in (query[queries], key[keys], value[keys]))
        # SDPA's own causal mask is aligned at the start.
        mask, before = None, k.size(1) - q.size(1)
        if before:
            mask = torch.ones(q.size(1), k.size(1), dtype=torch.bool, device=q.device).tril(before)
            if window is not None:
                mask = mask.triu(before - window + 1)
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _varlen_knows_windows() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: KeyPieces,
    scale: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    accepts = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scale} if scale is not None else {}
    # torch 2.10 spells causality `is_causal`, later versions as a window without a right side;
    # either is aligned at the end of the keys.
    left = -1 if window is None else window - 1
    options.update({"window_size": (left, 0)} if "window_size" in accepts else {"is_causal": True})
    if query.size(1) != key.size(1):
        if "enable_gqa" in accepts:
            options["enable_gqa"] = True
        else:
            repeats = query.size(1) // key.size(1)
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    starts = [
        F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
        for lengths in (pieces.query_lengths, pieces.key_lengths)
    ]
    cu_q, cu_k = (x.to(query.device, non_blocking=True) for x in starts)
    longest_q, longest_k = max(pieces.query_lengths), max(pieces.key_lengths)
    out = varlen_attn(query, key, value, cu_q, cu_k, longest_q, longest_k, **options)
    assert isinstance(out, Tensor)  # a pair only where auxiliary outputs are asked for
    return out
