"""What ranks send one another in a step, by kind.

Volumes are bytes that one rank sends. Of S bytes over n ranks a ring all-gather or reduce-scatter
sends (n - 1) / n S and an all-reduce twice that (Patarasuk and Yuan, 2009); an all-to-all sends
(n - 1) / n of what it distributes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaopd.config import ParallelConfig
from megaopd.models.arch import ModelArch
from megaopd.models.mapping import padded_vocab_size
from megaopd.parallel.layout import Layout
from megaopd.plan.memory import FP32, cached_rows
from megaopd.plan.parameters import (
    chunks_of,
    expert_tensor,
    rank_parameters,
    total_parameters,
)
from megaopd.plan.workload import Workload


@dataclass(frozen=True)
class Flow:
    """Messages of one kind that a rank sends in a step.

    Attributes:
        phase: teacher, hand-over, student, optimizer or weight sync.
        kind: TP, CP, PP, EP, DP, or the phase's own.
        what: the operation.
        ranks: of the group.
        stride: between the numbers of neighbours in it; with `ranks` it says whether the group
            leaves a node, and how many of its ranks share one.
        ring: a collective whose rings leave a node by the adapters of all its ranks there;
            otherwise each message has one adapter.
        calls: operations in a step.
        bytes: sent by one rank in a step.
    """

    phase: str
    kind: str
    what: str
    ranks: int
    stride: int
    ring: bool
    calls: int
    bytes: int


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def model_flows(
    work: Workload, arch: ModelArch, parallel: ParallelConfig, stage: int, train: bool
) -> list[Flow]:
    """What a rank of pipeline stage `stage` sends inside the model, in a step."""
    phase = "student" if train else "teacher"
    b = work.student_bytes if train else work.teacher_bytes
    budget = work.tokens_per_micro_batch if train else work.teacher_tokens_per_micro_batch
    p, tp, cp, pp = parallel, parallel.tensor, parallel.context, parallel.pipeline
    micro_batches = work.num_micro_batches(p, budget)
    # All tokens that this rank's part of the sequences holds in a step.
    tokens = work.num_tokens / work.dp_size(p) / cp
    chunks = chunks_of(p, arch.num_layers, stage)
    layers = [i for chunk in chunks for i in chunk.layers]
    again = train and work.config.train.recompute == "full"
    # Forward, its repetition and backward each carry the same activations or their gradients.
    passes = (3 if again else 2) if train else 1
    row = arch.hidden_size * b
    shard = 1 / tp if p.sequence_parallel else 1.0
    flows = []
    if tp > 1:
        # Attention and MLP end in one all-reduce each, or an all-gather and a reduce-scatter of the
        # same bytes (arXiv 2205.05198, section 4.2.2); a mixture of experts has its own groups.
        blocks = sum(1 if arch.is_moe_layer(i) else 2 for i in layers)
        volume = 2 * _ring(tp) * tokens * row * passes * blocks
        calls = blocks * passes * micro_batches * (2 if p.sequence_parallel else 1)
        if train and p.sequence_parallel:  # the sharded inputs are gathered again for their weights
            volume += _ring(tp) * tokens * row * blocks
            calls += blocks * micro_batches
        name = "all-gather, reduce-scatter" if p.sequence_parallel else "all-reduce"
        flows.append(Flow(phase, "TP", name, tp, 1, True, calls, round(volume)))
        if chunks[-1].has_head and train:
            loss = work.num_loss_tokens / work.dp_size(p) / cp
            flows.append(
                Flow(
                    phase,
                    "TP",
                    "divergence: hidden gradient",
                    tp,
                    1,
                    True,
                    micro_batches,
                    round(2 * _ring(tp) * loss * row),
                )
            )
    if cp > 1:
        # A ring passes keys and values on, and in backward them and their gradients.
        kv = 2 * arch.num_kv_heads / tp * arch.head_dim * b
        rounds = (passes + 1 if train else 1) * len(layers)
        volume = (cp - 1) * tokens * kv * rounds
        calls = (cp - 1) * rounds * micro_batches
        flows.append(Flow(phase, "CP", "keys and values", cp, tp, False, calls, round(volume)))
    if pp > 1:
        sends = sum(not chunk.has_head for chunk in chunks)
        if train:
            sends += sum(not chunk.has_embedding for chunk in chunks)
        volume = sends * tokens * row * shard
        flows.append(
            Flow(
                phase,
                "PP",
                "hidden states p2p",
                pp,
                work.world_size // pp,
                False,
                sends * micro_batches,
                round(volume),
            )
        )
    moe_layers = sum(arch.is_moe_layer(i) for i in layers)
    if arch.moe is not None and moe_layers and p.expert > 1:
        copies = tokens * shard * arch.moe.top_k * row
        volume = 2 * _ring(p.expert) * copies * passes * moe_layers
        calls = 2 * passes * moe_layers * micro_batches
        stride = expert_tensor(p)
        flows.append(Flow(phase, "EP", "all-to-all", p.expert, stride, False, calls, round(volume)))
    etp = expert_tensor(p)
    if arch.moe is not None and moe_layers and etp > 1:
        received = tokens * shard * arch.moe.top_k * row * etp
        volume = 2 * _ring(etp) * received * passes * moe_layers
        calls = 2 * passes * moe_layers * micro_batches
        name = "experts: all-gather, reduce-scatter"
        flows.append(Flow(phase, "TP", name, etp, 1, True, calls, round(volume)))
    return flows


def optimizer_flows(work: Workload, stage: int) -> list[Flow]:
    """Gradients and weights over the ranks that share them, once a step."""
    p, world = work.student_parallel, work.world_size
    its = work.config.student
    params = rank_parameters(work.student, p, world, stage, its.freeze, its.lora)
    flows = []
    for what, size in (
        ("gradients: reduce-scatter", FP32),
        ("weights: all-gather", work.student_bytes),
    ):
        for ranks in sorted({b.group_size for b in params.buckets if b.group_size > 1}):
            mine = [bucket for bucket in params.buckets if bucket.group_size == ranks]
            volume = _ring(ranks) * sum(bucket.numel for bucket in mine) * size
            stride = world // p.pipeline // ranks
            flows.append(
                Flow("optimizer", "DP", what, ranks, stride, True, len(mine), round(volume))
            )
    return flows


@dataclass(frozen=True)
class HandOver:
    """The teacher's hidden states on their way to the student's last-stage ranks, in a step.

    Attributes:
        rows: loss tokens of the step.
        hidden_bytes: sent by all ranks together, as hidden states.
        logits_bytes: what would have to be sent as logits: every row of them to the ranks of one
            tensor-parallel group, each its part of the vocabulary.
        row_bytes, logits_row_bytes: of one token, in host memory, either way.
        busiest: bytes that the busiest rank receives.
    """

    rows: int
    hidden_bytes: int
    logits_bytes: int
    row_bytes: int
    logits_row_bytes: int
    busiest: int


def hand_over(work: Workload) -> HandOver:
    """Counts the hand-over between the two layouts.

    Every tensor-parallel rank of the student's last stage needs the rows of its samples. A rank
    that is on the teacher's last stage as well has some of them already: all, where both layouts
    have as many data- and context-parallel ranks, since the teacher then takes over the student's
    shares; the part that chance gives it, 1 / (DP x CP) of the teacher,
    elsewhere.
    """
    s = Layout(work.student_parallel, work.world_size)
    t = Layout(work.teacher_parallel, work.world_size)
    sp, tp = s.parallel, t.parallel
    alike = s.dp_size == t.dp_size and sp.context == tp.context
    row = work.teacher.hidden_size * work.teacher_bytes
    need = cached_rows(work) * row
    total, busiest = 0.0, 0.0
    for rank in range(work.world_size):
        at = s.coordinates(rank)
        if at.pp != sp.pipeline - 1:
            continue
        has = t.coordinates(rank)
        local = 0.0
        if has.pp == tp.pipeline - 1:
            local = 1 / (t.dp_size * tp.context)
            if alike:
                local = float((at.dp, at.cp) == (has.dp, has.cp))
        total += need * (1 - local)
        busiest = max(busiest, need * (1 - local))
    vocab = padded_vocab_size(work.student.vocab_size, sp.tensor)
    moved = total / (need * s.dp_size * sp.context * sp.tensor) if need else 0.0
    logits_row = vocab * work.teacher_bytes
    return HandOver(
        rows=work.num_loss_tokens,
        hidden_bytes=round(total),
        logits_bytes=round(moved * work.num_loss_tokens * logits_row),
        row_bytes=row,
        logits_row_bytes=logits_row,
        busiest=round(busiest),
    )


def sync_flows(work: Workload) -> list[Flow]:
    """Weights from the student to the embedded engine, which wants every tensor on every rank."""
    p = work.student_parallel
    if work.config.rollout.kind != "embedded":
        return []
    weights = total_parameters(work.student) * work.student_bytes
    calls = work.student.num_layers * 11
    flows = []
    if p.tensor > 1:
        sent = round(_ring(p.tensor) * weights / p.pipeline)
        flows.append(
            Flow("weight sync", "TP", "weights: all-gather", p.tensor, 1, True, calls, sent)
        )
    if p.pipeline > 1:
        flows.append(
            Flow(
                "weight sync",
                "PP",
                "weights: broadcast",
                p.pipeline,
                work.world_size // p.pipeline,
                True,
                calls,
                round(_ring(p.pipeline) * weights),
            )
        )
    return flows
