"""Asks an engine all that is not yet in the journal, a portion at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.evaluation.scoring import EvalRecord
from megaopd.protocols import PendingRollout, RolloutEngine

# Portions that are under way at a time: servers need not wait for the last response of one.
AHEAD = 2


def answer_all(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    score: Callable[[Sequence[Sample]], list[EvalRecord]],
    *,
    done: Collection[str],
    add: Callable[[str, list[EvalRecord]], None],
    portion: int,
) -> None:
    """Generates and scores responses to the prompts that are not done; collective.

    A sample's random numbers follow from its prompt and index, so that the portions, and what was
    done before, change nothing about it.

    Args:
        score: records of samples, in their order.
        done: ids of prompts that need no responses any more, equal on every rank.
        add: takes the id of a prompt and its records; none of one that the engine set aside.
        portion: prompts that are asked for at a time.

    Raises:
        RolloutError: the engine cannot answer.
    """
    waiting = deque(prompt for prompt in prompts if prompt.prompt_id not in done)
    under_way: deque[tuple[list[Prompt], PendingRollout]] = deque()
    while waiting or under_way:
        while waiting and len(under_way) < AHEAD:
            asked = [waiting.popleft() for _ in range(min(portion, len(waiting)))]
            under_way.append((asked, engine.start(asked, params)))
        asked, pending = under_way.popleft()
        records: dict[str, list[EvalRecord]] = {prompt.prompt_id: [] for prompt in asked}
        for record in score(pending.result()):
            records[record.prompt_id].append(record)
        for prompt_id, own in records.items():
            add(prompt_id, own)
