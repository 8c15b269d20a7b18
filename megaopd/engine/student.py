"""The student: a Megatron model in training, its optimizer, and its weights for others to take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from megaopd.batch import HiddenSignal, PackedBatch
from megaopd.config import Config, LossConfig
from megaopd.engine import schedule
from megaopd.engine.optimizer import build_optimizer, build_scheduler
from megaopd.losses.objective import DivergenceObjective, ObjectiveOutput
from megaopd.models import weights
from megaopd.models.arch import ModelArch
from megaopd.models.build import build_model
from megaopd.parallel.groups import ParallelGroups
from megaopd.protocols import StepResult


class MegatronStudent:
    """Implements `megaopd.protocols.Student`.

    Args:
        config: the run.
        arch: the student's architecture.
        groups: its process groups.
        vocab_rows: padded rows of embedding and head over all tensor-parallel ranks.
        vocab_size: true vocabulary size, shared with the teacher.
    """

    def __init__(
        self,
        config: Config,
        arch: ModelArch,
        groups: ParallelGroups,
        vocab_rows: int,
        vocab_size: int,
    ) -> None:
        self.arch, self.groups = arch, groups
        self.frozen = config.student.freeze
        model = build_model(arch, config.parallel, groups, config.student.dtype, vocab_rows)
        weights.load_weights(model, arch, config.student.path)
        weights.freeze(model, arch, self.frozen)
        self.model = model
        self.ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=False,
                # A non-finite gradient is agreed on and skipped here, not raised there.
                check_for_nan_in_grad=False,
            ),
            model,
        )
        self.optimizer = build_optimizer(config.optimizer, config.student.dtype, self.ddp, groups)
        self.scheduler = build_scheduler(config.optimizer, self.optimizer, config.train.num_steps)
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss

        temperature = config.rollout.temperature or 1.0
        self.objective = DivergenceObjective(config.loss, vocab_size, temperature, groups.tp)
        # The yardstick of evaluation is the same for every training loss.
        self.reverse_kl = DivergenceObjective(
            LossConfig(
                kind="reverse_kl",
                chunk_tokens=config.loss.chunk_tokens,
                backend=config.loss.backend,
            ),
            vocab_size,
            temperature,
            groups.tp,
        )

    def train_step(
        self, micro_batches: Sequence[PackedBatch], signals: Sequence[HiddenSignal]
    ) -> StepResult:
        """One optimizer step on the global batch; skipped where a loss or gradient is not
        finite."""
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss(
            index: int, batch: PackedBatch, hidden: Tensor
        ) -> tuple[Tensor, Tensor, ObjectiveOutput]:
            out = self.objective(hidden, self.model.head, batch, signals[index])
            return out.loss_sum, out.num_tokens, _detached(out)

        outputs = schedule.forward_backward(self.ddp, micro_batches, self.groups, loss)
        metrics, num_tokens, bad_ids = self._reduce(outputs, micro_batches)

        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        skipped = bool(bad_ids) or not self._all_agree(math.isfinite(grad_norm))
        if not skipped:
            self.scheduler.step(1)
            self.optimizer.step()
        metrics["train/grad_norm"] = grad_norm
        metrics["train/lr"] = float(self.optimizer.param_groups[0]["lr"])
        return StepResult(metrics, num_tokens, skipped, bad_ids)

    def evaluate(
        self, micro_batches: Sequence[PackedBatch], signals: Sequence[HiddenSignal]
    ) -> StepResult:
        """Reverse KL and entropies on samples, without a gradient or an update."""
        self.ddp.eval()

        def collect(index: int, batch: PackedBatch, hidden: Tensor) -> ObjectiveOutput:
            return self.reverse_kl(hidden, self.model.head.detach(), batch, signals[index])

        outputs = schedule.forward_only(self.ddp, micro_batches, self.groups, collect)
        metrics, num_tokens, bad_ids = self._reduce(outputs, micro_batches)
        return StepResult(metrics, num_tokens, False, bad_ids)

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yields (Hugging Face name, full tensor) on every rank, one parameter at a time."""
        frozen = self.frozen if only_trainable else ()
        return weights.export_weights(self.model, self.arch, self.groups, frozen)

    def _all_agree(self, ok: bool) -> bool:
        flag = torch.tensor(float(ok), device=self.groups.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def _reduce(
        self, outputs: list[ObjectiveOutput], micro_batches: Sequence[PackedBatch]
    ) -> tuple[dict[str, float], int, tuple[str, ...]]:
        """Sums the micro-batches over the data-parallel ranks; every rank gets the same answer.

        Returns:
            (metric means over the loss tokens, number of loss tokens, ids of non-finite samples).
        """
        mine: dict[str, Any] | None = None
        if self.groups.is_last_stage and self.groups.tp.rank() == 0:
            bad = [
                sample_id
                for out, batch in zip(outputs, micro_batches, strict=True)
                if not math.isfinite(float(out.loss_sum))
                for sample_id in batch.sample_ids
            ]
            names = sorted({name for out in outputs for name in out.sums})
            mine = {
                "sums": {n: sum(float(out.sums[n].double()) for out in outputs) for n in names},
                "num_tokens": sum(int(out.num_tokens) for out in outputs),
                "num_scored": sum(int(out.num_scored) for out in outputs),
                "mismatch_max": max((float(out.mismatch_max) for out in outputs), default=0.0),
                "bad": bad,
            }
        gathered: list[dict[str, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        parts = [part for part in gathered if part is not None]
        num_tokens = sum(part["num_tokens"] for part in parts)
        num_scored = sum(part["num_scored"] for part in parts)
        metrics: dict[str, float] = {}
        for part in parts:
            for name, value in part["sums"].items():
                metrics[name] = metrics.get(name, 0.0) + value / max(num_scored, 1)
        metrics["rollout/mismatch_max"] = max(part["mismatch_max"] for part in parts)
        bad_ids = tuple(sample_id for part in parts for sample_id in part["bad"])
        return metrics, num_tokens, bad_ids


def _detached(out: ObjectiveOutput) -> ObjectiveOutput:
    """The output without its graph, so that nothing outlives its micro-batch's backward."""
    return replace(out, loss_sum=out.loss_sum.detach())
