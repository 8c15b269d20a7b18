"""Memory of activations: what autograd keeps of a micro-batch, and how many micro-batches it keeps.

The counting is that of Korthikanti et al., arXiv 2205.05198, section 4: the tensors that a layer
saves for its backward pass, one by one. Their layer has GeLU, dropout, biases and a stored softmax,
in all s b h (34 + 5 a s / h) bytes; ours has SwiGLU, grouped-query attention whose kernel stores no
softmax, RMSNorm, neither dropout nor biases, so the list differs and the method does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaopd.config import ParallelConfig
from megaopd.models.arch import ModelArch
from megaopd.plan.parameters import Chunk, chunks_of, expert_tensor

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Widths:
    """Bytes that a rank keeps or needs per token of its own (T of a `PackedBatch`), in one layer.

    Attributes:
        saved: kept from forward to backward.
        attention: the part of `saved` that selective recomputation gives up: the attention's own
            output and normalisers where they are not the next layer's input anyway.
        entry: the layer's input, all that full recomputation keeps.
        working: live at once on top of that while one layer computes.
    """

    saved: float
    attention: float
    entry: float
    working: float


def layer_widths(
    arch: ModelArch, parallel: ParallelConfig, dtype_bytes: int, layer: int, fused: bool
) -> Widths:
    """Counts one decoder layer.

    Sequence parallelism shards what lies outside the tensor-parallel regions (section 4.2.2). The
    tokens of a mixture of experts are taken as evenly routed.

    Args:
        fused: TransformerEngine's kernels; otherwise Megatron's local spec as torch runs it on a
            CPU, whose norms, SwiGLU and rotary embedding keep more.
    """
    tp, h, b = parallel.tensor, arch.hidden_size, dtype_bytes
    shard = 1 / tp if parallel.sequence_parallel else 1.0
    heads, kv_heads = arch.num_heads / tp, arch.num_kv_heads / tp
    qkv = (heads + 2 * kv_heads) * arch.head_dim
    rotated = (heads + kv_heads) * arch.head_dim
    out = heads * arch.head_dim
    lse = FP32 * heads  # the attention kernel's normalisers
    attention_bytes = lse if fused else lse + b * out
    # Inputs of QKV and MLP; QKV, rotated queries and keys, input of the projection.
    saved = b * (h * shard + qkv + rotated + out) + attention_bytes
    norms = 4 if arch.post_norms else 2
    saved += norms * (_norm(h * shard, b, fused) + FP32 * shard)
    if arch.qk_norm:
        saved += FP32 * (heads + kv_heads)
        if not fused:
            saved += 2 * FP32 * rotated
    if not fused or arch.rope_interleaved:
        saved += b * 4 * arch.rotary_dim  # cos and sin, made anew for queries and for keys
    if not fused and parallel.context > 1:
        # Both runs of queries keep copies of all keys and values up to their own end.
        saved += b * 2 * kv_heads * arch.head_dim * (parallel.context + 0.5)
    if arch.is_moe_layer(layer):
        mlp_saved, mlp_working = _experts(arch, parallel, b, shard, fused)
    else:
        f = arch.ffn_hidden_size / tp
        # Megatron's configuration fuses no other activation.
        mlp_saved = b * (h * shard + _gated(f, fused and arch.activation == "silu"))
        mlp_working = b * (h + 3 * f)
    working = b * 2 * h + max(b * (qkv + rotated + out), mlp_working)
    return Widths(saved + mlp_saved, attention_bytes, b * h * shard, working)


def _norm(width: float, dtype_bytes: int, fused: bool) -> float:
    """Bytes that a norm keeps: its input; decomposed, that and the normalised values in fp32."""
    return (dtype_bytes if fused else 2 * FP32) * width


def _gated(ffn: float, fused: bool) -> float:
    """Elements of a SwiGLU: gate and up, and their product; unfused also silu(gate) and a copy of
    up."""
    return (3 if fused else 5) * ffn


def _experts(
    arch: ModelArch, parallel: ParallelConfig, b: int, shard: float, fused: bool
) -> tuple[float, float]:
    """(saved, working) bytes per token of a mixture of experts with all-to-all dispatch.

    Permutations keep indices alone. Unfused, the product is kept a second time, for the router's
    weight that multiplies it.
    """
    assert arch.moe is not None
    moe, h, etp = arch.moe, arch.hidden_size, expert_tensor(parallel)
    received = moe.top_k * shard * etp  # copies of a token; an expert's ranks all see its tokens
    ffn = moe.ffn_hidden_size / etp
    router = shard * FP32 * 3 * moe.num_experts
    saved = b * (h * shard + received * (h + _gated(ffn, fused) + (0 if fused else ffn))) + router
    return saved, b * (received * (h + 3 * ffn) + 2 * moe.top_k * shard * h)


def in_flight(parallel: ParallelConfig, stage: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, at most.

    1F1B (PipeDream-Flush) keeps PP - stage of them; with v interleaved chunks a rank warms up with
    2 (PP - stage - 1) + (v - 1) PP chunks and holds one more, each a v-th of a micro-batch
    (Narayanan et al., arXiv 2104.04473, section 2.2).
    """
    pp, v = parallel.pipeline, parallel.virtual_pipeline
    if v == 1:
        return min(pp - stage, num_micro_batches)
    return min((2 * (pp - stage - 1) + (v - 1) * pp + 1) / v, num_micro_batches)


@dataclass(frozen=True)
class Activations:
    """Bytes of activations on a rank.

    Attributes:
        saved: kept for backward passes at the peak.
        working: temporaries of the layer that computes.
    """

    saved: int
    working: int


def training_activations(
    arch: ModelArch,
    parallel: ParallelConfig,
    stage: int,
    *,
    tokens: int,
    num_micro_batches: int,
    dtype_bytes: int,
    recompute: str,
    fused: bool = True,
) -> Activations:
    """Activations of forward and backward on a rank of pipeline stage `stage`.

    Args:
        tokens: tokens of a micro-batch on this rank (its part under context parallelism).
        recompute: none; selective, which computes the attention again (arXiv 2205.05198, section
            5); full, which keeps a layer's input and computes the layer again.
    """
    chunks = chunks_of(parallel, arch.num_layers, stage)
    per_token, again, working = 0.0, 0.0, 0.0
    for chunk in chunks:
        for layer in chunk.layers:
            w = layer_widths(arch, parallel, dtype_bytes, layer, fused)
            kept = {"none": w.saved, "selective": w.saved - w.attention, "full": w.entry}[recompute]
            per_token += kept
            again = max(again, w.saved - kept)
            working = max(working, w.working)
    flying = in_flight(parallel, stage, num_micro_batches)
    saved = (
        flying
        * tokens
        * (per_token + _ends(arch, parallel, chunks, dtype_bytes, fused) / len(chunks))
    )
    return Activations(round(saved + tokens * again), round(tokens * working))


def _ends(
    arch: ModelArch,
    parallel: ParallelConfig,
    chunks: tuple[Chunk, ...],
    dtype_bytes: int,
    fused: bool,
) -> float:
    """Bytes per token outside the layers: the embedding's ids, and the final norm's."""
    shard = 1 / parallel.tensor if parallel.sequence_parallel else 1.0
    total = 0.0
    if chunks[0].has_embedding:
        total += INT64
    if chunks[-1].has_head:
        total += _norm(arch.hidden_size * shard, dtype_bytes, fused) + FP32 * shard
    return total


def scoring_activations(
    arch: ModelArch, parallel: ParallelConfig, stage: int, *, tokens: int, dtype_bytes: int
) -> Activations:
    """Activations of a forward pass without a gradient: one layer at a time."""
    layers = [i for chunk in chunks_of(parallel, arch.num_layers, stage) for i in chunk.layers]
    working = max(layer_widths(arch, parallel, dtype_bytes, i, True).working for i in layers)
    return Activations(0, round(tokens * working))
