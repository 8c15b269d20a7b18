"""Process groups of a layout. The only importer of Megatron's `parallel_state`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megaopd.config import ParallelConfig


@dataclass(frozen=True)
class ParallelGroups:
    """The groups of this rank, as Megatron takes them, and its place in them.

    Attributes:
        collection: Megatron's collection, passed explicitly to model, DDP, schedule and
            finalisation.
        device: this rank's device.
    """

    collection: ProcessGroupCollection
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.collection.dp

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1


def initialize(parallel: ParallelConfig, device: torch.device, seed: int) -> ParallelGroups:
    """Builds the groups of `parallel` over the whole world; collective, once per process."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ParallelGroups(ProcessGroupCollection.use_mpu_process_groups(), device)


def release() -> None:
    """Forgets the groups of the layout; the process group of the world stays."""
    parallel_state.destroy_model_parallel()


def shutdown() -> None:
    """Leaves all process groups; called at the end of a run."""
    release()
    dist.destroy_process_group()
