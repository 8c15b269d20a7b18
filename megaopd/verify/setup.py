"""What the checks hand to one another: the configuration, what was read, what was built."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megaopd.batch import Prompt, Sample
from megaopd.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megaopd.inputs import Inputs
    from megaopd.models.arch import ModelArch
    from megaopd.parallel.groups import ParallelGroups
    from megaopd.protocols import RolloutEngine, StepResult, Teacher
    from megaopd.rollout.mixture import Mixture
    from megaopd.train_teachers import StudentSide
    from megaopd.trainer import OPDTrainer

# Samples of the step that is tried, at least.
MIN_SAMPLES = 4


@dataclass
class Setup:
    """Filled by the checks in their order; what one left is there for those that need it.

    Attributes:
        argv: the configuration's words on the command line.
        world_size: ranks.
        num_tokens: most tokens of a response that is sampled here.
        config: the run's, as it was given.
        small: the same with one small step.
        inputs: models' architectures, tokenizer, prompts.
        readings: what the teachers said of text, by teacher.
        result: of the step that was tried.
        closing: whatever is open.
    """

    argv: list[str]
    world_size: int
    num_tokens: int
    closing: ExitStack = field(default_factory=ExitStack)
    config: Any = None
    small: Any = None
    student_arch: ModelArch = field(init=False)
    teacher_archs: dict[str, ModelArch] = field(init=False)
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    inputs: Inputs = field(init=False)
    groups: ParallelGroups = field(init=False)
    side: StudentSide = field(init=False)
    engine: RolloutEngine = field(init=False)
    authors: Mixture = field(init=False)
    teacher: Teacher = field(init=False)
    trainer: OPDTrainer = field(init=False)
    result: StepResult = field(init=False)
    readings: Any = None


def small_config(config: Config, world_size: int, num_tokens: int) -> Config:
    """The run with a single step of a few samples, short responses, and nothing written that is not
    needed."""
    parallel, rollout, train = config.parallel, config.rollout, config.train
    data_size = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    by_budget = train.max_tokens_per_micro_batch is not None
    unit = math.lcm(data_size * (1 if by_budget else train.micro_batch_size), rollout.n)
    batch_size = unit * max(1, math.ceil(MIN_SAMPLES / unit))
    return replace(
        config,
        run=replace(config.run, dir=f"{config.run.dir}/verify"),
        rollout=replace(
            rollout,
            max_new_tokens=min(rollout.max_new_tokens, num_tokens),
            max_staleness=0,
            record="",
            sglang=replace(rollout.sglang, verify=True),
        ),
        train=replace(train, num_steps=1, global_batch_size=batch_size),
        eval=replace(config.eval, interval=0),
        log=replace(config.log, tensorboard=False, wandb_project=""),
    )


def halves(prompts: list[Prompt], num_tokens: int) -> list[Sample]:
    """Prompts cut in two: the second half as if it were the response to the first, so that a
    teacher scores text that nobody sampled. Those of a single token are left out."""
    samples = []
    for prompt in prompts:
        ids = prompt.token_ids
        cut = max(1, len(ids) // 2)
        rest = ids[cut : cut + num_tokens]
        if not rest:
            continue
        samples.append(
            Sample(
                replace(prompt, token_ids=ids[:cut], teacher_token_ids=None),
                0,
                rest,
                (0.0,) * len(rest),
                (True,) * len(rest),
                "stop",
                0,
            )
        )
    return samples
