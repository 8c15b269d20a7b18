"""Several teachers, each for the samples that are routed to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megaopd.batch import Sample, TeacherSignal
from megaopd.data.packing import Batching
from megaopd.protocols import Student, Teacher


class RoutedTeacher:
    """A `Teacher` made of several, which take turns in the same order on every rank.

    Args:
        teachers: by the name that `Prompt.teacher` holds; each scores its own samples only.
        student: how the student shares out and packs samples.
        rank: this rank.

    Attributes:
        metrics: sums of the teachers' own, of the last `score`.
    """

    def __init__(self, teachers: Mapping[str, Teacher], student: Batching, rank: int) -> None:
        self.teachers = dict(sorted(teachers.items()))
        self.student, self.rank = student, rank
        self.metrics: dict[str, float] = {}

    def score(self, samples: Sequence[Sample]) -> list[TeacherSignal]:
        """Every micro-batch's signal from the teacher of its samples."""
        by_name = {name: teacher.score(samples) for name, teacher in self.teachers.items()}
        self.metrics = {}
        for teacher in self.teachers.values():
            for key, value in teacher.metrics.items():
                self.metrics[key] = self.metrics.get(key, 0.0) + value
        dp_rank = self.student.layout.place(self.rank).dp_rank
        parts = self.student.assign(samples).by_rank[dp_rank]
        return [by_name[part.teacher][index] for index, part in enumerate(parts)]

    def follow(self, student: Student) -> None:
        """Each of the teachers follows by itself."""
        for teacher in self.teachers.values():
            teacher.follow(student)

    def close(self) -> None:
        """Each of the teachers by itself."""
        for teacher in self.teachers.values():
            teacher.close()
