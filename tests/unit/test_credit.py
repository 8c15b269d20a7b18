"""Weights and advantages of a global batch against slow references; nothing of it depends on how
the samples are shared out and packed."""

from __future__ import annotations

import json
import math
import random
import statistics
import typing
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaopd.batch import Prompt, Sample, TokenScores
from megaopd.config import Config, CreditConfig, LossConfig, RolloutConfig
from megaopd.credit import (
    ADVANTAGES,
    AGGREGATIONS,
    WEIGHTS,
    CreditAssignment,
    PassRates,
    Responses,
)
from megaopd.credit.advantages import BASELINES
from megaopd.credit.weights import sample_weights
from megaopd.data.packing import with_credit
from megaopd.errors import ConfigError
from tests.helpers.random_batches import random_batching

PG = LossConfig(objective="policy_gradient")
L_MAX = 30


def make_samples(num_prompts: int = 5, n: int = 3, seed: int = 0) -> list[Sample]:
    """Some responses are empty, some tokens a tool's."""
    rng = random.Random(seed)
    samples = []
    for prompt in range(num_prompts):
        for index in range(n):
            length = rng.choice([0, 1, 5, 9, 14])
            samples.append(
                Sample(
                    Prompt(f"p{prompt}", (1, 2)),
                    index,
                    tuple(range(length)),
                    (-1.0,) * length,
                    tuple(rng.random() < 0.8 for _ in range(length)),
                    "stop",
                    0,
                )
            )
    return samples


def make_rewards(samples: list[Sample], seed: int = 1) -> list[float]:
    rng = random.Random(seed)
    return [rng.choice([0.0, 1.0, 1.0, rng.random()]) for _ in samples]


def make_scores(samples: list[Sample], seed: int = 2) -> TokenScores:
    generator = torch.Generator().manual_seed(seed)
    num = sum(len(s.response_ids) for s in samples)
    return TokenScores(*torch.randn(5, num, generator=generator).unbind(0))


def config(loss: LossConfig | None = None, **credit) -> Config:
    return Config(
        loss=loss or LossConfig(),
        credit=CreditConfig(**credit),
        rollout=RolloutConfig(max_new_tokens=L_MAX),
    )


def own_tokens(sample: Sample) -> int:
    return sum(sample.response_mask)


def slow_weights(samples, rewards, c: CreditConfig) -> list[float]:
    """Before they are normalised."""
    found = []
    for sample, reward in zip(samples, rewards, strict=True):
        group = [r for s, r in zip(samples, rewards, strict=True) if s.prompt == sample.prompt]
        rate = sum(group) / len(group)
        softmax = math.exp(reward / c.reward_beta) / sum(math.exp(r / c.reward_beta) for r in group)
        found.append(
            {
                "uniform": 1.0,
                "reward_weighted": len(group) * softmax
                if c.reward_softmax == "prompt"
                else math.exp(reward / c.reward_beta),
                "paced": rate**c.paced_a * (1 - rate) ** c.paced_b,
            }[c.weights]
        )
    return found


CASES = {
    "uniform": {"weights": "uniform"},
    "reward_weighted": {"weights": "reward_weighted", "reward_beta": 0.3},
    "batch softmax": {
        "weights": "reward_weighted",
        "reward_beta": 0.3,
        "reward_softmax": "batch",
    },
    "paced": {"weights": "paced", "paced_a": 0.5, "paced_b": 2.0},
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", CASES)
def test_the_weighted_loss_is_the_mean_that_it_is_said_to_be(name, aggregation):
    """Losses of tokens, weighted, over the number of loss tokens: by the definitions."""
    c = config(aggregation=aggregation, **CASES[name])
    samples = make_samples()
    rewards = make_rewards(samples)
    rates = PassRates(0.5)
    rates.update(samples, rewards)
    _, weights_R = sample_weights(Responses(samples, rewards), c, rates)
    losses = torch.randn(len(weights_R), generator=torch.Generator().manual_seed(3)).double()
    num_tokens = sum(map(own_tokens, samples))
    found = float((weights_R.double() * losses).sum()) / num_tokens

    pieces = losses.split([len(s.response_ids) for s in samples])
    masks = [torch.tensor(s.response_mask, dtype=torch.bool) for s in samples]
    sums = [float(piece[mask].sum()) for piece, mask in zip(pieces, masks, strict=True)]
    w = slow_weights(samples, rewards, c.credit)
    n = [own_tokens(s) for s in samples]
    rows = [(a, b, m) for a, b, m in zip(w, sums, n, strict=True) if m]
    if aggregation == "token":
        expected = sum(a * b for a, b, _ in rows) / sum(a * m for a, _, m in rows)
    elif aggregation == "sample":
        expected = sum(a * b / m for a, b, m in rows) / sum(a for a, _, _ in rows)
    else:
        scale = sum(m for _, _, m in rows) / sum(a * m for a, _, m in rows)
        expected = scale * sum(a * b for a, b, _ in rows) / (len(samples) * L_MAX)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_micro_batches_layouts_and_packing_change_nothing(weights, aggregation):
    """Every loss token of the global batch is found once, with the weight and the advantage that
    it has by itself; micro-batches of one sample do not cancel its weight."""
    rng = random.Random(7)
    samples = make_samples(num_prompts=6, n=2)
    rewards = make_rewards(samples)
    c = config(PG, weights=weights, aggregation=aggregation, reward_beta=0.3, reward_coef=1.0)
    worth = CreditAssignment(c, lambda s: rewards)(samples, make_scores(samples))
    assert worth.advantages_R is not None
    weights_R = worth.weights_R
    if weights_R is None:
        assert (weights, aggregation) == ("uniform", "token")
        weights_R = Responses(samples).to_tokens(torch.ones(len(samples)))
    for _ in range(12):
        world = rng.choice([1, 2, 4, 6])
        batching = random_batching(rng, world)
        assignment = batching.assign(samples)
        found: dict[int, set[tuple[float, float]]] = {}
        for rank in range(world):
            batches = batching.micro_batches(samples, assignment, rank)
            for batch in with_credit(batches, worth.weights_R, worth.advantages_R):
                assert batch.advantages_T is not None
                assert not batch.advantages_T[~batch.loss_mask_T].any()
                assert not batch.token_weights_T[~batch.loss_mask_T].any()
                for row, weight, advantage in zip(
                    batch.rows_T[batch.loss_mask_T].tolist(),
                    batch.token_weights_T[batch.loss_mask_T].tolist(),
                    batch.advantages_T[batch.loss_mask_T].tolist(),
                    strict=True,
                ):
                    found.setdefault(row, set()).add((weight, advantage))
        own = Responses(samples).mask.nonzero()[:, 0].tolist()
        assert found == {
            row: {(float(weights_R[row]), float(worth.advantages_R[row]))} for row in own
        }


def test_weights_of_nothing_to_learn_are_zero():
    """Every prompt is solved by all samples: PACED has no weight for any of them."""
    samples = make_samples()
    assignment = CreditAssignment(config(weights="paced"), lambda s: [1.0] * len(s))
    worth = assignment(samples, None)
    assert worth.weights_R is not None
    assert not worth.weights_R.any()
    assert worth.metrics["credit/effective_samples"] == 0
    assert worth.metrics["credit/pass_rate_mean"] == 1


def test_rewards_are_scored_where_they_are_needed_and_metrics_say_what_they_were():
    samples = make_samples(num_prompts=2, n=2)
    asked = []

    def score(given):
        asked.append(len(given))
        return [0.0, 1.0, 1.0, 1.0]

    for c, needed in (
        (config(), False),
        (config(reward_coef=1.0), False),  # advantages are of a policy gradient
        (config(PG), False),
        (config(PG, reward_coef=1.0), True),
        (config(weights="reward_weighted"), True),
        (config(weights="paced"), True),
    ):
        asked.clear()
        assignment = CreditAssignment(c, score)
        assert assignment.needs_rewards == needed
        assert assignment.needs_scores == (c.loss == PG)
        worth = assignment(samples, make_scores(samples) if assignment.needs_scores else None)
        assert asked == [4] * needed
        assert ("credit/reward_mean" in worth.metrics) == needed
        assert (worth.advantages_R is not None) == (c.loss == PG)
        if needed:
            assert worth.metrics["credit/reward_mean"] == 0.75
            assert worth.metrics["credit/no_spread_fraction"] == 0.5


def slow_returns(values: list[float], discount: float) -> list[float]:
    return [
        sum(discount ** (s - t) * values[s] for s in range(t, len(values)))
        for t in range(len(values))
    ]


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_teachers_advantage(baseline, discount):
    samples = make_samples()
    scores = make_scores(samples)
    c = config(PG, baseline=baseline, discount=discount, teacher_coef=0.5)
    found = CreditAssignment(c, lambda s: [])(samples, scores)
    expected: list[float] = []
    row = 0
    for sample in samples:
        rows = range(row, row + len(sample.response_ids))
        row = rows.stop
        mask = sample.response_mask
        gain = [
            float(scores.teacher_logprobs_R[r] - scores.student_logprobs_R[r]) * own
            for r, own in zip(rows, mask, strict=True)
        ]
        for r, total, own in zip(rows, slow_returns(gain, discount), mask, strict=True):
            b = {
                "none": 0.0,
                "entropy": float(scores.student_entropy_R[r] - scores.teacher_entropy_R[r]),
                "divergence": -float(scores.divergence_R[r]),
            }[baseline]
            expected.append(0.5 * (total - b) * own)
    assert found.advantages_R.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    own = torch.tensor(expected)[Responses(samples).mask]
    assert found.metrics["credit/advantage_mean"] == pytest.approx(float(own.mean()), rel=1e-4)
    divergence = scores.divergence_R[Responses(samples).mask]
    assert found.metrics["loss/divergence"] == pytest.approx(float(divergence.mean()), rel=1e-4)


@pytest.mark.parametrize("normalise_std", [True, False])
def test_the_rewards_advantage(normalise_std):
    samples = make_samples()
    rewards = make_rewards(samples)
    c = config(PG, teacher_coef=0.0, reward_coef=2.0, normalise_std=normalise_std)
    assignment = CreditAssignment(c, lambda s: rewards)
    assert not assignment.needs_scores
    found = assignment(samples, None).advantages_R
    expected: list[float] = []
    for sample, reward in zip(samples, rewards, strict=True):
        group = [r for s, r in zip(samples, rewards, strict=True) if s.prompt == sample.prompt]
        a = reward - statistics.mean(group)
        if normalise_std:
            a /= statistics.stdev(group) + 1e-6
        expected += [2.0 * a * own for own in sample.response_mask]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_one_sample_of_a_prompt_has_no_relative_reward():
    samples = make_samples(num_prompts=3, n=1)
    c = config(PG, teacher_coef=0.0, reward_coef=1.0)
    found = CreditAssignment(c, lambda s: [0.0, 0.5, 1.0])(samples, None)
    assert not found.advantages_R.any()


def test_teacher_and_reward_add_up():
    samples = make_samples()
    rewards, scores = make_rewards(samples), make_scores(samples)

    def advantages(**coefs) -> Tensor:
        return CreditAssignment(config(PG, **coefs), lambda s: rewards)(
            samples, scores
        ).advantages_R

    both = advantages(teacher_coef=1.5, reward_coef=0.3)
    apart = 1.5 * advantages() + 0.3 * advantages(teacher_coef=0.0, reward_coef=1.0)
    torch.testing.assert_close(both, apart)


def test_a_baseline_that_the_teacher_does_not_tell_is_refused():
    samples = make_samples()
    scores = make_scores(samples)
    unknown = torch.full_like(scores.divergence_R, math.nan)
    scores = replace(scores, teacher_entropy_R=unknown, divergence_R=unknown)
    for baseline in ("entropy", "divergence"):
        with pytest.raises(ConfigError, match=f"credit.baseline: {baseline}, and a teacher on ser"):
            CreditAssignment(config(PG, baseline=baseline), lambda s: [])(samples, scores)
    worth = CreditAssignment(config(PG), lambda s: [])(samples, scores)
    assert "loss/divergence" not in worth.metrics
    assert "teacher/entropy" not in worth.metrics


def test_pass_rates_run_on():
    """Half of what was known, then the new samples: 1 of 2, then 4 of 4 beside it."""
    rates = PassRates(0.5)
    samples = make_samples(num_prompts=2, n=2)
    rates.update(samples, [1.0, 0.0, 1.0, 1.0])
    assert (rates["p0"], rates["p1"]) == (0.5, 1.0)
    rates.update(samples[:2], [1.0, 1.0])
    assert rates["p0"] == pytest.approx((0.5 * 1 + 2) / (0.5 * 2 + 2))
    assert rates["p1"] == 1.0
    assert rates["never"] == 0.5
    # What others wrote says nothing about the student.
    rates.update([replace(s, source="teacher") for s in samples[2:]], [0.0, 0.0])
    assert rates["p1"] == 1.0
    # Rewards outside [0, 1] are none of a pass or a whole one.
    rates.update(samples[2:], [-3.0, 7.0])
    assert rates["p1"] == pytest.approx((0.5 * 2 + 1) / (0.5 * 2 + 2))


@pytest.mark.parametrize("memory", [0.0, 0.5, 1.0])
def test_a_resumed_run_weighs_as_the_one_that_went_on(memory):
    c = config(weights="paced", paced_memory=memory)
    steps = [make_samples(seed=seed) for seed in range(4)]
    rewards = {id(samples): make_rewards(samples, seed=i) for i, samples in enumerate(steps)}

    def score(samples):
        return rewards[id(samples)]

    through = CreditAssignment(c, score)
    wanted = [through(samples, None).weights_R for samples in steps]
    first = CreditAssignment(c, score)
    for samples in steps[:2]:
        first(samples, None)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = CreditAssignment(c, score)
    resumed.load_state_dict(state)
    for samples, expected in zip(steps[2:], wanted[2:], strict=True):
        found = resumed(samples, None).weights_R
        assert found.tolist() == expected.tolist()
    fresh = CreditAssignment(c, score)(steps[2], None).weights_R
    assert (fresh.tolist() == wanted[2].tolist()) == (memory == 0)


def test_tables_and_configuration_name_the_same():
    hints = typing.get_type_hints(CreditConfig)
    assert typing.get_args(hints["weights"]) == tuple(WEIGHTS)
    assert typing.get_args(hints["aggregation"]) == tuple(AGGREGATIONS)
    assert typing.get_args(hints["baseline"]) == tuple(BASELINES)
    assert {f"{name}_coef" for name in ADVANTAGES} <= set(hints)
