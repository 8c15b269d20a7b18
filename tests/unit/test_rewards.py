"""Rewards: what every entry of the table promises, and the values of each."""

from __future__ import annotations

import pytest

from megaopd.errors import DataError
from megaopd.rewards import REWARDS

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
}


@pytest.mark.parametrize("name", REWARDS)
def test_scores(name):
    for response, answer, score in SCORES[name]:
        assert REWARDS[name](response, answer) == score, (response, answer)


@pytest.mark.parametrize("name", sorted(set(REWARDS) - {"zero"}))
def test_a_missing_answer_is_an_error_of_the_data(name):
    with pytest.raises(DataError, match="answer"):
        REWARDS[name]("39", None)
