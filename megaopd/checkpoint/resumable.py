"""Finds the checkpoint that a run goes on from, and what it says of the run; collective."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megaopd.checkpoint.loading import verify_together
from megaopd.errors import CheckpointError, ConfigError
from megaopd.logger import get_logger
from megaopd.parallel.agreement import agreed
from megaopd.storage.steps import (
    POINTER,
    complete_steps,
    step_directory,
    stored_steps,
    what_is_missing,
)

logger = get_logger(__name__)

RUN_STATE = "run_state.json"
FORMAT = 1


@dataclass(frozen=True)
class Resumable:
    """A checkpoint whose every file is what was written.

    Attributes:
        directory: the step's.
        state: its run_state.json.
    """

    directory: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def find_resumable(root: Path, resume: str) -> Resumable | None:
    """The newest complete checkpoint below `root` whose files are what was written.

    A damaged one is named in a warning, and the one before it is taken. The pointer is not asked:
    it can be older or newer than what is there, or garbage. Where there are checkpoints and none of
    them is whole, the run does not start: it would start from step 0 unasked.

    Args:
        resume: see `CheckpointConfig.resume`.

    Returns:
        None where there has never been a checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
        ConfigError: `resume` is never, and there is one.
    """
    found: list[Any] = [None]
    with agreed():
        if dist.get_rank() == 0:
            found = [(stored_steps(root), complete_steps(root), (root / POINTER).exists())]
    dist.broadcast_object_list(found, src=0)
    stored, complete, has_pointer = found[0]
    if not stored and not has_pointer:
        return None
    if resume == "never":
        raise ConfigError(
            "checkpoint.resume",
            f"never, and {root} has checkpoints",
            "set it to auto to go on from the newest, or choose another run.dir",
        )
    damage = ""
    for step in sorted(set(stored) - set(complete), reverse=True):
        directory = step_directory(root, step)
        why = what_is_missing(directory)
        damage = damage or f" (the newest, step {step}: {why})"
        logger.warning("%s is incomplete (%s), and not used", directory, why)
    for step in reversed(complete):
        directory = step_directory(root, step)
        try:
            verify_together(directory)
            with agreed():
                state = _read_state(directory, step)
            return Resumable(directory, state)
        except CheckpointError as error:
            where, why, _ = error.parts
            damage = damage or f" ({where} {why})"
            logger.warning("%s %s: it is not used", where, why)
    raise CheckpointError(
        str(root),
        f"has checkpoints, and none is whole{damage}",
        "bring one back, or move the directory away to start from step 0",
    )


def _read_state(directory: Path, step: int) -> dict[str, Any]:
    file = directory / RUN_STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(file), f"cannot be read ({error})", "give the directory of a run's checkpoints"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("step") != step:
        raise CheckpointError(
            str(file), f"is no state of step {step}", "use the version of megaopd that wrote it"
        )
    return state
