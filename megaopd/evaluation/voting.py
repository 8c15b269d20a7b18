"""What a response's answer is, for the majority vote: the part of it that its reward looks at.

A reward without an entry in `ANSWERS` takes part with the final answer that a response marks.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from megaopd.data.answers import after_thinking, final_answer, hash_number, plain_number, tagged

# Commas between thousands alone: 1,2 is a pair.
_NUMBER = re.compile(r"[-+]?\$?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?", re.ASCII)


def _whole(response: str) -> str | None:
    return response.strip() or None


def _first_line(response: str) -> str | None:
    lines = response.strip().splitlines()
    return lines[0].strip() if lines else None


ANSWERS: dict[str, Callable[[str], str | None]] = {
    "exact_match": _whole,
    "first_line": _first_line,
    "gsm8k": lambda response: hash_number(after_thinking(response)),
    "reasoning_gym": lambda response: tagged(after_thinking(response)),
}


def answer_of(reward: str, response: str) -> str | None:
    """The answer that a response votes for under a reward of this name, None for no vote.

    Answers are compared as text: blanks do not count, and numbers are written in one way.
    """
    found = ANSWERS.get(reward, final_answer)(response)
    if found is None:
        return None
    if reward in ("exact_match", "first_line"):
        return found
    found = "".join(found.split())
    return plain_number(found) if _NUMBER.fullmatch(found) else found or None
