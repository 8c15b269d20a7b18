"""Process groups of layouts. The only importer of Megatron's `parallel_state`.

Student and teacher each have their own layout over the same ranks. Megatron takes the groups of a
layout as an explicit `ProcessGroupCollection` nearly everywhere; what is left reads the globals of
`parallel_state`, which hold one layout at a time. So every layout keeps both: its collection, and
its values of those globals, which `ParallelGroups.active()` puts in place for the time of a call.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megaopd.config import ParallelConfig
from megaopd.parallel.layout import Layout, Place

_Globals = dict[str, Any]

# All process groups that `parallel_state` created for the layout of which this rank is a member.
_CREATED = "_global_process_group_list"
# Scratch memory that grows to the largest request; one is enough for all layouts.
_SCRATCH = "_GLOBAL_MEMORY_BUFFER"


def _globals() -> _Globals:
    """The state of `parallel_state`: what it keeps in its module-level variables."""
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name == _CREATED or (name.startswith("_") and name.isupper())
    }


def _set_globals(state: _Globals) -> None:
    vars(parallel_state).update(state)


# Before any layout. Empty containers among them are filled in place, so they are copied.
_PRISTINE = _globals()


def _pristine() -> _Globals:
    return {name: copy.copy(value) for name, value in _PRISTINE.items()}


@dataclass(frozen=True, eq=False)
class ParallelGroups:
    """A layout in place: the groups of this rank, as Megatron takes them, and its place in them.

    Attributes:
        parallel: the layout's sizes.
        layout: the same as arithmetic over all ranks.
        collection: Megatron's collection, passed explicitly to model, DDP, optimizer, schedule and
            finalisation.
        device: this rank's device.
    """

    parallel: ParallelConfig
    layout: Layout
    collection: ProcessGroupCollection
    device: torch.device
    _state: _Globals = field(repr=False)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes this the layout that Megatron's globals speak of, until the block ends."""
        before = _globals()
        _set_globals(self._state)
        try:
            yield
        finally:
            _set_globals(before)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def place(self) -> Place:
        """Which share of the global batch this rank computes."""
        return self.layout.place(self.rank)

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def cp(self) -> dist.ProcessGroup:
        return self.collection.cp

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.collection.dp

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        """The ranks that hold the same weights: data- and context-parallel."""
        return self.collection.dp_cp

    @property
    def ep(self) -> dist.ProcessGroup:
        return self.collection.ep

    @property
    def expt_tp(self) -> dist.ProcessGroup:
        """The tensor-parallel group inside an expert."""
        return self.collection.expt_tp

    @property
    def expt_dp(self) -> dist.ProcessGroup:
        """The ranks that hold the same experts' weights."""
        return self.collection.expt_dp

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first pipeline stage (its first chunk: the embedding)."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage (its last chunk: the head)."""
        return self.pp.rank() == self.pp.size() - 1


_layouts: dict[ParallelConfig, ParallelGroups] = {}


def initialize(parallel: ParallelConfig, device: torch.device, seed: int) -> ParallelGroups:
    """Builds the groups of `parallel` over the whole world; collective, once per layout.

    Called again with an equal layout it returns the same groups. The first layout of the process
    stays active; others are so inside `ParallelGroups.active()`.

    Args:
        parallel: sizes; tensor x context x pipeline divides the world.
        seed: of Megatron's generators.
    """
    if parallel in _layouts:
        return _layouts[parallel]
    before = _globals() if _layouts else None
    _set_globals(_pristine())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if before is not None:
        _set_globals({_SCRATCH: before[_SCRATCH]})
    groups = ParallelGroups(
        parallel,
        Layout(parallel, dist.get_world_size()),
        ProcessGroupCollection.use_mpu_process_groups(),
        device,
        _globals(),
    )
    _layouts[parallel] = groups
    if before is not None:
        _set_globals(before)
    return groups


def release() -> None:
    """Leaves the groups of all layouts, on every rank alike; the world's group stays."""
    for groups in _layouts.values():
        for group in groups._state[_CREATED]:
            if group is not None:  # None stands for the world
                dist.destroy_process_group(group)
    _layouts.clear()
    parallel_state.destroy_model_parallel()  # whatever it keeps besides its variables
    _set_globals(_pristine())


def shutdown() -> None:
    """Leaves all process groups; called at the end of a run."""
    release()
    dist.destroy_process_group()
