"""The student: a Megatron model in training, its optimizer, and its weights for others to take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from megaopd.batch import PackedBatch, TeacherSignal, TokenScores
from megaopd.checkpoint.loading import load_model
from megaopd.checkpoint.pieces import Piece, StoredPieces
from megaopd.checkpoint.saving import save_model
from megaopd.checkpoint.training_state import ModelState
from megaopd.config import Config, LossConfig
from megaopd.engine import schedule
from megaopd.engine.offload import (
    HostOffload,
    gradients,
    optimizer_tensors,
    parameters,
)
from megaopd.engine.optimizer import build_optimizer, build_scheduler
from megaopd.losses.objective import METRICS, YARDSTICKS, Objective, ObjectiveOutput
from megaopd.losses.scores import NUM_SCORES
from megaopd.models import lora, weights
from megaopd.models.arch import ModelArch
from megaopd.models.build import HiddenGPTModel, build_model
from megaopd.models.lora_spec import adapter_specs
from megaopd.models.moe import weigh_aux_loss
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
        self.frozen, self.lora = config.student.freeze, config.student.lora
        self.router_aux_loss_coef = config.student.router_aux_loss_coef
        self.chunks = build_model(
            arch,
            groups.parallel,
            groups,
            config.student.dtype,
            vocab_rows,
            recompute=config.train.recompute,
            router_aux_loss_coef=config.student.router_aux_loss_coef,
        )
        load_model(self.chunks, arch, config.student.path)
        weights.freeze(self.chunks, arch, self.frozen)
        if self.lora is not None:
            lora.add_adapters(self.chunks, arch, groups, self.lora, config.run.seed)
        self.ddp = _data_parallel(self.chunks, groups)
        self.optimizer = build_optimizer(config.optimizer, config.student.dtype, self.ddp, groups)
        self.scheduler = build_scheduler(config.optimizer, self.optimizer, config.train.num_steps)
        model_config = self.chunks[0].config  # all chunks' one
        model_config.finalize_model_grads_func = finalize_model_grads
        model_config.grad_scale_func = self.optimizer.scale_loss
        offload = config.train.offload
        self.weights = HostOffload(
            groups.device, moved=lambda: parameters(self.chunks), enabled=offload
        )
        self.weights.guard(self.chunks)
        self.training_state = HostOffload(
            groups.device,
            moved=lambda: optimizer_tensors(self.optimizer, self.chunks),
            dropped=lambda: gradients(self.ddp),
            enabled=offload,
        )
        self.training_state.to_host()

        temperature = config.rollout.temperature or 1.0
        self.objective = Objective(config.loss, vocab_size, temperature, groups.tp, groups.cp)
        # The yardstick of evaluation is the same for every training loss. An estimate from sampled
        # tokens is corrected for the sampler's temperature, without a cap.
        self.reverse_kl = Objective(
            LossConfig(
                kind="reverse_kl",
                importance="truncated",
                importance_cap=math.inf,
                chunk_tokens=config.loss.chunk_tokens,
                backend=config.loss.backend,
            ),
            vocab_size,
            temperature,
            groups.tp,
        )

    @property
    def head(self) -> Tensor:
        """This rank's rows of the LM head; last stage only."""
        return self.chunks[-1].head

    def train_step(
        self,
        micro_batches: Sequence[PackedBatch],
        signals: Sequence[TeacherSignal],
        step: int = 1,
    ) -> StepResult:
        """One optimizer step on the global batch, with the loss of that step; skipped where a loss
        or gradient is not finite."""
        self.objective.start_step(step)
        with self.training_state.on_device():
            return self._train_step(micro_batches, signals)

    def _train_step(
        self, micro_batches: Sequence[PackedBatch], signals: Sequence[TeacherSignal]
    ) -> StepResult:
        for chunk in self.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.router_aux_loss_coef > 0:
            weigh_aux_loss(self.chunks, self.router_aux_loss_coef, micro_batches, self.groups)

        def loss(
            index: int, batch: PackedBatch, hidden: Tensor
        ) -> tuple[Tensor, Tensor, ObjectiveOutput]:
            out = self.objective(hidden, self.head, batch, signals[index] if signals else None)
            return out.loss_sum, out.num_tokens, _detached(out)

        outputs = schedule.forward_backward(self.ddp, micro_batches, self.groups, loss)
        metrics, num_tokens, bad_ids = self._reduce(outputs, micro_batches)

        with self.groups.active():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())  # of all ranks' parameters
            skipped = bool(bad_ids) or not self._all_agree(math.isfinite(grad_norm))
            if not skipped:
                self.scheduler.step(1)
                self.optimizer.step()
        metrics["train/grad_norm"] = grad_norm
        metrics["train/lr"] = float(self.optimizer.param_groups[0]["lr"])
        return StepResult(metrics, num_tokens, skipped, bad_ids)

    def score(
        self,
        micro_batches: Sequence[PackedBatch],
        signals: Sequence[TeacherSignal],
        num_rows: int,
    ) -> TokenScores:
        """What student and teacher say about every response token, without a gradient; one forward
        pass. See `megaopd.protocols.Student`."""
        groups = self.groups
        for chunk in self.ddp:
            chunk.eval()

        def collect(index: int, batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
            found = self.objective.scores(hidden, self.head.detach(), batch, signals[index])
            return batch.rows_T[batch.loss_mask_T], found

        table = torch.zeros(NUM_SCORES, num_rows, device=groups.device)
        for rows, found in schedule.forward_only(self.ddp, micro_batches, groups, collect):
            table[:, rows] = found.float()
        # Each row is one rank's of those that hold different tokens; the last stage alone has any.
        if groups.is_last_stage:
            dist.all_reduce(table, group=groups.dp_cp)
        if groups.pp.size() > 1:
            dist.broadcast(table, group=groups.pp, group_src=groups.pp.size() - 1)
        return TokenScores(*table.cpu().unbind(0))

    def evaluate(
        self, micro_batches: Sequence[PackedBatch], signals: Sequence[TeacherSignal]
    ) -> StepResult:
        """Reverse KL and entropies on samples, without a gradient or an update.

        The reverse KL is `loss/divergence`, and goes by the name that `YARDSTICKS` has for the kind
        of the signals as well.
        """
        for chunk in self.ddp:
            chunk.eval()

        def collect(index: int, batch: PackedBatch, hidden: Tensor) -> ObjectiveOutput:
            signal = signals[index]
            out = self.reverse_kl(hidden, self.head.detach(), batch, signal)
            name = YARDSTICKS[type(signal)]
            return replace(out, sums={**out.sums, name: out.sums["loss/divergence"]})

        outputs = schedule.forward_only(self.ddp, micro_batches, self.groups, collect)
        metrics, num_tokens, bad_ids = self._reduce(outputs, micro_batches)
        return StepResult(metrics, num_tokens, False, bad_ids)

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yields (Hugging Face name, full tensor) on every rank, one parameter at a time; LoRA
        adapters are merged into the weights, of which those with one are the trained ones."""
        frozen = self.frozen if only_trainable else ()
        only = None
        if only_trainable and self.lora is not None:
            only = adapter_specs(self.arch, self.lora).keys()
        with self.weights.on_device():
            yield from weights.export_weights(self.chunks, self.arch, self.groups, frozen, only)

    def export_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (layer.lora_A.weight or layer.lora_B.weight, full tensor) on every rank;
        collective. There is nothing to yield without `student.lora`."""
        if self.lora is not None:
            with self.weights.on_device():
                yield from lora.export_adapter(self.chunks, self.arch, self.groups, self.lora)

    @property
    def num_updates(self) -> int:
        """Optimizer steps that were taken; skipped ones are none."""
        return int(self.scheduler.num_steps)

    def save(self, root: str | Path, source_dir: str | Path) -> Path:
        """Writes the weights as a step of the Megatron checkpoints below `root`; collective.

        The step is `num_updates`; one that is there is replaced. See
        `megaopd.checkpoint.saving.save_model`.
        """
        with self.weights.on_device():
            return save_model(
                *(self.chunks, self.arch, self.groups, root, self.num_updates, source_dir),
                overwrite=True,
            )

    @cached_property
    def _state(self) -> ModelState:
        frozen_base = self.lora is not None
        return ModelState(self.chunks, self.optimizer, self.groups, frozen_base)

    def saved_pieces(self) -> Iterator[Piece]:
        """This rank's share of weights, adapters and optimizer state: of `megaopd.checkpoint`'s
        `StatePart`."""
        with self.weights.on_device(), self.training_state.on_device():
            yield from self._state.saved_pieces()

    def restore(self, stored: StoredPieces, num_updates: int) -> None:
        """Goes on from stored weights and optimizer state, whatever layout stored them."""
        with self.weights.on_device(), self.training_state.on_device():
            self._state.restore(stored, num_updates)
        self.scheduler.num_steps = num_updates
        self.scheduler.step(0)  # sets the rate of that step

    def weight_shards(self) -> Mapping[str, Tensor]:
        """This rank's shards of all weights, frozen ones too, by canonical global name: views, or
        sums where there are LoRA adapters."""
        return weights.MergedShards(self.chunks, self.arch)

    def off_device(self) -> AbstractContextManager[None]:
        """With `train.offload` the weights are in host memory inside the block."""
        return self.weights.off_device()

    def _all_agree(self, ok: bool) -> bool:
        flag = torch.tensor(float(ok), device=self.groups.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def _reduce(
        self, outputs: list[ObjectiveOutput], micro_batches: Sequence[PackedBatch]
    ) -> tuple[dict[str, float], int, tuple[str, ...]]:
        """Sums the micro-batches over the ranks that hold different tokens (data- and
        context-parallel); every rank gets the same answer.

        Two small tensors are reduced on the last stage, which alone has outputs. Names travel only
        to other stages, and sample ids only where a loss is not finite.

        Returns:
            (metric means over the loss tokens, number of loss tokens, ids of non-finite samples).
        """
        groups = self.groups
        answer: list[Any] = [None]
        if groups.is_last_stage:
            answer[0] = _sum_outputs(outputs, micro_batches, groups)
        if groups.pp.size() > 1:
            last = groups.pp.size() - 1
            dist.broadcast_object_list(
                answer, group=groups.pp, group_src=last, device=groups.device
            )
        metrics, num_tokens, bad_ids = answer[0]
        return metrics, num_tokens, bad_ids


def _data_parallel(
    chunks: Sequence[HiddenGPTModel], groups: ParallelGroups
) -> list[DistributedDataParallel]:
    """Every chunk with its gradient buffers, which are summed over the ranks that hold the same
    weights."""
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        # A non-finite gradient is agreed on and skipped by the student, not raised there.
        check_for_nan_in_grad=False,
    )
    with groups.active():
        return [
            DistributedDataParallel(c.config, options, c, pg_collection=groups.collection)
            for c in chunks
        ]


def _sum_outputs(
    outputs: Sequence[ObjectiveOutput],
    micro_batches: Sequence[PackedBatch],
    groups: ParallelGroups,
) -> tuple[dict[str, float], int, tuple[str, ...]]:
    """`MegatronStudent._reduce` on the last stage; collective over the ranks that hold the same
    weights, of which each tensor-parallel rank has its own, equal set."""
    # Kinds of signals differ in what they measure, and no rank knows which kinds others have: each
    # of all names has its sum, its number of tokens, and how many micro-batches have it.
    device, num_names = groups.device, len(METRICS)
    held = torch.tensor([[n in out.sums for n in METRICS] for out in outputs], dtype=torch.float64)
    by_batch = torch.zeros(len(outputs), 2 * num_names + 2, dtype=torch.float64, device=device)
    zero = largest = torch.zeros((), dtype=torch.float64, device=device)
    for row, out in zip(by_batch, outputs, strict=True):
        sums = [out.sums.get(name, zero) for name in METRICS]
        counts = [
            out.counts.get(name, out.num_scored) if name in out.sums else zero for name in METRICS
        ]
        bad = ~torch.isfinite(out.loss_sum)
        row.copy_(torch.stack([x.double() for x in (*sums, *counts, out.num_tokens, bad)]))
        largest = torch.maximum(largest, out.mismatch_max.double())
    total = torch.cat([held.view(-1, num_names).sum(0).to(device), by_batch.sum(0)])
    dist.all_reduce(total, group=groups.dp_cp)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.dp_cp)
    *by_name, num_tokens, num_bad = total.tolist()

    by_kind = (by_name[i * num_names : (i + 1) * num_names] for i in range(3))
    metrics = {
        name: value / max(count, 1)
        for name, holders, value, count in zip(METRICS, *by_kind, strict=True)
        # Tokens of others than the student have no mismatch: without its own there is none.
        if holders and (count or name != "rollout/mismatch_kl" or not num_tokens)
    }
    if "rollout/mismatch_kl" in metrics:
        metrics["rollout/mismatch_max"] = float(largest)
    bad_ids: tuple[str, ...] = ()
    if num_bad:
        mine = [
            sample_id
            for flag, batch in zip(by_batch[:, -1].tolist(), micro_batches, strict=True)
            if flag
            for sample_id in batch.sample_ids
        ]
        parts: list[Any] = [None] * groups.dp_cp.size()
        dist.all_gather_object(parts, mine, group=groups.dp_cp)
        # Context-parallel ranks hold parts of the same samples.
        bad_ids = tuple(dict.fromkeys(sample_id for part in parts for sample_id in part))
    return metrics, int(num_tokens), bad_ids


def _detached(out: ObjectiveOutput) -> ObjectiveOutput:
    """The output without its graph, so that nothing outlives its micro-batch's backward."""
    return replace(out, loss_sum=out.loss_sum.detach())
