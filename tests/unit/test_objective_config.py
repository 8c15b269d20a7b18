"""What the configuration refuses of losses and credit, in one line each; the recipes pass."""

from __future__ import annotations

import pytest

from megaopd.config import load, validate
from megaopd.errors import ConfigError
from megaopd.losses import DIVERGENCES
from megaopd.losses.objective import needs_teacher
from megaopd.rewards import REWARDS

MINE = (
    "opd_full",
    "opd_policy_gradient",
    "opd_supervised_estimator",
    "reward_weighted",
    "paced",
    "tip",
    "schedule",
    "grpo",
    "opd_plus_reward",
)
PG = "loss.objective=policy_gradient"
SERVERS = ("teacher.kind=sglang", 'teacher.urls=["http://127.0.0.1:1"]')
STAGE = "loss.schedule.a.until_step=5"


def check(*overrides: str) -> None:
    config = load(["conf=demo_cpu", *overrides])
    validate(config, 3, divergences=tuple(DIVERGENCES), rewards=tuple(REWARDS))


@pytest.mark.parametrize("name", MINE)
def test_recipes_pass(name):
    check(f"+recipes={name}")


@pytest.mark.parametrize(
    "overrides",
    [
        ("+recipes=grpo", "teacher.kind=self", "teacher.path=", "credit.teacher_coef=0.001"),
        ("+recipes=grpo", "credit.normalise_std=false", "credit.aggregation=constant"),
        ("+recipes=[paced,schedule]",),
        ("+recipes=[opd_policy_gradient,tip]", "loss.objective=policy_gradient"),
        (PG, *SERVERS, "teacher.top_k=0"),
        (STAGE, "loss.schedule.a.kind=forward_kl"),
    ],
)
def test_what_the_documentation_says_passes(overrides):
    check(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((STAGE, "loss.schedule.a.kind=forward"), "loss.schedule.a.kind: no 'forward'; did you m"),
        (("loss.schedule.a.kind=jsd",), "loss.schedule.a.until_step: found 0; expected a step"),
        ((STAGE, "loss.schedule.b.until_step=5"), "loss.schedule.b.until_step: 5, where stage a"),
        ((STAGE, "loss.schedule.a.beta=1.5"), "loss.schedule.a.beta: found 1.5; expected a value"),
        (
            (STAGE, "loss.schedule.a.kind=skew_forward_kl", "loss.schedule.a.alpha=1.0"),
            "loss.schedule.a.alpha: found 1.0 for skew_forward_kl",
        ),
        ((STAGE, "loss.schedule.a.selection_ratio=0"), "loss.schedule.a.selection_ratio: found 0"),
        (("credit.reward_coef=1",), "credit.reward_coef: 1.0 with loss.objective divergence"),
        (("credit.discount=0.5",), "credit.discount: 0.5 with loss.objective divergence"),
        (("credit.baseline=entropy",), "credit.baseline: entropy with loss.objective divergence"),
        ((PG, "credit.teacher_coef=0"), "credit.teacher_coef: 0 as well as credit.reward_coef"),
        ((PG, "credit.reward_coef=1"), "rollout.n: 1 with credit.reward_coef"),
        ((PG, "rollout.top_p=0.9"), "rollout.top_p: 0.9 with loss.objective policy_gradient"),
        ((PG, "rollout.temperature=0"), "rollout.temperature: 0 with loss.objective policy_grad"),
        ((PG, "rollout.temperature=0.7"), "loss.temperature: 1.0 with rollout.temperature 0.7"),
        (("loss.objective=estimator", "rollout.top_k=5"), "rollout.top_k: 5 with loss.objective e"),
        ((PG, *SERVERS), "teacher.top_k: 64 with loss.objective policy_gradient"),
        (("loss.objective=estimator", *SERVERS), "teacher.top_k: 64 with loss.objective estimator"),
        (("loss.selection=q3", *SERVERS, "teacher.top_k=0"), "loss.selection: q3 with teacher.top"),
        (
            (PG, *SERVERS, "teacher.top_k=0", "credit.baseline=divergence"),
            "credit.baseline: divergence with teacher.kind sglang",
        ),
        (("credit.reward=gsm7k",), "credit.reward: no 'gsm7k'; did you mean gsm8k"),
        (("credit.reward_beta=0",), "credit.reward_beta: found 0"),
        (("loss.selection_ratio=0",), "loss.selection_ratio: found 0"),
        (("loss.selection_ratio=0.5",), "loss.selection_ratio: 0.5 with loss.selection none"),
        ((STAGE, "loss.schedule.a.selection_ratio=0.2"), "a.selection_ratio: 0.2 with loss.sel"),
        (("loss.entropy_coef=-1",), "loss.entropy_coef: found -1"),
        (("loss.clip_low=2",), "loss.clip_low: found 2"),
        (("credit.paced_memory=2",), "credit.paced_memory: found 2"),
        (("loss.estimator=k1",), 'loss.estimator: found "k1"; .*expected one of k2, k3'),
    ],
)
def test_what_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(*overrides)


def test_who_asks_the_teacher():
    def asks(*overrides: str) -> bool:
        return needs_teacher(load(["conf=demo_cpu", *overrides]).loss)

    assert asks()
    assert asks("+recipes=opd_supervised_estimator")
    # The advantages may: credit says so.
    assert not asks("+recipes=grpo")
    assert not asks("+recipes=grpo", "loss.selection=entropy")
    assert asks("+recipes=grpo", "loss.selection=soft_or")
    assert not asks("loss.objective=likelihood")
