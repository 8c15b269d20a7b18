"""The student of a run and its teachers: the part of `megaopd.train` that knows their classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from megaopd.config import Config, TeacherConfig
from megaopd.inputs import Inputs, routed_teachers

if TYPE_CHECKING:
    from megaopd.data.packing import Batching, Side
    from megaopd.engine.student import MegatronStudent
    from megaopd.models.arch import ModelArch
    from megaopd.parallel.groups import ParallelGroups
    from megaopd.protocols import Teacher
    from megaopd.teacher.head import HeadSlot


def _batching(
    config: Config, groups: ParallelGroups, arch: ModelArch, max_tokens: int | None, side: Side
) -> Batching:
    """How a model's ranks share out and pack the samples of a step."""
    from megaopd.data.packing import Batching, CostModel, Packing

    packing = Packing(config.train.micro_batch_size, max_tokens, groups.parallel.tensor)
    return Batching(groups.layout, packing, side, CostModel.of(arch))


@dataclass(frozen=True)
class StudentSide:
    """What a teacher must know of the student.

    Attributes:
        groups: of its layout.
        batching: who computes which tokens.
        vocab_rows: padded rows of its head over all tensor-parallel ranks.
        model: the student itself, which is built when it is first asked for; collective. Teachers
            with weights of their own are built before it.
    """

    groups: ParallelGroups
    batching: Batching
    vocab_rows: int
    model: Callable[[], MegatronStudent]


def student_side(config: Config, inputs: Inputs, groups: ParallelGroups) -> StudentSide:
    """The student of a run, in the layout of `groups`."""
    from megaopd.engine.student import MegatronStudent
    from megaopd.models.mapping import padded_vocab_size

    arch = inputs.student_arch
    rows = padded_vocab_size(arch.vocab_size, config.parallel.tensor)
    return StudentSide(
        groups,
        _batching(config, groups, arch, config.train.max_tokens_per_micro_batch, "student"),
        rows,
        cache(partial(MegatronStudent, config, arch, groups, rows, inputs.vocab_size)),
    )


def build_teacher(config: Config, inputs: Inputs, student: StudentSide) -> Teacher:
    """The run's one teacher, or all of them behind one; collective."""
    from megaopd.teacher.head import HeadSlot
    from megaopd.teacher.routed import RoutedTeacher

    slot = HeadSlot(student.groups.device)
    teachers = {
        name: TEACHERS[own.kind](name, own, config, inputs, student, slot)
        for name, own in routed_teachers(config).items()
    }
    if len(teachers) == 1:
        return teachers[""]
    return RoutedTeacher(teachers, student.batching, student.groups.rank)


def _checkpoint_teacher(
    name: str,
    own: TeacherConfig,
    config: Config,
    inputs: Inputs,
    student: StudentSide,
    slot: HeadSlot,
) -> Teacher:
    from megaopd.parallel import groups as parallel_groups
    from megaopd.teacher.ema import EMATeacher
    from megaopd.teacher.megatron import MegatronTeacher

    groups = parallel_groups.initialize(
        own.parallel or config.parallel, student.groups.device, config.run.seed
    )
    arch = inputs.teacher_archs[name]
    max_tokens = own.max_tokens_per_micro_batch or config.train.max_tokens_per_micro_batch
    batching = _batching(config, groups, arch, max_tokens, "teacher")
    teacher = EMATeacher if own.kind == "ema" else MegatronTeacher
    return teacher(own, arch, groups, batching, student.batching, student.vocab_rows, name, slot)


def _student_as_teacher(
    name: str,
    own: TeacherConfig,
    config: Config,
    inputs: Inputs,
    student: StudentSide,
    slot: HeadSlot,
) -> Teacher:
    """Starts as the student does: from its directory, in its layout."""
    own = replace(own, path=config.student.path)
    return _checkpoint_teacher(name, own, config, inputs, student, slot)


def _student_without_adapters(
    name: str,
    own: TeacherConfig,
    config: Config,
    inputs: Inputs,
    student: StudentSide,
    slot: HeadSlot,
) -> Teacher:
    from megaopd.teacher.base import BaseTeacher

    arch = inputs.teacher_archs[name]
    max_tokens = own.max_tokens_per_micro_batch or config.train.max_tokens_per_micro_batch
    batching = _batching(config, student.groups, arch, max_tokens, "teacher")
    return BaseTeacher(student.model(), batching, student.batching, name, slot)


def _average_teacher(
    name: str,
    own: TeacherConfig,
    config: Config,
    inputs: Inputs,
    student: StudentSide,
    slot: HeadSlot,
) -> Teacher:
    """Its members score the samples that are routed to it."""
    from megaopd.teacher.average import AverageTeacher

    members = []
    for member in own.members:
        its = config.teachers[member]
        archs = {**inputs.teacher_archs, name: inputs.teacher_archs[member]}
        as_member = replace(inputs, teacher_archs=archs)
        members.append(TEACHERS[its.kind](name, its, config, as_member, student, slot))
    return AverageTeacher(members, own.member_weights or (1.0,) * len(members), slot)


def _server_teacher(
    name: str,
    own: TeacherConfig,
    config: Config,
    inputs: Inputs,
    student: StudentSide,
    slot: HeadSlot,
) -> Teacher:
    from megaopd.teacher.sglang import SGLangTeacher

    groups = student.groups
    return SGLangTeacher(
        own,
        config.rollout.sglang,
        inputs.vocab_size,
        student.batching,
        device=groups.device,
        rank=groups.rank,
        world_size=groups.world_size,
        name=name,
    )


# By teacher.kind: (name, its configuration, the run's, inputs, the student's side, room for a head)
# -> the teacher of the samples whose Prompt.teacher is that name. Collective.
TEACHERS: dict[
    str, Callable[[str, TeacherConfig, Config, Inputs, StudentSide, HeadSlot], Teacher]
] = {
    "checkpoint": _checkpoint_teacher,
    "self": _student_as_teacher,
    "base": _student_without_adapters,
    "ema": _student_as_teacher,
    "sglang": _server_teacher,
    "average": _average_teacher,
}
