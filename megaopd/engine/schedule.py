"""Runs micro-batches through a model under Megatron's own schedule: unpipelined, 1F1B, or
interleaved over virtual stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor

from megaopd.batch import PackedBatch
from megaopd.parallel.groups import ParallelGroups

# (micro-batch index, micro-batch, hidden states of the last stage) -> what Megatron's schedule
# wants of a loss function: (loss sum, number of tokens, what to collect).
LossFunction = Callable[[int, PackedBatch, Tensor], tuple[Tensor, Tensor, Any]]


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[PackedBatch],
    groups: ParallelGroups,
    loss: LossFunction,
) -> list[Any]:
    """Forward and backward over all micro-batches; gradients are summed and synchronised.

    Args:
        chunks: this rank's chunks of the model, one per virtual stage.
        micro_batches: as many on every rank; a multiple of the pipeline size where there are
            virtual stages.

    Returns:
        What `loss` collected, in order, on the last pipeline stage; an empty list elsewhere.
    """
    return _run(chunks, micro_batches, groups, loss, forward_only=False)


@torch.no_grad()
def forward_only(
    chunks: Sequence[torch.nn.Module],
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

    return _run(chunks, micro_batches, groups, loss, forward_only=True)


def _run(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[PackedBatch],
    groups: ParallelGroups,
    loss: LossFunction,
    forward_only: bool,
) -> list[Any]:
    if not micro_batches:
        return []
    # Interleaved stages send and receive at once and so must know the shapes beforehand.
    longest = max(batch.tokens_T.numel() for batch in micro_batches)
    length = longest if len(chunks) > 1 else None

    def forward_step(
        iterator: Iterator[tuple[int, PackedBatch]], chunk: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        index, batch = next(iterator)
        batch = batch.to(groups.device)
        computed = batch if length is None else _padded(batch, length, groups.cp.size())
        num_tokens = batch.tokens_T.numel()
        return chunk(computed), lambda hidden: loss(index, batch, hidden[:num_tokens])

    config = get_model_config(chunks[0])
    pipelined = groups.pp.size() > 1
    run = get_forward_backward_func(groups.pp.size(), len(chunks) if len(chunks) > 1 else None)
    with groups.active():
        collected = run(
            forward_step_func=forward_step,
            # Every chunk goes through the micro-batches by itself.
            data_iterator=[iter(enumerate(micro_batches)) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            # Of all ranks of the context-parallel group together. Without virtual stages lengths
            # vary, and the stages tell each other the shape of what they send.
            seq_length=longest * groups.cp.size(),
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(groups.collection.pp, config) if pipelined else None,
            pg_collection=groups.collection,
        )
    return collected if groups.is_last_stage else []


def _padded(batch: PackedBatch, length: int, cp_size: int) -> PackedBatch:
    """The micro-batch as the model computes it with `length` tokens on this rank: what is added is
    one more sequence, of zeros, which no real sequence attends to."""
    missing = length - batch.tokens_T.numel()
    if missing == 0:
        return batch
    end = batch.cu_seqlens[-1:] + missing * cp_size
    return replace(
        batch,
        tokens_T=F.pad(batch.tokens_T, (0, missing)),
        positions_T=F.pad(batch.positions_T, (0, missing)),
        cu_seqlens=torch.cat((batch.cu_seqlens, end)),
    )
