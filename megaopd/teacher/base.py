"""A teacher that costs no weights: the student's own without their LoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megaopd.batch import PackedBatch
from megaopd.data.packing import Batching
from megaopd.engine.student import MegatronStudent
from megaopd.models.lora_layers import base_only
from megaopd.teacher.head import HeadSlot, ModelHead
from megaopd.teacher.megatron import MegatronTeacher


class BaseTeacher(MegatronTeacher):
    """A `MegatronTeacher` whose model is the student's, in the student's layout: it scores with the
    adapters left out, which are all that training changes. So it is what the student was before.

    Args:
        model: the student, with adapters.
        batching: how the teacher packs samples.
        student: how the student does.
        name, slot: as of `MegatronTeacher`.
    """

    def __init__(
        self,
        model: MegatronStudent,
        batching: Batching,
        student: Batching,
        name: str = "",
        slot: HeadSlot | None = None,
    ) -> None:
        self.name, self.groups = name, model.groups
        self.batching, self.student = batching, student
        self.hidden_size = model.arch.hidden_size
        self.dtype = model.chunks[0].config.params_dtype
        self.metrics = {}
        self.chunks = model.chunks
        self.slot = slot or HeadSlot(model.groups.device)
        # The head has no adapter: it is one and the same, in the student's partition already.
        weight = model.head if model.groups.is_last_stage else next(model.chunks[0].parameters())
        self.head = ModelHead(weight.detach()[: None if model.groups.is_last_stage else 0])
        self.offload = model.weights

    def _hidden_states(self, micro_batches: Sequence[PackedBatch], num_rows: int) -> Tensor:
        modes = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        try:
            with base_only(self.chunks):
                return super()._hidden_states(micro_batches, num_rows)
        finally:
            for chunk, training in zip(self.chunks, modes, strict=True):
                chunk.train(training)
