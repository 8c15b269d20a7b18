"""Rewards that compare the response's text with the reference answer."""

from __future__ import annotations

from megaopd.errors import DataError


def exact_match(response: str, answer: str | None) -> float:
    """1 if the response is the answer, blanks and line breaks around either aside."""
    return float(response.strip() == _required(answer))


def first_line(response: str, answer: str | None) -> float:
    """1 if the first line that is not blank is the answer; what comes after it does not count."""
    lines = response.strip().splitlines()
    return float((lines[0].strip() if lines else "") == _required(answer))


def zero(response: str, answer: str | None) -> float:
    """0: for runs without a checkable answer."""
    return 0.0


def _required(answer: str | None) -> str:
    if answer is None:
        raise DataError(
            "answer", "a prompt has none, and the reward needs one", "add it, or use reward zero"
        )
    return answer.strip()
