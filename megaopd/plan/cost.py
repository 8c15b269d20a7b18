"""Seconds of a step: FLOPs over speed, bytes over bandwidth, nothing overlapped with anything.

t = max over stages (compute + traffic) x (1 + (PP - 1) / (v m)), for m micro-batches over v virtual
stages: the bubble of 1F1B and of its interleaved form (Narayanan et al., arXiv 2104.04473, section
2.2). It ranks layouts; it is no forecast of a run. Generation is not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megaopd.config import ParallelConfig
from megaopd.models.arch import ModelArch
from megaopd.models.mapping import padded_vocab_size
from megaopd.plan.machine import Machine
from megaopd.plan.memory import FP32
from megaopd.plan.parameters import (
    active_parameters,
    chunks_of,
    rank_parameters,
)
from megaopd.plan.traffic import Flow, hand_over, model_flows, optimizer_flows
from megaopd.plan.workload import Workload


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; `bubble` is the part of `teacher` and `student` in which stages
    wait for each other."""

    teacher: float
    hand_over: float
    student: float
    optimizer: float
    offload: float
    bubble: float

    @property
    def total(self) -> float:
        return self.teacher + self.hand_over + self.student + self.optimizer + self.offload


def flow_seconds(flow: Flow, machine: Machine) -> float:
    """Latency of all its calls and its bytes at the bandwidth of its group."""
    speed = machine.bandwidth(flow.ranks, flow.stride, flow.ring)
    return flow.calls * machine.latency_us * 1e-6 + flow.bytes / speed


def layer_flops(arch: ModelArch, layer: int, tokens_per_sample: float) -> tuple[float, float]:
    """(products with weights, attention) of one token in one layer, forward.

    Two for every weight; attention costs 2 products of num_heads x head_dim multiply-adds for every
    token that one sees. Of a sequence of S tokens that is S / 2 on average, through a window of W
    tokens W - W^2 / 2S.
    """
    seen = tokens_per_sample / 2
    window = arch.window_size(layer)
    if window is not None and window < tokens_per_sample:
        seen = window - window**2 / (2 * tokens_per_sample)
    attention = 4 * arch.num_heads * arch.head_dim * seen
    return 2 * active_parameters(arch)[layer], attention


def samples_flops(arch: ModelArch, lengths: Sequence[int]) -> tuple[float, float]:
    """(products with weights, attention) of all layers for whole samples of these lengths, forward.

    The embedding multiplies nothing, and the head is not in it: see `head_flops`.
    """
    products = 2 * sum(active_parameters(arch)) * sum(lengths)
    layers = Counter(arch.window_size(layer) for layer in range(arch.num_layers))
    attention = 0.0
    for window, count in layers.items():
        like = next(i for i in range(arch.num_layers) if arch.window_size(i) == window)
        attention += count * sum(length * layer_flops(arch, like, length)[1] for length in lengths)
    return products, attention


def head_flops(vocab: int, hidden_size: int, teacher_width: int, loss_tokens: float) -> float:
    """Logits of both sides at the loss tokens, and the gradients of hidden states and head.

    Args:
        teacher_width: of the hidden states that the teacher hands over; 0 where it hands over none.
    """
    return 2 * vocab * (3 * hidden_size + teacher_width) * loss_tokens


def _model_seconds(
    work: Workload, machine: Machine, arch: ModelArch, parallel: ParallelConfig, train: bool
) -> tuple[float, float]:
    """(seconds, of them bubble) of all micro-batches of one model."""
    budget = work.tokens_per_micro_batch if train else work.teacher_tokens_per_micro_batch
    p, recompute = parallel, work.config.train.recompute
    split = p.tensor * p.context
    tokens = work.num_tokens / work.dp_size(p)
    speed = machine.tflops * 1e12 * machine.efficiency
    slowest = 0.0
    for stage in range(p.pipeline):
        chunks = chunks_of(p, arch.num_layers, stage)
        flops = 0.0
        for layer in (i for chunk in chunks for i in chunk.layers):
            products, attention = layer_flops(arch, layer, work.tokens_per_sample)
            # Backward costs two forwards.
            flops += (3 if train else 1) * (products + attention) * tokens
            if train and recompute == "full":
                flops += (products + attention) * tokens
            elif train and recompute == "selective":
                flops += attention * tokens
        if train and chunks[-1].has_head:
            vocab = padded_vocab_size(arch.vocab_size, p.tensor)
            loss_tokens = work.num_loss_tokens / work.dp_size(p)
            flops += head_flops(vocab, arch.hidden_size, work.teacher.hidden_size, loss_tokens)
        seconds = flops / split / speed
        for flow in model_flows(work, arch, p, stage, train):
            seconds += flow_seconds(flow, machine)
        slowest = max(slowest, seconds)
    micro_batches = work.num_micro_batches(p, budget)
    bubble = slowest * (p.pipeline - 1) / (p.virtual_pipeline * micro_batches)
    return slowest + bubble, bubble


def student_seconds(work: Workload, machine: Machine) -> tuple[float, float, float]:
    """(forward and backward, bubble, optimizer) of the student's layout, whatever the teacher's."""
    p = work.student_parallel
    compute, bubble = _model_seconds(work, machine, work.student, p, train=True)
    optimizer = 0.0
    for stage in range(p.pipeline):
        params = rank_parameters(work.student, p, work.world_size, stage)
        # Gradient, main weight and both moments read; all but the gradient written, and the weight.
        touched = params.optimizer_shard * (7 * FP32 + work.student_bytes)
        seconds = touched / (machine.hbm * 1e9)
        seconds += sum(flow_seconds(flow, machine) for flow in optimizer_flows(work, stage))
        optimizer = max(optimizer, seconds)
    return compute, bubble, optimizer


def teacher_seconds(work: Workload, machine: Machine) -> tuple[float, float]:
    """(forward, bubble) of the teacher's layout, whatever the student's."""
    return _model_seconds(work, machine, work.teacher, work.teacher_parallel, train=False)


def offload_seconds(work: Workload, machine: Machine) -> float:
    """The teacher's weights to the device once, the student's and its state there and back."""
    total = 0.0
    if work.config.teacher.offload:
        p = work.teacher_parallel
        largest = max(
            rank_parameters(work.teacher, p, work.world_size, stage).numel
            for stage in range(p.pipeline)
        )
        total += largest * work.teacher_bytes
    if work.config.train.offload:
        p = work.student_parallel
        arrays = 3 if work.student_bytes < FP32 else 2
        stages = [
            rank_parameters(work.student, p, work.world_size, stage) for stage in range(p.pipeline)
        ]
        total += 2 * max(
            arrays * s.optimizer_shard * FP32 + s.stored * work.student_bytes for s in stages
        )
    return total / (machine.pcie * 1e9)


def hand_over_seconds(work: Workload, machine: Machine) -> float:
    """What the busiest rank receives, from anywhere."""
    return hand_over(work).busiest / machine.bandwidth(work.world_size, 1, False)


def step_time(work: Workload, machine: Machine) -> StepTime:
    """The cost model's word on the layouts of `work.config`."""
    student, student_bubble, optimizer = student_seconds(work, machine)
    teacher, teacher_bubble = teacher_seconds(work, machine)
    return StepTime(
        teacher=teacher,
        hand_over=hand_over_seconds(work, machine),
        student=student,
        optimizer=optimizer,
        offload=offload_seconds(work, machine),
        bubble=student_bubble + teacher_bubble,
    )
