"""Every file of conf/recipes as a whole run of two steps: it trains, takes an entropy bonus, and
logs what docs/recipes.md says of its loss.

Those that mix authors are in test_mixture_run.py, with the values of their losses.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, make_run, run_training

pytestmark = pytest.mark.slow

BONUS = 0.01
WATCHED = {
    "loss/divergence",
    "loss/policy_gradient",
    "loss/entropy",
    "teacher/entropy",
    "rollout/mismatch_kl",
}
# What they do not measure.
NO_ADVANTAGES = {"loss/policy_gradient"}
NO_TEACHER = {"loss/divergence", "teacher/entropy"}
NO_SAMPLES = {"rollout/mismatch_kl"}
KL_TO_THE_START = ("teacher.kind=self", "teacher.path=", "credit.teacher_coef=0.001")
DR_GRPO = ("credit.normalise_std=false", "credit.aggregation=constant")
MATH = ("teachers.math.path={0}/teacher", "teachers.math.dtype=fp32")
GIVEN = ("rollout.mixture.on_policy=0",)
# Name -> recipes, further words, which of `WATCHED` it does not log, and what it does besides.
CASES: dict[str, tuple[str, tuple[str, ...], set[str], set[str]]] = {
    "opd_full": ("opd_full", (), NO_ADVANTAGES, set()),
    "opd_policy_gradient": ("opd_policy_gradient", (), set(), {"loss/clip_fraction"}),
    "opd_supervised_estimator": (
        "opd_supervised_estimator",
        (),
        NO_ADVANTAGES,
        {"loss/estimator", "loss/importance_clip_fraction"},
    ),
    "reward_weighted": (
        "reward_weighted",
        (),
        NO_ADVANTAGES,
        {"credit/reward_mean", "credit/weight_max"},
    ),
    "paced": ("paced", (), NO_ADVANTAGES, {"credit/pass_rate_mean", "credit/effective_samples"}),
    "tip": ("tip", (), NO_ADVANTAGES, {"loss/selected_fraction"}),
    "schedule": ("[paced,schedule]", (), NO_ADVANTAGES, {"credit/weight_max"}),
    "multi_teacher": ("multi_teacher", MATH, NO_ADVANTAGES, set()),
    "self_distill": ("self_distill", (), NO_ADVANTAGES, set()),
    "opsd": ("opsd", (), NO_ADVANTAGES, set()),
    "lora": ("[opd_policy_gradient,lora]", (), set(), {"credit/advantage_std"}),
    "grpo": ("grpo", (), NO_TEACHER, {"credit/reward_mean", "credit/no_spread_fraction"}),
    "grpo with a KL to the start": ("grpo", KL_TO_THE_START, set(), {"credit/reward_mean"}),
    "Dr.GRPO": ("grpo", DR_GRPO, NO_TEACHER, {"credit/reward_mean"}),
    "opd_plus_reward": ("opd_plus_reward", (), set(), {"credit/reward_mean"}),
    "gkd of given responses": ("gkd", GIVEN, NO_ADVANTAGES | NO_SAMPLES, {"rollout/data_fraction"}),
}
ELSEWHERE = {"gkd", "distillm", "sequence_kd", "sft"}  # test_mixture_run.py


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipes")
    config = make_run(directory)
    path = directory / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["response"] = "ab" * (i % 5) + "c"
        row["teacher_prompt"] = "abc " + row["prompt"]
        row["data_source"] = "math" if i % 2 else ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = directory / "reward.py"
    reward.write_text("def odd(response, answer):\n    return float(len(response) % 2)\n")
    return config


def test_every_recipe_is_run() -> None:
    files = {file.stem for file in (ROOT / "conf" / "recipes").glob("*.yaml")}
    assert files == ELSEWHERE | {name for name in CASES if name in files}


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_trains_and_logs_what_it_measures(config: Path, tmp_path: Path, name: str) -> None:
    recipes, words, missing, besides = CASES[name]
    done = run_training(
        config,
        1,
        f"+recipes={recipes}",
        *(word.format(config.parent) for word in words),
        f"run.dir={tmp_path}",
        f"eval.reward={config.parent}/reward.py:odd",
        f"loss.entropy_coef={BONUS}",
        "train.num_steps=2",
        "data.eval=",
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert WATCHED & row.keys() == WATCHED - missing
        assert besides <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert row["loss/entropy"] == pytest.approx(-BONUS * row["student/entropy"])
        assert row.get("rollout/mismatch_kl", 0.0) < 1e-6
        assert row["train/skipped"] == 0
        assert row["train/grad_norm"] > 1e-3
