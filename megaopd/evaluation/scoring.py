"""How well an engine answers prompts: generate, decode, score. It knows no model and no trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.errors import DataError, RolloutError
from megaopd.protocols import Reward, RolloutEngine


class Decoder(Protocol):
    """What evaluation asks of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...


@dataclass(frozen=True)
class EvalRecord:
    """One evaluated response.

    Attributes:
        prompt_text: the prompt as the model saw it, special tokens included.
        response_text: the response without special tokens; of a conversation with tools, what
            comes after the last result, which is what the reward sees.
        correct: the reward gave full marks.
        score: the reward, in [0, 1].
        truncated: the response reached the length limit before a stop token.
    """

    prompt_id: str
    prompt_text: str
    answer: str | None
    response_text: str
    response_ids: tuple[int, ...]
    correct: bool
    score: float
    truncated: bool


@dataclass(frozen=True)
class EvalResult:
    """An evaluation, equal on every rank.

    Attributes:
        accuracy: mean score over the responses, in [0, 1]; prompts that the engine set aside have
            none.
        records: one per response, ordered by prompt then index.
        mean_length: response tokens, the stop token included.
        truncated_fraction: responses that were cut at the length limit.
    """

    accuracy: float
    records: tuple[EvalRecord, ...]
    mean_length: float
    truncated_fraction: float

    @classmethod
    def of(cls, records: Sequence[EvalRecord]) -> EvalResult:
        return cls(
            accuracy=sum(r.score for r in records) / len(records),
            records=tuple(records),
            mean_length=sum(len(r.response_ids) for r in records) / len(records),
            truncated_fraction=sum(r.truncated for r in records) / len(records),
        )


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    reward: Reward,
    tokenizer: Decoder,
    params: SamplingParams,
    *,
    greedy: bool = True,
) -> EvalResult:
    """Generates and scores responses to `prompts`; collective, as the engine is.

    Args:
        params: lengths and stop tokens, and all of sampling unless `greedy`.
        greedy: one response per prompt at temperature 0, whatever `params` says.

    Raises:
        DataError: there are no prompts, or the reward needs an answer that a prompt lacks.
        RolloutError: the engine cannot answer, or set every prompt aside.
    """
    if not prompts:
        raise DataError(
            "evaluation prompts", "there are none", "set data.eval to a file with prompts"
        )
    if greedy:
        params = replace(params, temperature=0.0, n=1)
    samples = engine.generate(prompts, params)
    if not samples:
        raise nothing_sampled("evaluation")
    return EvalResult.of([_record(s, reward, tokenizer) for s in samples])


def nothing_sampled(where: str) -> RolloutError:
    """What ends a run whose engine has no sample of any prompt that it was asked for."""
    return RolloutError(where, "the engine set every prompt aside", "look at its log for why")


def _record(sample: Sample, reward: Reward, tokenizer: Decoder) -> EvalRecord:
    last_turn = list(sample.response_ids)[_last_turn(sample) :]
    response_text = tokenizer.decode(last_turn, skip_special_tokens=True)
    score = reward(response_text, sample.prompt.answer)
    return EvalRecord(
        prompt_id=sample.prompt.prompt_id,
        prompt_text=tokenizer.decode(list(sample.prompt.token_ids), skip_special_tokens=False),
        answer=sample.prompt.answer,
        response_text=response_text,
        response_ids=sample.response_ids,
        correct=score >= 1.0,
        score=score,
        truncated=sample.finish_reason == "length",
    )


def _last_turn(sample: Sample) -> int:
    """Where the student's last turn begins in the response."""
    given = [place for place, own in enumerate(sample.response_mask) if not own]
    return given[-1] + 1 if given else 0
