"""Ranks share the work of scoring, and agree on what came of it."""

from __future__ import annotations

from megaopd.batch import Prompt, Sample
from megaopd.errors import DataError
from megaopd.evaluation.scoring import rewards_of
from tests.helpers.distributed import run_distributed

SAMPLES = [
    Sample(Prompt(f"p{i}", (1,), str(i)), 0, (i,), (0.0,), (True,), "stop", 0) for i in range(7)
]


class Digits:
    def decode(self, token_ids, *, skip_special_tokens=False):
        return "".join(map(str, token_ids))


def of_a_rank(rank: int, world_size: int, unscorable: str) -> tuple[list, list[str]]:
    """What came of it here, and what was scored here."""
    scored = []

    def reward(response: str, answer: str | None) -> float:
        scored.append(response)
        if response == unscorable:
            raise DataError("answer", "broken", "mend it")
        return int(response) / 8

    try:
        return rewards_of(SAMPLES, reward, Digits()), scored
    except DataError as error:
        return [str(error), error.agreed], scored


def test_ranks_score_a_part_each_and_have_all():
    (first, mine), (second, theirs) = run_distributed(of_a_rank, 2, "")
    assert first == second == [i / 8 for i in range(7)]
    assert (mine, theirs) == (list("0246"), list("135"))


def test_what_one_rank_cannot_score_ends_all_of_them():
    for found, _ in run_distributed(of_a_rank, 2, "3"):
        assert found == ["answer: broken; mend it", True]
