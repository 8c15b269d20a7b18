"""Rewards: what every entry of the table promises, and the values of each."""

from __future__ import annotations

import pytest

from megaopd.errors import ConfigError, DataError
from megaopd.rewards import REWARDS, find_reward

CHAIN_SUM = '{"task": "chain_sum", "answer": "7", "metadata": {}}'

# reward -> (response, answer, score); every entry of the table has its rows here.
SCORES = {
    "exact_match": [
        ("39", "39", 1),
        (" 39\n", "39", 1),
        ("39", " 39 ", 1),
        ("390", "39", 0),
        ("39\n40", "39", 0),
        ("Red", "red", 0),
        ("", "39", 0),
        ("", "", 1),
    ],
    "first_line": [
        ("39", "39", 1),
        ("\n \n 39 \nand so on", "39", 1),
        ("40\n39", "39", 0),
        ("39 and so on", "39", 0),
        ("", "39", 0),
        (" \n ", "", 1),
    ],
    "zero": [("39", "39", 0), ("39", None, 0)],
    "gsm8k": [
        ("so\n#### 1,234", "1234", 1),
        ("#### $12.50", "12.5", 1),
        ("#### 5 apples", "2+3 = 5\n#### 5", 1),
        ("#### 4\n#### 5", "5", 1),
        ("#### 5\n#### 4", "5", 0),
        ("<think>#### 5</think> so", "5", 0),
        ("the answer is 5", "5", 0),
        ("#### x", "5", 0),
    ],
    "format": [
        ("<think>hm</think> \\boxed{1}", "2", 1),
        ("hm\nAnswer: 1", None, 1),
        ("#### 7", None, 1),
        ("<think>\\boxed{1}", None, 0),
        ("</think></think>\\boxed{1}", None, 0),
        ("1", None, 0),
    ],
    "math": [
        ("so \\boxed{\\frac12}", "0.5", 1),
        ("Answer: $\\frac{14}{3}$.", "\\frac{14}{3}", 1),
        ("**Answer:** 034", "34", 1),
        ("#### 1,234", "1234", 1),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", 1),
        ("\\boxed{2\\sqrt{3}+1}", "1+2\\sqrt3", 1),
        ("\\boxed{x=3}", "3", 1),
        ("\\boxed{-2,1}", "1,-2", 1),
        ("\\boxed{(1,2)}", "\\left(1, 2\\right)", 1),
        ("\\boxed{90^\\circ}", "90", 1),
        ("\\boxed{5\\text{ cm}}", "\\boxed{5}", 1),
        ("\\boxed{C}", "\\text{(C)}", 1),
        ("\\boxed{q-p}", "p-q", 0),
        ("\\boxed{0.33}", "1/3", 0),
        ("\\boxed{1} \\boxed{2}", "1", 0),
        ("<think>\\boxed{1}</think>\\boxed{2}", "1", 0),
        ("<think>\\boxed{1}", "1", 0),
        ("it is 1", "1", 0),
        ("\\boxed{}", "1", 0),
        ("\\boxed{__import__('os')}", "1", 0),
        ("\\boxed{\ud800}", "1", 0),
        ("\\boxed{" + "1" * 5000 + "}", "x", 0),
    ],
    "reasoning_gym": [
        ("so <answer>7</answer>", CHAIN_SUM, 1),
        ("<answer>8</answer><answer>7</answer>", CHAIN_SUM, 1),
        ("<answer>8</answer>", CHAIN_SUM, 0),
        ("7", CHAIN_SUM, 0),
        ("<think><answer>7</answer>", CHAIN_SUM, 0),
    ],
}
# What needs no answer.
WITHOUT = {"zero", "format"}


SLOW = [pytest.param(n, marks=pytest.mark.slow if n == "reasoning_gym" else ()) for n in REWARDS]


@pytest.mark.parametrize("name", SLOW)
def test_scores(name):
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    for response, answer, score in SCORES[name]:
        assert REWARDS[name](response, answer) == score, (response, answer)


@pytest.mark.parametrize("name", sorted(set(REWARDS) - WITHOUT))
def test_a_missing_answer_is_an_error_of_the_data(name):
    with pytest.raises(DataError, match="answer"):
        REWARDS[name]("39", None)


def test_the_reward_of_reasoning_gym_needs_its_own_prompts():
    with pytest.raises(DataError, match="a prompt's is not JSON with task, answer and metadata"):
        REWARDS["reasoning_gym"]("<answer>7</answer>", "7")


OWN = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Length:
    value: int

def score(response: str, answer: str | None) -> float:
    return min(1.0, Length(len(response)).value / 10)

def wild(response, answer):
    return response

def broken(response, answer):
    return 1 / 0

def alone(response):
    return 1.0

LIMIT = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(OWN)
    (tmp_path / "bad.py").write_text("import nowhere_to_be_found\n")


@pytest.mark.usefixtures("own")
def test_a_function_of_the_users_is_a_reward():
    reward = find_reward("my.py:score")
    assert reward("12345", None) == 0.5
    assert find_reward("exact_match") is REWARDS["exact_match"]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.py:score", "eval.reward: no file 'none.py'; name it from the working directory"),
        (
            "my.py:skore",
            "eval.reward: my.py has no function 'skore'; its functions are score, wild",
        ),
        ("my.py:LIMIT", "eval.reward: my.py has no function 'LIMIT'"),
        ("my.py:alone", "eval.reward: alone(response) of my.py; it must take (response: str, "),
        (
            "bad.py:score",
            "eval.reward: bad.py cannot be imported (line 1: ModuleNotFoundError: No module named "
            "'nowhere_to_be_found'); mend it",
        ),
        ("maths", "eval.reward: no 'maths'; did you mean math? choose one of math, gsm8k, "),
    ],
)
def test_a_reward_that_there_is_not_is_one_line(name, message):
    with pytest.raises(ConfigError) as caught:
        find_reward(name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my.py:wild", "my.py:wild returned 'x'; return a number in [0, 1]"),
        ("my.py:broken", "my.py:broken failed (line 16: ZeroDivisionError: division by zero)"),
    ],
)
def test_what_a_function_of_the_users_returns_is_checked(name, message):
    with pytest.raises(ConfigError) as caught:
        find_reward(name)("x", None)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match=r"returned '1\.5'"):
        find_reward("my.py:wild")("1.5", None)
