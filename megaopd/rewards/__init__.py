"""Rewards by name. A new one is a function (response, answer) -> [0, 1] and a line in `REWARDS`."""

from __future__ import annotations

from collections.abc import Sequence

from megaopd.batch import Prompt
from megaopd.config_schema import nearest
from megaopd.errors import ConfigError, DataError, MegaOPDError
from megaopd.protocols import Reward
from megaopd.rewards.math_answer import math_answer
from megaopd.rewards.own import is_own, load_own
from megaopd.rewards.reasoning import reasoning_gym
from megaopd.rewards.text_match import exact_match, first_line, gsm8k, marked, zero

REWARDS: dict[str, Reward] = {
    "math": math_answer,
    "gsm8k": gsm8k,
    "exact_match": exact_match,
    "first_line": first_line,
    "format": marked,
    "reasoning_gym": reasoning_gym,
    "zero": zero,
}


def find_reward(name: str, key: str = "eval.reward") -> Reward:
    """The reward of a name: an entry of `REWARDS`, or the user's own, ``path.py:function``.

    Args:
        key: the configuration's, for the message.

    Raises:
        ConfigError: there is none, or the user's cannot be loaded.
    """
    if is_own(name):
        return load_own(name, key)
    if name not in REWARDS:
        close = nearest(name, REWARDS)
        guess = f"did you mean {close}? " if close else ""
        raise ConfigError(
            key, f"no {name!r}", f"{guess}choose one of {', '.join(REWARDS)} or path.py:function"
        )
    return REWARDS[name]


def check_answers(prompts: Sequence[Prompt], reward: Reward) -> None:
    """Says now what would end the run at its first score.

    Raises:
        DataError: a prompt has no answer, and the reward needs one.
    """
    without = next((prompt for prompt in prompts if prompt.answer is None), None)
    if without is None:
        return
    try:
        reward("", None)
    except DataError as error:
        found = "has no answer, and the reward needs one"
        raise DataError(f"prompt {without.prompt_id}", found, error.parts[2]) from error
    except MegaOPDError:
        pass  # one of the user's own, which nobody asked for an empty response
