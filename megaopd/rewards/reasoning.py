"""The reward `reasoning_gym`: the score that a task of reasoning-gym gives to an answer."""

from __future__ import annotations

import json

from megaopd.data.answers import after_thinking, tagged
from megaopd.errors import DataError
from megaopd.rewards.sandbox import Sandbox
from megaopd.rewards.text_match import required

_SANDBOX = Sandbox("reasoning_gym")


def reasoning_gym(response: str, answer: str | None) -> float:
    """The task's score of what stands between the last answer tags, 0 without them.

    Args:
        answer: JSON with `task`, `answer` and `metadata`, as `prepare_data.py reasoning_gym` writes
            it.

    Raises:
        DataError: it is something else.
        EnvironmentFault: reasoning-gym is not installed.
    """
    entry = required(answer)
    try:
        known = json.loads(entry)
    except json.JSONDecodeError:
        known = None
    if not isinstance(known, dict) or not {"task", "answer", "metadata"} <= known.keys():
        raise DataError(
            "answer",
            "a prompt's is not JSON with task, answer and metadata, which reasoning_gym needs",
            "make the prompts with prepare_data.py reasoning_gym, or choose another reward",
        )
    found = tagged(after_thinking(response))
    return 0.0 if found is None else _SANDBOX.score(found, entry)
