"""Who looks at a run's phases: deadlines, the status that people see, and memory that is out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megaopd.config import Config

if TYPE_CHECKING:
    from megaopd.inputs import Inputs
    from megaopd.out_of_memory import OutOfMemory
    from megaopd.parallel.groups import ParallelGroups
    from megaopd.run_status import RunStatus
    from megaopd.throughput import Throughput
    from megaopd.watchdog import Watchdog


@dataclass(frozen=True)
class RunWatch:
    """Called with a phase and its step, it gives the block that is watched.

    Attributes:
        throughput: what the devices achieve in a step.
    """

    status: RunStatus
    watchdog: Watchdog
    memory: OutOfMemory
    throughput: Throughput

    @contextmanager
    def __call__(self, phase: str, step: int) -> Iterator[None]:
        self.status.phase(phase, step)
        with self.watchdog.phase(phase, step), self.memory.watch(phase, step):
            yield

    def checkpoint(self, step: int, directory: Path) -> None:
        """A checkpoint is complete."""
        self.status.checkpoint(step, directory)


@contextmanager
def run_watch(
    config: Config, inputs: Inputs, groups: ParallelGroups, done: int
) -> Iterator[RunWatch]:
    """Watches over all that the ranks do together inside the block; collective.

    Args:
        done: steps that are done, of a resumed run.
    """
    from megaopd.credit import CreditAssignment
    from megaopd.out_of_memory import OutOfMemory
    from megaopd.plan.machine import peak_tflops
    from megaopd.run_status import RunStatus
    from megaopd.throughput import Throughput
    from megaopd.watchdog import Watchdog

    rank, size, run_dir = groups.rank, groups.world_size, Path(config.run.dir)
    student, teachers = inputs.student_arch, inputs.teacher_archs
    device = _device_name(groups)
    scores = CreditAssignment(config, lambda samples: ()).needs_scores
    throughput = Throughput(
        *(config, student, teachers, size, peak_tflops(device, config.student.dtype), scores)
    )
    status = RunStatus(
        run_dir, config.train.num_steps, size, device=device, step=done, enabled=rank == 0
    )
    failed = partial(status.state, "failed")
    with status, Watchdog(config.deadline, run_dir, rank, size, on_end=failed) as watchdog:
        memory = OutOfMemory(config, student, teachers[""], size, rank)
        yield RunWatch(status, watchdog, memory, throughput)


def _device_name(groups: ParallelGroups) -> str:
    import torch

    if groups.device.type == "cuda":
        return torch.cuda.get_device_name(groups.device)
    return groups.device.type
