"""Figures of an evaluation against enumeration and simulation."""

from __future__ import annotations

import random
from itertools import combinations, product
from statistics import fmean

import pytest

from megaopd.evaluation.estimates import (
    default_ks,
    estimate,
    majority,
    pass_at_k,
    quantile,
)
from megaopd.evaluation.scoring import EvalRecord, EvalResult, eval_metrics, figures
from megaopd.evaluation.voting import ANSWERS, answer_of
from megaopd.rewards import REWARDS


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int):
    for c, k in product(range(n + 1), range(1, n + 1)):
        samples = [i < c for i in range(n)]
        subsets = list(combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(fmean(any(s) for s in subsets), abs=1e-15)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_pass_at_k_is_unbiased(rate: float, k: int):
    """Its mean over all outcomes of n independent samples is 1 - (1 - rate)^k, exactly."""
    n = 5
    mean = 0.0
    for outcome in product([True, False], repeat=n):
        c = sum(outcome)
        mean += rate**c * (1 - rate) ** (n - c) * pass_at_k(n, c, k)
    assert mean == pytest.approx(1 - (1 - rate) ** k, abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact():
    # C(900, 500) / C(1000, 500) is far below the smallest float next to 1; nothing overflows.
    assert pass_at_k(1000, 100, 500) == 1.0
    assert pass_at_k(1000, 1, 500) == 0.5
    assert pass_at_k(1000, 0, 500) == 0.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 0), (4, 1, 5)])
def test_pass_at_k_needs_k_samples(n: int, c: int, k: int):
    with pytest.raises(ValueError, match=f"pass@{k} of {n} samples"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("n", "ks"), [(1, (1,)), (2, (1, 2)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (16, (1, 2, 4, 8, 16))]
)
def test_default_ks(n: int, ks: tuple[int, ...]):
    assert default_ks(n) == ks


@pytest.mark.parametrize(
    ("answers", "scores", "score"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8"], [1, 0], 0.5),  # one of the two is drawn
        (["7", "8", "9"], [1, 0, 0], 1 / 3),
        ([None, None, "7"], [0, 0, 1], 1.0),  # no answer is no vote
        ([None, None], [0, 0], 0.0),
        (["7", "7"], [1, 0.5], 0.75),  # partial marks
    ],
)
def test_majority(answers, scores, score):
    assert majority(answers, scores) == pytest.approx(score)


def test_a_majority_of_all_sequences():
    """The tie-break is fair: the mean over all orders of votes is the same for both sides."""
    votes = ["a", "a", "b", "b"]
    marks = {"a": 1.0, "b": 0.0}
    for order in product(votes, repeat=4):
        swapped = ["b" if v == "a" else "a" for v in order]
        ours = majority(order, [marks[v] for v in order])
        theirs = majority(swapped, [marks[v] for v in swapped])
        assert ours + theirs == 1.0


def test_intervals():
    # Wilson's interval of 7 of 10 (z = 1.95996), as tables have it.
    found = estimate([1.0] * 7 + [0.0] * 3)
    # The variance of a sample of 10 divides by 9: the effective size is 9.
    z, p, n = 1.959963984540054, 0.7, 9
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.7, centre - half, centre + half)
    )
    # Nothing seen of the other kind is no certainty.
    assert estimate([0.0] * 30).high == pytest.approx(z * z / (30 + z * z))
    assert estimate([0.0] * 30).low == 0.0
    assert estimate([1.0] * 30).low == pytest.approx(1 - z * z / (30 + z * z))
    assert estimate([1.0] * 30).high == 1.0
    # Prompts that do not differ: what is left is the noise of all samples.
    assert estimate([0.5] * 10, num_samples=4).low == pytest.approx(
        estimate([0, 1] * 20 + [0.5]).low, abs=0.01
    )
    assert estimate([0.25]).low > 0.0
    with pytest.raises(ValueError, match="no prompt"):
        estimate([])


@pytest.mark.parametrize("num_prompts", [30, 200])
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.3, 0.3), (0.5, 4.0)])
def test_intervals_hold_what_they_promise(num_prompts: int, a: float, b: float):
    """Prompts of beta-distributed difficulty, 8 samples each: the true mean lies in 95 % of the
    intervals. As if the samples were independent, it would lie in far fewer."""
    rng = random.Random(7)
    truth, n, trials = a / (a + b), 8, 400
    inside = naive = 0
    for _ in range(trials):
        rates = [rng.betavariate(a, b) for _ in range(num_prompts)]
        means = [sum(rng.random() < r for _ in range(n)) / n for r in rates]
        found = estimate(means, n)
        inside += found.low <= truth <= found.high
        flat = [x for m in means for x in [1.0] * round(m * n) + [0.0] * round(n - m * n)]
        independent = estimate(flat)
        naive += independent.low <= truth <= independent.high
    assert 0.92 <= inside / trials <= 0.98
    assert naive / trials < 0.85


def record(prompt_id: str, text: str, score: float, length: int, cut: bool = False, index: int = 0):
    return EvalRecord(prompt_id, "ask", "7", text, (1,) * length, score >= 1.0, score, cut, index)


def test_figures():
    records = [
        record("a", "\\boxed{7}", 1.0, 10),
        record("a", "\\boxed{8}", 0.0, 20, index=1),
        record("a", "\\boxed{8}", 0.0, 30, index=2),
        record("b", "nothing", 0.0, 40, cut=True),
        record("b", "\\boxed{ 7 }", 1.0, 50, index=1),
        record("b", "Answer: 7", 1.0, 60, index=2),
    ]
    found = figures(records, "math", [1, 2])
    assert (found.num_prompts, found.num_samples) == (2, 3)
    assert found.mean.value == pytest.approx(0.5)
    assert found.pass_at[1].value == pytest.approx(0.5)
    assert found.pass_at[2].value == pytest.approx((2 / 3 + 1) / 2)
    assert found.majority.value == pytest.approx(0.5)
    assert found.lengths == {
        "mean": 35.0,
        "median": 30.0,
        "p90": 60.0,
        "max": 60.0,
        "mean_correct": 40.0,
        "mean_wrong": 30.0,
    }
    assert found.truncated.value == pytest.approx(1 / 6)
    assert found.unanswered == pytest.approx(1 / 6)
    metrics = eval_metrics(EvalResult.of(records), "math")
    assert metrics["eval/accuracy"] == pytest.approx(0.5)
    assert metrics["eval/accuracy_low"] < 0.5 < metrics["eval/accuracy_high"]
    assert metrics["eval/pass_at_2"] == found.pass_at[2].value
    assert metrics["eval/pass_at_3"] == 1.0
    assert metrics["eval/majority"] == pytest.approx(0.5)
    assert "eval/pass_at_1" not in metrics
    alone = eval_metrics(EvalResult.of([records[0]]), "math")
    assert not any(name.startswith(("eval/pass", "eval/maj")) for name in alone)


def test_figures_need_as_many_samples_of_every_prompt():
    with pytest.raises(ValueError, match=r"prompts have \[1, 2\] samples"):
        figures([record("a", "", 0, 1), record("a", "", 0, 1), record("b", "", 0, 1)], "math")


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1.0), (0.5, 2.0), (0.75, 3.0), (0.76, 4.0), (1.0, 4.0)]
)
def test_quantiles(share: float, value: float):
    assert quantile([4, 2, 1, 3], share) == value


# Of every reward that looks at a part of the response: (response, what it votes for).
VOTES = {
    "exact_match": [(" a b \n", "a b"), ("  ", None)],
    "first_line": [("\n7 \n8", "7"), ("", None)],
    "gsm8k": [("<think>#### 3</think> so #### $1,234.50", "1234.5"), ("7", None)],
    "math": [
        ("\\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
        ("\\boxed{1,000}", "1000"),
        ("\\boxed{007}", "7"),
        ("\\boxed{-0.50}", "-0.5"),
        ("\\boxed{1,2}", "1,2"),  # a pair
        ("\\boxed{7 apples}", "7apples"),
        ("I think 7", None),
    ],
    "reasoning_gym": [("<answer>7</answer>", "7"), ("7", None)],
    "own.py:function": [("Answer: x", "x")],
}


@pytest.mark.parametrize("reward", VOTES)
def test_votes(reward: str):
    for response, vote in VOTES[reward]:
        assert answer_of(reward, response) == vote


def test_every_entry_is_a_reward_and_is_shown():
    assert set(ANSWERS) <= set(REWARDS)
    assert set(ANSWERS) <= set(VOTES)
