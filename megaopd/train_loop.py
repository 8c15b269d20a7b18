"""The loop of a run, put together from its parts, for training and for verification alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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
) -> OPDTrainer:
    """The trainer of a run; the student is built if it is not yet. Collective."""
    from megaopd.credit import CreditAssignment
    from megaopd.data.prompts import PromptStream
    from megaopd.trainer import OPDTrainer

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
        credit=CreditAssignment(config, _training_rewards(config, inputs, side)),
    )


def _training_rewards(
    config: Config, inputs: Inputs, side: StudentSide
) -> Callable[[Sequence[Sample]], list[float]]:
    """Samples -> their rewards, equal on every rank, which each score a part of them. Collective.

    A check with a time limit may end one way here and another there: it is done on one rank.
    """
    import torch.distributed as dist

    from megaopd.evaluation.scoring import score_all
    from megaopd.rewards import find_reward

    rank, size = side.groups.rank, side.groups.world_size
    reward = find_reward(config.credit.reward or config.eval.reward, "credit.reward")

    def score(samples: Sequence[Sample]) -> list[float]:
        mine = [r.score for r in score_all(samples[rank::size], reward, inputs.tokenizer)]
        parts: list[list[float]] = [[] for _ in range(size)]
        dist.all_gather_object(parts, mine)
        return [parts[i % size][i // size] for i in range(len(samples))]

    return score
