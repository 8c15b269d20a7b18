"""Credit in the loop: between the teacher's word and the student's step."""

from __future__ import annotations

import pytest

from megaopd.batch import Prompt, SamplingParams
from megaopd.config import (
    Config,
    CreditConfig,
    LossConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megaopd.credit import CreditAssignment
from megaopd.data.packing import Batching, Packing
from megaopd.data.prompts import PromptStream
from megaopd.parallel.layout import Layout
from megaopd.trainer import OPDTrainer
from megaopd.weight_sync.in_process import InProcessSync
from tests.helpers.background_engine import BackgroundEngine, ListedStudent, Rows, SilentTeacher

PROMPTS = [Prompt(f"p{i}", (1, 2)) for i in range(4)]
NUM_STEPS = 3
# Four samples of three loss tokens and a tool's: rows 0 to 15.
OWN = [row for row in range(16) if row % 4 != 3]


class Student(ListedStudent):
    """Notes what the tokens were worth."""

    def __init__(self) -> None:
        super().__init__()
        self.worth: list[dict[int, tuple[float, float | None]]] = []
        self.num_scored = 0

    def train_step(self, micro_batches, signals, step):
        found = {}
        for batch in micro_batches:
            at = batch.loss_mask_T
            advantages = [None] * int(at.sum())
            if batch.advantages_T is not None:
                advantages = batch.advantages_T[at].tolist()
            weights = batch.token_weights_T[at].tolist()
            rows = batch.rows_T[at].tolist()
            found |= dict(zip(rows, zip(weights, advantages, strict=True), strict=True))
        self.worth.append(found)
        return super().train_step(micro_batches, signals, step)

    def score(self, micro_batches, signals, num_rows):
        self.num_scored += 1
        assert num_rows == 16
        return super().score(micro_batches, signals, num_rows)


class Teacher(SilentTeacher):
    def __init__(self) -> None:
        super().__init__()
        self.num_scored = 0
        self.metrics = {"teacher/of_old": 1.0}

    def score(self, samples):
        self.num_scored += 1
        return super().score(samples)


def run(loss: LossConfig, credit: CreditConfig, rewards=(0.0, 1.0, 1.0, 1.0)) -> OPDTrainer:
    config = Config(
        loss=loss,
        credit=credit,
        rollout=RolloutConfig(n=2, max_new_tokens=4),
        train=TrainConfig(num_steps=NUM_STEPS, global_batch_size=4, micro_batch_size=4),
    )
    trainer = OPDTrainer(
        config,
        student=Student(),
        teacher=Teacher(),
        engine=BackgroundEngine(),
        weight_sync=InProcessSync(),
        prompts=PromptStream(PROMPTS, seed=1),
        sampling=SamplingParams(max_new_tokens=4, n=2),
        batching=Batching(Layout(ParallelConfig(), 1), Packing(1, None, 1)),
        rank=0,
        evaluator=None,
        eval_prompts=(),
        metrics=Rows(),
        credit=CreditAssignment(config, lambda samples: rewards),
    )
    trainer.fit()
    return trainer


def test_the_teachers_advantage_reaches_the_student():
    """log p of a token is its row, log q is 0: the advantage is -row."""
    trainer = run(LossConfig(objective="policy_gradient"), CreditConfig(teacher_coef=0.5))
    assert trainer.student.worth == [{row: (1.0, -0.5 * row) for row in OWN}] * NUM_STEPS
    assert trainer.student.num_scored == trainer.teacher.num_scored == NUM_STEPS
    mean = -0.5 * sum(OWN) / len(OWN)
    assert trainer.metrics.of("credit/advantage_mean") == pytest.approx([mean] * NUM_STEPS)
    assert trainer.metrics.of("teacher/of_old") == [1.0] * NUM_STEPS


def test_without_the_teacher_in_the_loss_it_is_not_asked():
    """Rewards 0 and 1 of the first prompt, 1 and 1 of the second."""
    loss = LossConfig(objective="policy_gradient")
    credit = CreditConfig(teacher_coef=0.0, reward_coef=1.0, normalise_std=False)
    trainer = run(loss, credit)
    expected = {row: (1.0, {0: -0.5, 1: 0.5}.get(row // 4, 0.0)) for row in OWN}
    assert trainer.student.worth == [expected] * NUM_STEPS
    assert trainer.student.num_scored == trainer.teacher.num_scored == 0
    assert trainer.metrics.of("credit/reward_mean") == [0.75] * NUM_STEPS
    assert trainer.metrics.of("credit/no_spread_fraction") == [0.5] * NUM_STEPS
    assert trainer.metrics.of("teacher/of_old") == []


def test_weights_reach_the_student():
    """PACED: the second prompt's pass rate is 1, so the first one has all of the weight."""
    trainer = run(LossConfig(), CreditConfig(weights="paced", paced_memory=1.0))
    expected = {row: (2.0 if row < 8 else 0.0, None) for row in OWN}
    assert trainer.student.worth[0] == expected
    assert trainer.teacher.num_scored == NUM_STEPS
    assert trainer.student.num_scored == 0
