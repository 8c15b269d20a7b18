"""The loop of a run, put together from its parts, for training and for verification alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megaopd.batch import Prompt, Sample
from megaopd.config import Config
from megaopd.inputs import Inputs
from megaopd.train_rollout import weight_sync
from megaopd.train_teachers import StudentSide

if TYPE_CHECKING:
    from megaopd.evaluation import EvalResult
    from megaopd.metrics import MetricsWriter
    from megaopd.protocols import RolloutEngine, Teacher
    from megaopd.rollout.mixture import Mixture
    from megaopd.trainer import OPDTrainer


def build_trainer(
    config: Config,
    inputs: Inputs,
    side: StudentSide,
    *,
    engine: RolloutEngine,
    authors: Mixture,
    teacher: Teacher,
    metrics: MetricsWriter,
    evaluator: Callable[[RolloutEngine], EvalResult] | None = None,
    record: Callable[[int, Sequence[Prompt], Sequence[Sample]], None] | None = None,
    **watching: Any,
) -> OPDTrainer:
    """The trainer of a run; the student is built if it is not yet. Collective.

    Args:
        watching: `checkpoints`, `interruption`, `watch` and the like, see `OPDTrainer`.
    """
    from megaopd.credit import CreditAssignment
    from megaopd.data.prompts import PromptStream
    from megaopd.evaluation.scoring import rewards_of
    from megaopd.rewards import find_reward
    from megaopd.trainer import OPDTrainer

    reward = find_reward(config.credit.reward or config.eval.reward, "credit.reward")
    return OPDTrainer(
        config,
        student=side.model(),
        teacher=teacher,
        engine=engine,
        weight_sync=weight_sync(engine),
        prompts=PromptStream(inputs.train_prompts, config.run.seed, config.data.shuffle),
        sampling=inputs.sampling,
        batching=side.batching,
        rank=side.groups.rank,
        evaluator=evaluator,
        eval_prompts=inputs.eval_prompts,
        metrics=metrics,
        record=record,
        start_rollout=authors.start,
        credit=CreditAssignment(
            config, partial(rewards_of, reward=reward, tokenizer=inputs.tokenizer)
        ),
        **watching,
    )
