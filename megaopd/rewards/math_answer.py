r"""The reward `math`: is the final answer mathematically the reference answer?

Where the answer stands is decided by `megaopd.data.answers`: boxed, else on a line `Answer: ...`,
else behind `####`, after the thinking. A response that marks no answer scores 0, however right a
number in it is: looser rules teach a model to name many.
"""

from __future__ import annotations

import re

from megaopd.data.answers import final_answer, last_boxed
from megaopd.rewards.sandbox import Sandbox
from megaopd.rewards.text_match import required

_INTEGER = re.compile(r"[-+]?\d{1,300}", re.ASCII)
_SANDBOX = Sandbox("math")


def math_answer(response: str, answer: str | None) -> float:
    """1 if math-verify finds the final answer equal to the reference answer, else 0.

    The same text, and two integers, are compared here; everything else is read as LaTeX in a worker
    process, which one check cannot hold up for more than 3 s of CPU time.
    """
    gold = required(answer)
    gold = last_boxed(gold) or gold.removeprefix("$").removesuffix("$")
    found = final_answer(response)
    if found is None or not gold:
        return 0.0
    if found == gold:
        return 1.0
    if _INTEGER.fullmatch(found) and _INTEGER.fullmatch(gold):
        return float(int(found) == int(gold))
    return _SANDBOX.score(found, gold)
