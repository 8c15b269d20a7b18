"""Rules of teachers: where their weights come from, and what that allows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megaopd.errors import ConfigError

if TYPE_CHECKING:
    from megaopd.config import Config, TeacherConfig

# Kinds of teachers that have weights of their own, at `path`; the others' are the student's, or
# those of other teachers.
WITH_PATH = ("checkpoint", "sglang")


def check_teachers(config: Config, teachers: Mapping[str, TeacherConfig]) -> None:
    """Checks the names of teachers and where they have their weights from.

    Args:
        teachers: all of them by their key.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for name in config.teachers:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(
                "teachers", f"the name {name!r}", "name it in letters, digits, _ and -"
            )
    for key, teacher in teachers.items():
        if teacher.kind == "sglang":
            _check_server_loss(config, key, teacher)
        _check_adapter(config, key, teacher)
        if teacher.members or teacher.kind == "average":
            _check_average(config, key, teacher)
        if teacher.kind in (*WITH_PATH, "average"):
            continue
        if teacher.path:
            raise ConfigError(
                f"{key}.path",
                f"{teacher.path!r} with {key}.kind {teacher.kind}, whose weights are the student's",
                f"set {key}.path= or {key}.kind=checkpoint",
            )
        if teacher.dtype != config.student.dtype:
            raise ConfigError(
                f"{key}.dtype",
                f"{teacher.dtype} with {key}.kind {teacher.kind} and student.dtype "
                f"{config.student.dtype}: rounding alone would set the teacher apart",
                f"set {key}.dtype={config.student.dtype}",
            )
        if teacher.parallel not in (None, config.parallel):
            raise ConfigError(
                f"{key}.parallel",
                f"another layout than the student's with {key}.kind {teacher.kind}, whose weights "
                "are taken from the student on the same rank",
                f"set {key}.parallel=null",
            )


def _check_adapter(config: Config, key: str, teacher: TeacherConfig) -> None:
    """What a student with LoRA adapters, or without, means for a teacher of its weights."""
    lora = config.student.lora
    if teacher.kind == "base" and lora is None:
        raise ConfigError(
            f"{key}.kind",
            "base, and the student has no LoRA adapters that it could be without",
            f"set student.lora.rank, or {key}.kind=self",
        )
    if teacher.kind == "base" and teacher.offload:
        raise ConfigError(
            f"{key}.offload",
            f"true with {key}.kind base, whose weights are those in training",
            f"set {key}.offload=false; train.offload is for both",
        )
    if teacher.kind in ("self", "ema") and lora is not None and lora.adapter:
        raise ConfigError(
            f"{key}.kind",
            f"{teacher.kind}, and student.lora.adapter is set: its start is the base without the "
            "adapter",
            f"merge the adapter into student.path first, or set {key}.kind=base",
        )


def _check_average(config: Config, key: str, teacher: TeacherConfig) -> None:
    """What an average is made of, and what nobody can do with one."""
    if teacher.kind != "average":
        found = f"set, and {key}.kind is {teacher.kind}"
        raise ConfigError(f"{key}.members", found, f"set {key}.kind=average or {key}.members=[]")
    if len(teacher.members) < 2 or len(set(teacher.members)) < len(teacher.members):
        raise ConfigError(
            f"{key}.members",
            f"found {list(teacher.members)}",
            "name two or more entries of teachers, each once",
        )
    if teacher.path:
        found = f"{teacher.path!r} with {key}.kind average"
        raise ConfigError(f"{key}.path", found, f"set {key}.path=; its members have paths")
    weights = teacher.member_weights
    if weights and (len(weights) != len(teacher.members) or min(weights) <= 0):
        raise ConfigError(
            f"{key}.member_weights",
            f"found {list(weights)} for {len(teacher.members)} members",
            "give a positive number for each, or none",
        )
    for name in teacher.members:
        member = config.teachers.get(name)
        if member is None or member.kind not in ("checkpoint", "self", "base"):
            found = f"{name!r} is no teacher" if member is None else f"{name!r} is {member.kind}"
            raise ConfigError(
                f"{key}.members", found, "name entries of teachers of kind checkpoint, self or base"
            )
        if member.dtype != teacher.dtype:
            raise ConfigError(
                f"teachers.{name}.dtype",
                f"{member.dtype}, where {key}.dtype is {teacher.dtype}",
                "give an average and its members one dtype",
            )
    mixture = config.rollout.mixture
    if config.data.eval and config.eval.teacher:
        asked = "eval.teacher"
    elif mixture is not None and mixture.teacher:
        asked = "rollout.mixture.teacher"
    else:
        return
    raise ConfigError(
        asked,
        f"set with {key}.kind average, from which nobody can sample",
        f"set {asked}={'false' if asked == 'eval.teacher' else 0}",
    )


def _check_server_loss(config: Config, key: str, teacher: TeacherConfig) -> None:
    """What the log-probs of a teacher on servers can be used for."""
    loss, rollout = config.loss, config.rollout
    if loss.temperature != 1:
        raise ConfigError(
            "loss.temperature",
            f"{loss.temperature} with {key}.kind sglang, whose log-probs are at temperature 1",
            "set it to 1",
        )
    if teacher.top_k == 0 and (rollout.top_p < 1 or rollout.top_k):
        cut = "rollout.top_p" if rollout.top_p < 1 else "rollout.top_k"
        raise ConfigError(
            cut,
            f"the sampler leaves tokens out, and {key}.top_k is 0: an estimate from sampled tokens "
            "needs the whole distribution",
            f"set rollout.top_p=1 and rollout.top_k=0, or {key}.top_k=64",
        )
    if teacher.top_k == 0 and rollout.temperature == 0:
        raise ConfigError(
            "rollout.temperature",
            f"0, and {key}.top_k is 0: an estimate from sampled tokens needs samples",
            f"set rollout.temperature=1, or {key}.top_k=64",
        )
