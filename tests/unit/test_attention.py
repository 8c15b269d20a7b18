"""Packed attention against one softmax under an explicit mask, in fp64, on every rank of a
context-parallel group; rotary positions."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from megaopd.batch import Prompt, Sample
from megaopd.data.packing import pack

# megaopd first: it lets megatron be imported where there is no CUDA.
from megaopd.models.attention import (  # isort: split
    PackedAttention,
    PackedSequences,
    _blocks,
    _each_sequence,
    key_pieces,
)

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megaopd.parallel.layout import Place

LENGTHS = (5, 1, 9, 3)
HEAD_DIM = 8


def _inputs(heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    tokens = sum(LENGTHS)
    sizes = (heads, kv_heads, kv_heads)
    q, k, v = (
        torch.randn(tokens, n, HEAD_DIM, generator=generator, dtype=torch.float64) for n in sizes
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def _with_window(window: int | None) -> dict[str, Any]:
    """Megatron's spelling of a window; the first of two layers has it."""
    if window is None:
        return {}
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": [1, 0]}


def _packed(lengths: tuple[int, ...] = LENGTHS, qkv_format: str = "thd") -> PackedSequences:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSequences(
        qkv_format=qkv_format,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def _attention(
    heads: int,
    kv_heads: int,
    scale: float | None = None,
    window: int | None = None,
    layer_number: int = 1,
) -> PackedAttention:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=heads * HEAD_DIM,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=HEAD_DIM,
        **_with_window(window),
    )
    # Megatron hands over more than is used.
    return PackedAttention(
        config,
        layer_number,
        AttnMaskType.padding_causal,
        "self",
        softmax_scale=scale,
        cp_comm_type=None,
    )


def _reference(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v over all T tokens at once; [T, heads * head_dim]."""
    heads = query.size(1)
    # Query head h reads KV head h // (heads / kv_heads).
    owner = torch.arange(heads) // (heads // key.size(1))
    scale = 1 / math.sqrt(HEAD_DIM) if scale is None else scale
    scores = torch.einsum("thd,shd->hts", query, key[:, owner]) * scale
    tokens = torch.arange(query.size(0))
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (sequence[:, None] == sequence[None]) & (tokens[:, None] >= tokens[None])
    if window is not None:
        # As transformers has it: kv_idx > q_idx - sliding_window.
        seen &= tokens[None] > tokens[:, None] - window
    probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", probs, value[:, owner]).flatten(1)


# Windows of the token alone, within and at the end of sequences, and as long as the longest.
WINDOWS = [None, 1, 2, 3, 4, 5, 8, 9, 100]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_values_and_gradients(heads, kv_heads, scale, window):
    inputs = _inputs(heads, kv_heads)
    out = _attention(heads, kv_heads, scale, window)(*inputs, packed_seq_params=_packed())
    expected = _reference(*inputs, scale, window)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, upstream)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-11)


CP_LENGTHS = (8, 16, 24)  # multiples of 2 x cp_size for cp_size 2 and 4


def _zigzag(cp_rank: int, cp_size: int) -> Tensor:
    """Which tokens of the pack a rank holds: pieces r and 2 cp_size - 1 - r of every sequence."""
    found, start = [], 0
    for length in CP_LENGTHS:
        pieces = torch.arange(start, start + length).view(2 * cp_size, -1)
        found += [pieces[cp_rank], pieces[2 * cp_size - 1 - cp_rank]]
        start += length
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 7, 12, 24])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("cp_size", [2, 4])
def test_every_context_parallel_rank_computes_its_part(
    monkeypatch, cp_size, heads, kv_heads, window
):
    """The collective itself is tested in tests/distributed."""
    monkeypatch.setattr(sys.modules[__name__], "LENGTHS", CP_LENGTHS)
    query, key, value = _inputs(heads, kv_heads)
    expected = _reference(query, key, value, None, window)
    held = [_zigzag(rank, cp_size) for rank in range(cp_size)]
    assert torch.cat(held).sort()[0].equal(torch.arange(sum(CP_LENGTHS)))
    everyones = torch.cat(held)  # as the all-gather lays them
    for rank, mine in enumerate(held):
        pieces = key_pieces(_packed(CP_LENGTHS).cu_seqlens_q, rank, cp_size)
        k, v = (x[everyones][pieces.source] for x in (key, value))
        out = _each_sequence(query[mine], k, v, pieces, None, window).flatten(1)
        torch.testing.assert_close(out, expected[mine], rtol=1e-12, atol=1e-12)


def test_a_window_is_of_its_layers():
    inputs = _inputs(4, 2)
    with_window, without = (_attention(4, 2, window=3, layer_number=n) for n in (1, 2))
    assert (with_window.window, without.window) == (3, None)
    full = _attention(4, 2)(*inputs, packed_seq_params=_packed())
    assert without(*inputs, packed_seq_params=_packed()).equal(full)
    out = with_window(*inputs, packed_seq_params=_packed())
    # Within the window all is as without.
    starts = [0, 1, 2, 5, 6, 7, 8, 15, 16, 17]
    same = torch.isclose(out, full, rtol=1e-12, atol=1e-12).all(dim=1)
    assert same.nonzero().flatten().tolist() == starts


def test_the_masks_of_a_long_sequence_stay_narrow():
    """Linear in the length of the sequence, as the window's cost is."""
    pieces = key_pieces(_packed((1000, 7)).cu_seqlens_q, 0, 1)
    blocks = [(q.stop - q.start, k.stop - k.start) for q, k in _blocks(pieces, 10)]
    assert sum(queries for queries, _ in blocks) == 1007
    assert max(keys for _, keys in blocks) == 19
    assert list(_blocks(pieces, None)) == [(slice(0, 1000),) * 2, (slice(1000, 1007),) * 2]


class _Group:
    """What Megatron's rotary embedding asks of a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize(
    ("cp_rank", "cp_size"), [(0, 1), (0, 2), (1, 2), *((rank, 4) for rank in range(4))]
)
def test_megatron_rotates_by_the_positions_of_the_batch(cp_rank, cp_size):
    """So the pack, its zigzag cut included, and the rotary embedding speak of the same positions;
    Megatron is told only where sequences start and which rank this is."""
    samples = [
        Sample(Prompt(str(n), (1,) * n), 0, (2,) * 5, (0.0,) * 5, (True,) * 5, "stop", 0)
        for n in (3, 9, 1)
    ]
    batch = pack(samples, pad_to_multiple=4, place=Place(0, 1, cp_rank, cp_size))
    group = _Group(cp_rank, cp_size)
    rotary = RotaryEmbedding(HEAD_DIM, 1.0, use_cpu_initialization=True, cp_group=group)
    packed = PackedSequences.of(batch, cp_size)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch.tokens_T.numel(), 2, HEAD_DIM, generator=generator)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    freqs = rotary(rotary.get_rotary_seq_len(None, None, None, config, packed), packed_seq=True)
    found = apply_rotary_pos_emb(x, freqs, config, packed.cu_seqlens_q, cp_group=group)

    angles = torch.outer(batch.positions_T.float(), rotary.inv_freq)[:, None]
    a, b = x.chunk(2, dim=-1)
    wanted = torch.cat(
        (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    if cp_rank:
        assert not batch.positions_T.equal(torch.arange(x.size(0)))


def test_sequences_do_not_see_each_other():
    attention = _attention(4, 2)
    inputs = _inputs(4, 2)
    out = attention(*inputs, packed_seq_params=_packed())
    start, end = 6, 15  # the third sequence
    # Nothing of the others flows in ...
    for grad in torch.autograd.grad(out[start:end].sum(), inputs):
        assert not grad[:start].any()
        assert not grad[end:].any()
        assert grad[start:end].any()
    # ... and what they hold changes nothing, to the bit.
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[:start] = 100.0
        x[end:] = torch.nan
    again = attention(*changed, packed_seq_params=_packed())
    assert again[start:end].equal(out[start:end])
    assert again[end:].isnan().all()


def test_no_token_sees_a_later_one():
    attention = _attention(4, 2)
    inputs = _inputs(4, 2)
    out = attention(*inputs, packed_seq_params=_packed())
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[10] += 1.0  # within the third sequence, tokens 6 to 14
    again = attention(*changed, packed_seq_params=_packed())
    same = (again == out).all(dim=1)
    assert same[:10].all()
    assert not same[10:15].any()


def test_a_lone_token_gets_its_own_value():
    query, key, value = _inputs(4, 2)
    out = _attention(4, 2)(query, key, value, packed_seq_params=_packed())
    assert out[5].equal(value[5].repeat_interleave(2, dim=0).flatten())


@pytest.mark.parametrize("packed", [None, _packed(qkv_format="sbhd")])
def test_what_is_not_packed_is_refused(packed):
    with pytest.raises(ValueError, match="packed"):
        _attention(4, 2)(*_inputs(4, 2), packed_seq_params=packed)
