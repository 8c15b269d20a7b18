"""How a run is saved and goes on: the part of `megaopd.train` that knows checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaopd.config import Config
from megaopd.errors import ConfigError
from megaopd.interruption import INTERRUPTION

if TYPE_CHECKING:
    from megaopd.checkpoint.resumable import Resumable
    from megaopd.checkpoint.run_checkpoints import RunCheckpoints
    from megaopd.checkpoint.training_state import StatePart
    from megaopd.engine.student import MegatronStudent
    from megaopd.inputs import Inputs
    from megaopd.protocols import Teacher
    from megaopd.trainer import OPDTrainer

# What the stored tensors are of: it cannot change between two starts of a run.
_FIXED = ("student.dtype", "student.freeze", "student.lora", "teacher.kind")
# What says where or how a run runs, not what it computes.
_FREE = (
    *("run.", "log.", "checkpoint.", "deadline.", "guard.", "parallel.", "eval."),
    *("train.num_steps", "train.max_wall_time", "train.export", "train.offload"),
    *("train.recompute", "rollout.sglang.", "rollout.urls", "rollout.launch"),
)


def find_resumable(config: Config) -> Resumable | None:
    """The checkpoint that the run goes on from, None at its first start; collective.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
        ConfigError: the run that wrote it was another one.
    """
    from megaopd.checkpoint import resumable
    from megaopd.logger import get_logger

    found = resumable.find_resumable(checkpoints_dir(config), config.checkpoint.resume)
    if found is None:
        return None
    logger = get_logger(__name__)
    logger.info("going on from %s: step %d is done", found.directory, found.step)
    for key, was, now in _changes(found.state["config"], config):
        if key.startswith(_FIXED):
            raise ConfigError(
                key,
                f"{now!r}, and the checkpoint's run had {was!r}",
                "set it back, or start another run from the weights: student.path="
                f"{found.directory}",
            )
        if not key.startswith(_FREE):
            logger.warning("%s was %r when the checkpoint was written, and is %r", key, was, now)
    return found


def checkpoints_dir(config: Config) -> Path:
    return Path(config.run.dir) / "checkpoints"


def build_checkpoints(
    config: Config,
    inputs: Inputs,
    student: MegatronStudent,
    teacher: Teacher,
    on_complete: Callable[[int, Path], None],
) -> RunCheckpoints:
    """Where the run is saved; collective.

    Args:
        on_complete: told the step and the directory of every checkpoint.
    """
    from megaopd.checkpoint.run_checkpoints import RunCheckpoints
    from megaopd.models.build import DTYPES
    from megaopd.train_export import export_adapter

    def export(directory: Path) -> None:
        export_adapter(config, student, inputs, directory)

    exports = Path(config.run.dir) / "hf_steps" if config.checkpoint.export_hf else None
    return RunCheckpoints(
        config.checkpoint,
        checkpoints_dir(config),
        [student, *_state_parts(teacher)],
        num_updates=lambda: student.num_updates,
        source_dir=config.student.path,
        dtype=DTYPES[config.student.dtype],
        layout=asdict(config.parallel),
        exports=exports,
        export_adapter=export if config.student.lora is not None else None,
        # Rollouts are given up for it: training hears of it within seconds.
        on_failure=lambda: INTERRUPTION.request("a checkpoint cannot be written"),
        on_complete=on_complete,
    )


def resume(
    config: Config, found: Resumable, trainer: OPDTrainer, checkpoints: RunCheckpoints
) -> None:
    """Puts the run where the checkpoint was taken; collective.

    Raises:
        CheckpointError: the checkpoint is another run's.
    """
    from megaopd.evaluation.of_run import read_answers
    from megaopd.rollout.recorded import RecordedEngine

    checkpoints.restore(found)
    run_dir = Path(config.run.dir)
    before, after = (read_answers(run_dir, name) for name in ("before", "after"))
    trainer.load_state_dict(found.state, before, after)
    if isinstance(trainer.engine, RecordedEngine):
        trainer.engine.skip(found.step)


def _state_parts(teacher: Teacher) -> list[StatePart]:
    """What of the teachers changes as the run goes on."""
    from megaopd.teacher.ema import EMATeacher
    from megaopd.teacher.routed import RoutedTeacher

    if isinstance(teacher, RoutedTeacher):
        return [part for each in teacher.teachers.values() for part in _state_parts(each)]
    return [teacher] if isinstance(teacher, EMATeacher) else []


def _changes(was: dict[str, Any], config: Config) -> list[tuple[str, Any, Any]]:
    """(key, value then, value now) of the keys that differ."""
    before, now = _flat(was), _flat(asdict(config))
    keys = sorted(before.keys() | now.keys())
    return [(k, before.get(k), now.get(k)) for k in keys if before.get(k) != now.get(k)]


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
