"""The layouts of student and teacher that fit, best first by the cost model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megaopd.config import ParallelConfig
from megaopd.errors import ConfigError
from megaopd.models.arch import ModelArch
from megaopd.plan.cost import (
    hand_over_seconds,
    offload_seconds,
    student_seconds,
    teacher_seconds,
)
from megaopd.plan.machine import Machine
from megaopd.plan.memory import plan_memory
from megaopd.plan.parameters import check_layout
from megaopd.plan.workload import Recompute, Workload

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
VIRTUAL = (1, 2, 4)
# Student layouts with their recomputation, and teacher layouts, that are paired.
NUM_CANDIDATES = 24
# Seconds, layout, and the student's recomputation.
_StudentSide = tuple[float, ParallelConfig, Recompute]
_TeacherSide = tuple[float, ParallelConfig]


@dataclass(frozen=True)
class Candidate:
    """A pair of layouts that fits.

    Attributes:
        seconds: of a step, by the cost model.
        peak: bytes of the fullest rank in its worst phase.
        host: bytes of pinned host memory of the fullest node.
    """

    student: ParallelConfig
    teacher: ParallelConfig
    recompute: Recompute
    teacher_offload: bool
    train_offload: bool
    seconds: float
    peak: int
    worst_phase: str
    host: int


def layouts(
    arch: ModelArch, world_size: int, gpus_per_node: int, train: bool
) -> Iterator[ParallelConfig]:
    """Every even layout of a model; tensor and expert-tensor parallelism stay inside a node.

    Sequence parallelism goes with tensor parallelism. Virtual stages are for training alone: a
    forward pass has no warm-up of theirs to shorten.
    """
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    inside = [n for n in sizes if n <= gpus_per_node]
    experts = sizes if arch.moe else [1]
    for tp, pp, cp, ep in itertools.product(inside, sizes, sizes, experts):
        if tp * pp * cp > world_size:
            continue
        for etp, v in itertools.product({1, tp} if arch.moe else {None}, VIRTUAL):
            if v > 1 and not (train and pp > 1):
                continue
            layout = ParallelConfig(
                tensor=tp,
                pipeline=pp,
                virtual_pipeline=v,
                context=cp,
                expert=ep,
                expert_tensor=etp,
                sequence_parallel=tp > 1,
            )
            role = "student" if train else "teacher"
            try:
                check_layout(arch, layout, world_size, "parallel", role)
            except ConfigError:
                continue
            yield layout


def fitting_layouts(work: Workload, machine: Machine, top: int) -> list[Candidate]:
    """The `top` fastest pairs that fit, each with the recomputation and offload that cost least.

    The time of a pair is a sum of terms of either side, so both sides are ranked by themselves
    first, without what cannot fit even alone. A teacher made of the student has its layout.
    """
    teacher_now = work.teacher_parallel
    students = []
    for layout in layouts(work.student, work.world_size, machine.gpus_per_node, True):
        if work.dp_size(layout) > work.num_samples:
            continue
        for recompute in RECOMPUTE:
            alone = work.with_choice(layout, layout, recompute, True, True)
            forward_backward, _, optimizer = student_seconds(alone, machine)
            students.append((forward_backward + optimizer, layout, recompute))
    teachers = []
    for layout in layouts(work.teacher, work.world_size, machine.gpus_per_node, False):
        if work.dp_size(layout) <= work.num_samples:
            teachers.append((_teacher_in(layout, work, machine), layout))
    students.sort(key=lambda entry: entry[0])
    teachers.sort(key=lambda entry: entry[0])
    sides: Iterable[tuple[_StudentSide, _TeacherSide]]
    if work.config.teacher.kind == "checkpoint":
        students = _fitting_students(work, machine, students, teacher_now)
        sides = itertools.product(students, _fitting_teachers(work, machine, teachers, students))
    else:
        sides = [
            (entry, (_teacher_in(entry[1], work, machine), entry[1]))
            for entry in _fitting_students(work, machine, students, None)
        ]

    pairs = []
    for (s_time, s, recompute), (t_time, t) in sides:
        moved = hand_over_seconds(work.with_choice(s, t, recompute, False, False), machine)
        for teacher_offload, train_offload in itertools.product((False, True), repeat=2):
            choice = work.with_choice(s, t, recompute, teacher_offload, train_offload)
            extra = moved + offload_seconds(choice, machine)
            pairs.append((s_time + t_time + extra, choice))
    pairs.sort(key=lambda pair: pair[0])
    found: dict[tuple[ParallelConfig, ParallelConfig], Candidate] = {}
    for seconds, choice in pairs:
        key = (choice.student_parallel, choice.teacher_parallel)
        if key in found:
            continue
        candidate = _candidate(choice, machine, seconds)
        if candidate.peak <= machine.usable_memory:
            found[key] = candidate
            if len(found) == top:
                break
    return list(found.values())


def _teacher_in(layout: ParallelConfig, work: Workload, machine: Machine) -> float:
    """Seconds of the teacher's forward pass in a layout, whatever the student's."""
    recompute = work.config.train.recompute
    alone = work.with_choice(work.student_parallel, layout, recompute, True, True)
    return teacher_seconds(alone, machine)[0]


def _fitting_students(
    work: Workload,
    machine: Machine,
    students: list[_StudentSide],
    teacher: ParallelConfig | None,
) -> list[_StudentSide]:
    """The fastest whose own phases fit with the teacher's weights away; None is a teacher in the
    student's layout."""
    kept = []
    for entry in students:
        choice = work.with_choice(entry[1], teacher or entry[1], entry[2], True, True)
        ranks = plan_memory(choice)
        if max(max(r.total("student"), r.total("optimizer")) for r in ranks) <= (
            machine.usable_memory
        ):
            kept.append(entry)
            if len(kept) == NUM_CANDIDATES:
                break
    return kept


def _fitting_teachers(
    work: Workload,
    machine: Machine,
    teachers: list[_TeacherSide],
    students: list[_StudentSide],
) -> list[_TeacherSide]:
    """The fastest whose own phase fits beside the leanest student's weights."""
    if not students:
        return []
    leanest = max(students, key=lambda entry: entry[1].tensor * entry[1].pipeline)
    kept = []
    for entry in teachers:
        choice = work.with_choice(leanest[1], entry[1], leanest[2], True, True)
        if max(r.total("teacher") for r in plan_memory(choice)) <= machine.usable_memory:
            kept.append(entry)
            if len(kept) == NUM_CANDIDATES:
                break
    return kept


def _candidate(choice: Workload, machine: Machine, seconds: float) -> Candidate:
    ranks = plan_memory(choice)
    fullest = max(ranks, key=lambda r: r.peak)
    config = choice.config
    return Candidate(
        student=choice.student_parallel,
        teacher=choice.teacher_parallel,
        recompute=config.train.recompute,
        teacher_offload=config.teacher.offload,
        train_offload=config.train.offload,
        seconds=seconds,
        peak=fullest.peak,
        worst_phase=fullest.worst_phase,
        host=max(sum(r.host.values()) for r in ranks) * machine.gpus_per_node,
    )
