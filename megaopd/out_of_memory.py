"""What a run says when memory is not enough: in which phase, for how much, and what would help.

The advice is the plan's: its bytes of that phase, with and without a change of the configuration.
They are bytes of GPUs; on a CPU, where some operations keep more, the changes help alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from megaopd.config import Config, ParallelConfig, validate
from megaopd.errors import ConfigError, EnvironmentFault
from megaopd.models.arch import ModelArch
from megaopd.plan.memory import CHUNK_TOKENS, PHASES, plan_memory
from megaopd.plan.workload import Workload

# Changes that are named, and the share of the phase's bytes that one saves at least.
MOST_ADVICE, LEAST_SAVING = 3, 0.02
# A phase of the trainer -> those of the plan that it has.
_PLANNED = {
    "rollout": ("rollout",),
    "teacher": ("teacher",),
    "student": ("student", "optimizer"),
    "credit": ("student",),
    "weight_sync": ("optimizer",),
    "eval": ("rollout", "teacher"),
}
# A teacher whose weights are its own and lie on the ranks of the run.
_OWN_WEIGHTS = ("checkpoint", "self", "ema")

_MESSAGE = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory"
    r"|unable to allocate|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_SIZE = r"(\d+(?:\.\d+)?) (bytes|[KMGTPE]?i?B)"
_TRIED = re.compile(rf"allocate {_SIZE}")
_TOTAL = re.compile(rf"total capacity of {_SIZE}|{_SIZE} total capacity")
_RESERVED = re.compile(rf"{_SIZE} is reserved by PyTorch but unallocated")
_UNITS = {"bytes": 0, "B": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


class OutOfMemory:
    """Turns the errors of what has no memory left into one line.

    Args:
        config: the run.
        student, teacher: the architectures (a teacher made of the student has the student's).
        world_size, rank: of the run.
    """

    def __init__(
        self, config: Config, student: ModelArch, teacher: ModelArch, world_size: int, rank: int = 0
    ) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        self.world_size, self.rank = world_size, rank

    @contextmanager
    def watch(self, phase: str, step: int) -> Iterator[None]:
        """A phase of a step; step 0 is before the first.

        Raises:
            EnvironmentFault: memory was not enough in it, on this rank; others may know nothing.
        """
        try:
            yield
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            where = f"phase {phase} of step {step}" if step else f"phase {phase}"
            if self.world_size > 1:
                where += f" on rank {self.rank}"
            found = f"out of memory{_amounts(str(error))}"
            raise EnvironmentFault(where, found, self._advice(phase, str(error))) from error

    def _advice(self, phase: str, message: str) -> str:
        try:
            found = self.advice(phase)
        except (RuntimeError, MemoryError, ConfigError):
            found = ""  # nothing is left to think with
        found = found or "lower train.max_tokens_per_micro_batch, or use more devices"
        reserved, tried = _bytes(_RESERVED, message), _bytes(_TRIED, message)
        if reserved is not None and tried is not None and reserved >= tried:
            # Enough is there, in pieces.
            found = f"set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or: {found}"
        return found

    def advice(self, phase: str) -> str:
        """What the plan says of a phase, and the first changes that make it less; empty where it
        knows none."""
        phases = _PLANNED.get(phase, PHASES)
        now = self._peak(self.config, phases)
        found = []
        for words, config in self._changes():
            try:
                validate(config, self.world_size, self.student, self.teacher)
            except ConfigError:
                continue
            peak = self._peak(config, phases)
            if peak <= now * (1 - LEAST_SAVING):
                found.append(f"{words} makes it {_size(peak)}")
            if len(found) == MOST_ADVICE:
                break
        if not found:
            return ""
        return f"megaopd.plan counts {_size(now)} in this phase: {', '.join(found)}"

    def _peak(self, config: Config, phases: tuple[str, ...]) -> int:
        work = Workload.of(config, self.student, self.teacher, self.world_size)
        return max(rank.total(phase) for rank in plan_memory(work) for phase in phases)

    def _changes(self) -> Iterator[tuple[str, Config]]:
        """Changes of the configuration, in words and applied: first what costs least."""
        c = self.config
        for section, change, value in self._values():
            name, *inner = change.split(".")
            part: Any = getattr(c, section)
            own: Any = value
            for field in inner:  # a key of a section's section
                own = replace(getattr(part, name) or c.parallel, **{field: value})
            words = f"{section}.{change}={str(value).lower()}"
            yield words, replace(c, **{section: replace(part, **{name: own})})

    def _values(self) -> Iterator[tuple[str, str, Any]]:
        c = self.config
        own_teacher = c.teacher.kind in _OWN_WEIGHTS
        teacher_parallel = c.teacher.parallel or c.parallel
        longest = c.data.max_prompt_tokens + c.rollout.max_new_tokens
        if (budget := c.train.max_tokens_per_micro_batch) is not None:
            half = max(_padded(longest, c.parallel), budget // 2)
            if half < budget:
                yield "train", "max_tokens_per_micro_batch", half
        elif c.train.micro_batch_size > 1:
            yield "train", "micro_batch_size", 1
        if own_teacher:
            whole = c.train.micro_batch_size * longest
            of_teacher = c.teacher.max_tokens_per_micro_batch or budget or whole
            half = max(_padded(longest, teacher_parallel), of_teacher // 2)
            if half < of_teacher:
                yield "teacher", "max_tokens_per_micro_batch", half
        if c.train.recompute == "none":
            yield "train", "recompute", "selective"
        if c.train.recompute != "full":
            yield "train", "recompute", "full"
        if not c.train.offload:
            yield "train", "offload", True
        if own_teacher and not c.teacher.offload:
            yield "teacher", "offload", True
        if c.rollout.kind == "embedded" and c.rollout.batch_size > 1:
            yield "rollout", "batch_size", c.rollout.batch_size // 2
        chunk = c.loss.chunk_tokens or CHUNK_TOKENS
        if chunk > 256:
            yield "loss", "chunk_tokens", chunk // 2
        yield "parallel", "tensor", 2 * c.parallel.tensor
        if c.teacher.kind == "checkpoint":  # others have the student's layout
            yield "teacher", "parallel.tensor", 2 * teacher_parallel.tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory of a device or of the host is not enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_MESSAGE.search(str(error)))


def _padded(tokens: int, parallel: ParallelConfig) -> int:
    """Tokens of a sequence as context parallelism cuts it."""
    pieces = 2 * parallel.context if parallel.context > 1 else 1
    return -(-tokens // pieces) * pieces


def _amounts(message: str) -> str:
    """What was asked for and what there is, as far as the error tells."""
    tried, total = _bytes(_TRIED, message), _bytes(_TOTAL, message)
    if tried is None:
        return ""
    return f" (tried to allocate {_size(tried)}{'' if total is None else f' of {_size(total)}'})"


def _bytes(pattern: re.Pattern[str], message: str) -> int | None:
    match = pattern.search(message)
    if match is None:
        return None
    value, unit = [group for group in match.groups() if group]
    return round(float(value) * 1024 ** _UNITS[unit if unit in _UNITS else unit[0]])


def _size(num_bytes: float) -> str:
    for unit, power in (("TiB", 40), ("GiB", 30)):
        if num_bytes >= 0.1 * 2**power and not (unit == "TiB" and num_bytes < 2**power):
            return f"{num_bytes / 2**power:.1f} {unit}"
    return f"{num_bytes / 2**20:.1f} MiB"
