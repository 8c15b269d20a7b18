"""Rewards by name. A new one is a function (response, answer) -> [0, 1] and a line in `REWARDS`."""

from __future__ import annotations

from megaopd.protocols import Reward
from megaopd.rewards.text_match import exact_match, first_line, zero

REWARDS: dict[str, Reward] = {
    "exact_match": exact_match,
    "first_line": first_line,
    "zero": zero,
}
