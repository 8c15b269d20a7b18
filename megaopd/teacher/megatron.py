"""The teacher as a Megatron model on the trainer's ranks, in a layout of its own. It hands over
hidden states, not logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megaopd.batch import HiddenSignal, PackedBatch, Sample
from megaopd.checkpoint.loading import load_model
from megaopd.config import TeacherConfig
from megaopd.data.packing import Batching
from megaopd.engine import schedule
from megaopd.engine.offload import HostOffload, parameters
from megaopd.models.arch import ModelArch
from megaopd.models.build import DTYPES, build_model
from megaopd.models.mapping import padded_vocab_size
from megaopd.parallel.groups import ParallelGroups
from megaopd.protocols import Student
from megaopd.teacher.hand_over import HandOver, host_empty
from megaopd.teacher.head import HeadSlot, teacher_head, vocab_rows_of


class MegatronTeacher:
    """Implements `megaopd.protocols.Teacher`.

    Args:
        config: where its weights are, their dtype, and whether they stay on the device between
            calls.
        arch: its architecture.
        groups: the groups of its layout, all of the world's ranks.
        batching: how it shares out and packs samples in that layout.
        student: how the student does: whoever computes a token there gets its hidden state.
        student_vocab_rows: padded rows of the student's head over all its tensor-parallel ranks.
        name: it scores the samples whose `Prompt.teacher` is this.
        slot: room on the device for a head that is not part of the model; None makes its own.

    Attributes:
        metrics: of the last `score`, equal on every rank.
    """

    def __init__(
        self,
        config: TeacherConfig,
        arch: ModelArch,
        groups: ParallelGroups,
        batching: Batching,
        student: Batching,
        student_vocab_rows: int,
        name: str = "",
        slot: HeadSlot | None = None,
    ) -> None:
        self.name, self.groups = name, groups
        self.batching, self.student = batching, student
        self.hidden_size, self.dtype = arch.hidden_size, DTYPES[config.dtype]
        self.metrics: dict[str, float] = {}
        vocab_rows = padded_vocab_size(arch.vocab_size, groups.parallel.tensor)
        self.chunks = build_model(arch, groups.parallel, groups, config.dtype, vocab_rows)
        load_model(self.chunks, arch, config.path)
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()

        self.slot = slot or HeadSlot(groups.device)
        layout, rank = student.layout, groups.rank
        wanted = range(0)
        if layout.coordinates(rank).pp == layout.parallel.pipeline - 1:
            wanted = vocab_rows_of(layout, rank, student_vocab_rows)
        self.head = teacher_head(
            self.chunks[-1].head if groups.is_last_stage else None,
            vocab_rows_of(groups.layout, rank, vocab_rows),
            wanted,
            config.path,
            arch,
            self.dtype,
            self.slot,
            apart=config.offload,
        )
        # Weights that never change are copied to the host once.
        role = "moved" if config.kind == "ema" else "constant"
        self.offload = HostOffload(
            groups.device, enabled=config.offload, **{role: lambda: parameters(self.chunks)}
        )
        self.offload.guard(self.chunks)
        self.offload.to_host()

    def score(self, samples: Sequence[Sample]) -> list[HiddenSignal]:
        """Scores its samples: forward in its own layout, then the hand-over to the student's.

        Returns:
            One signal per student micro-batch of this rank, in order; without rows for a
            micro-batch of another teacher, and elsewhere than on the student's last stage.
        """
        students = self.student.assign(samples)
        assignment = self.batching.assign(samples, self.name, like=students)
        hand_over = HandOver(
            samples,
            self.batching,
            assignment,
            self.student,
            students,
            self.groups.rank,
        )
        micro_batches = self.batching.micro_batches(samples, assignment, self.groups.rank)
        self.slot.vacate()  # for the model's sake
        with self.offload.on_device():
            cache = self._hidden_states(micro_batches, hand_over.num_held)
        handed = hand_over.run(cache, self.groups.device)
        row_bytes = self.hidden_size * cache.element_size()
        self.metrics = {"perf/hand_over_bytes": float(hand_over.total_rows_sent * row_bytes)}
        return [HiddenSignal(hidden_LH, self.head) for hidden_LH in handed]

    def follow(self, student: Student) -> None:
        """Its weights stay as they are."""

    def close(self) -> None:
        """It started nothing."""

    def _hidden_states(self, micro_batches: Sequence[PackedBatch], num_rows: int) -> Tensor:
        """[num_rows, H] in host memory: the hidden states of the loss tokens of all micro-batches;
        no row but on the last stage."""
        cache_LH = host_empty(num_rows, self.hidden_size, self.dtype)
        ends = list(accumulate(int(b.loss_mask_T.sum()) for b in micro_batches))

        def collect(index: int, batch: PackedBatch, hidden_TH: Tensor) -> None:
            rows = hidden_TH[batch.loss_mask_T]
            cache_LH[ends[index] - len(rows) : ends[index]].copy_(rows, non_blocking=True)

        schedule.forward_only(self.chunks, micro_batches, self.groups, collect)
        if self.groups.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the copies to the host are under way
        return cache_LH
