"""The loss at a step: `loss.schedule` over the plain keys of `loss`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megaopd.config import LossConfig, LossStage

# What a stage may move on a straight line; `kind` it can only replace.
NUMBERS = ("beta", "alpha", "entropy_coef", "selection_ratio")


def stages(config: LossConfig) -> list[LossStage]:
    """Those of the schedule, in order."""
    return sorted(config.schedule.values(), key=lambda stage: stage.until_step)


def loss_at(config: LossConfig, step: int) -> LossConfig:
    """What `config` is at `step`, counted from 1: a function of these two alone, so that a run that
    is taken up again goes on as it would have.

    In a linear stage from step a + 1 to step b, a number that was v_a at step a and is to be v_b at
    step b is v_a + (v_b - v_a) (step - a) / (b - a).
    """
    found = replace(config, schedule={})
    start, before = 0, found
    for stage in stages(config):
        changes: dict[str, Any] = {} if stage.kind is None else {"kind": stage.kind}
        progress = 1.0
        if stage.linear and stage.until_step > start:
            progress = min(1.0, (step - start) / (stage.until_step - start))
        for name in NUMBERS:
            value = getattr(stage, name)
            if value is not None:
                begin = getattr(before, name)
                changes[name] = value if progress == 1 else begin + (value - begin) * progress
        if step <= stage.until_step:
            return replace(found, **changes)
        start, before = stage.until_step, replace(found, **changes)
    return found
