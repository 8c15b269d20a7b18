"""The part of the configuration about runs that outlive the machine; see `megaopd.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run so that it can go on after whatever ended it."""

    interval: int = 0
    """Save every so many steps; 0 saves when the run is told to stop, and otherwise not."""
    keep_last: int = 2
    """Checkpoints to keep, the newest ones."""
    keep_every: int = 0
    """Keep those of multiples of this step besides; 0 keeps none."""
    asynchronous: bool = True
    """Write while training goes on, from a copy of this rank's share in host memory."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest complete checkpoint in run.dir/checkpoints, whatever layout
    wrote it; `never` refuses to start where there is one."""
    export_hf: bool = False
    """Write every checkpoint as a Hugging Face directory too (run.dir/hf_steps/iter_*), in the
    background; LoRA adapters in PEFT's format."""


@dataclass(frozen=True)
class DeadlineConfig:
    """Longest times of the phases, in seconds; 0 sets none. A phase that takes longer on any rank
    ends the run with the stacks of all ranks."""

    start_s: float = 3600.0
    """Building and loading the models, starting the servers."""
    rollout_s: float = 7200.0
    """Waiting for a step's samples."""
    teacher_s: float = 1800.0
    """The teachers' word on a step's samples."""
    student_s: float = 1800.0
    """Credit, forward, backward and update of a step."""
    weight_sync_s: float = 900.0
    """Bringing the weights to the rollout engine."""
    eval_s: float = 7200.0
    """One evaluation of the student."""
    checkpoint_s: float = 1800.0
    """What of a checkpoint, or of the final export, training waits for."""
    silence_s: float = 40.0
    """A rank that gives no sign of life for so long is dead or stopped."""


@dataclass(frozen=True)
class GuardConfig:
    """Numbers that tell of a run gone wrong: a step past a bound is warned of, and the run ends
    after several in a row."""

    patience: int = 3
    """Steps in a row past the same bound that end the run; 0 only ever warns."""
    loss_spike: float = 5.0
    """Bound of the loss, as a multiple of its median over the last `window` steps; 0 sets none."""
    window: int = 32
    """Steps that the median is of; before half of them there is no bound."""
    mismatch_kl: float = 0.5
    """Bound of rollout/mismatch_kl, in nats per token; 0 sets none."""
