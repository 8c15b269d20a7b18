"""Runs micro-batches through a model under Megatron's own schedule (pipelined or not)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megaopd.batch import PackedBatch
from megaopd.parallel.groups import ParallelGroups

# (micro-batch index, micro-batch, hidden states of the last stage) -> what Megatron's schedule
# wants of a loss function: (loss sum, number of tokens, what to collect).
LossFunction = Callable[[int, PackedBatch, Tensor], tuple[Tensor, Tensor, Any]]


def forward_backward(
    model: torch.nn.Module,
    micro_batches: Sequence[PackedBatch],
    groups: ParallelGroups,
    loss: LossFunction,
) -> list[Any]:
    """Forward and backward over all micro-batches; gradients are summed and synchronised.

    Returns:
        What `loss` collected, in order, on the last pipeline stage; an empty list elsewhere.
    """
    return _run(model, micro_batches, groups, loss, forward_only=False)


@torch.no_grad()
def forward_only(
    model: torch.nn.Module,
    micro_batches: Sequence[PackedBatch],
    groups: ParallelGroups,
    collect: Callable[[int, PackedBatch, Tensor], Any],
) -> list[Any]:
    """Forward over all micro-batches without a gradient.

    Returns:
        What `collect` returned, in order, on the last pipeline stage; an empty list elsewhere.
    """

    def loss(index: int, batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
        nothing = torch.zeros((), device=groups.device)
        return nothing, nothing.int(), collect(index, batch, hidden)

    return _run(model, micro_batches, groups, loss, forward_only=True)


def _run(
    model: torch.nn.Module,
    micro_batches: Sequence[PackedBatch],
    groups: ParallelGroups,
    loss: LossFunction,
    forward_only: bool,
) -> list[Any]:
    if not micro_batches:
        return []

    def forward_step(
        iterator: Iterator[tuple[int, PackedBatch]], stage: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        index, batch = next(iterator)
        batch = batch.to(groups.device)
        return stage(batch), lambda hidden: loss(index, batch, hidden)

    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(micro_batches)),
        model=[model],
        num_microbatches=len(micro_batches),
        # Lengths vary: the stages tell each other the shape of what they send.
        seq_length=int(micro_batches[0].tokens_T.numel()),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return collected if groups.is_last_stage else []
