"""The teacher as a Megatron model on the trainer's ranks. It hands over hidden states, not
logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaopd.batch import HiddenSignal, PackedBatch
from megaopd.config import ParallelConfig, TeacherConfig
from megaopd.engine import schedule
from megaopd.models import weights
from megaopd.models.arch import ModelArch
from megaopd.models.build import build_model
from megaopd.parallel.groups import ParallelGroups


class MegatronTeacher:
    """Implements `megaopd.protocols.Teacher`.

    Its layout is the student's and its vocabulary is padded to the student's rows, so its own head
    shard lies in the student's vocabulary partition and its hidden states on the ranks that need
    them.

    Args:
        vocab_rows: padded rows of the head over all tensor-parallel ranks, the same as the
            student's.
    """

    def __init__(
        self,
        config: TeacherConfig,
        parallel: ParallelConfig,
        arch: ModelArch,
        groups: ParallelGroups,
        vocab_rows: int,
    ) -> None:
        self.groups = groups
        self.model = build_model(arch, parallel, groups, config.dtype, vocab_rows)
        weights.load_weights(self.model, arch, config.path)
        self.model.requires_grad_(False).eval()

    def score(self, micro_batches: Sequence[PackedBatch]) -> list[HiddenSignal]:
        """One signal per micro-batch; on stages other than the last it is empty."""

        def collect(index: int, batch: PackedBatch, hidden: Tensor) -> HiddenSignal:
            return HiddenSignal(hidden, self.model.head)

        signals = schedule.forward_only(self.model, micro_batches, self.groups, collect)
        if self.groups.is_last_stage:
            return signals
        nothing = torch.empty(0, device=self.groups.device)
        return [HiddenSignal(nothing, nothing)] * len(micro_batches)
