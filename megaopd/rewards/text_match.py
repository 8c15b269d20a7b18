"""Rewards that compare the response's text with the reference answer."""

from __future__ import annotations

from megaopd.data.answers import after_thinking, final_answer, hash_number, plain_number
from megaopd.errors import DataError


def exact_match(response: str, answer: str | None) -> float:
    """1 if the response is the answer, blanks and line breaks around either aside."""
    return float(response.strip() == required(answer))


def first_line(response: str, answer: str | None) -> float:
    """1 if the first line that is not blank is the answer; what comes after it does not count."""
    lines = response.strip().splitlines()
    return float((lines[0].strip() if lines else "") == required(answer))


def gsm8k(response: str, answer: str | None) -> float:
    """1 if the number behind the last `####`, after the thinking, is the answer; thousands
    separators, dollar signs and zeros that say nothing aside."""
    gold = required(answer)
    expected = hash_number(gold) or plain_number(gold)
    return float(expected is not None and hash_number(after_thinking(response)) == expected)


def marked(response: str, answer: str | None) -> float:
    r"""The reward `format`: 1 if the response came to an end of its thinking and marks a final
    answer, right or wrong: `\boxed{...}`, a line `Answer: ...`, or a number behind `####`."""
    balanced = response.count("<think>") <= response.count("</think>") <= 1
    return float(balanced and final_answer(response) is not None)


def zero(response: str, answer: str | None) -> float:
    """0: for runs without a checkable answer."""
    return 0.0


def required(answer: str | None) -> str:
    """The answer without blanks around it.

    Raises:
        DataError: there is none.
    """
    if answer is None:
        raise DataError(
            "answer",
            "a prompt has none, and the reward needs one",
            "name its column, or take the reward zero",
        )
    return answer.strip()
