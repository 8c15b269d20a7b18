"""How well an engine answers prompts: generate, decode, score. It knows no model and no trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.errors import DataError, MegaOPDError, RolloutError
from megaopd.evaluation.estimates import (
    Estimate,
    Figures,
    default_ks,
    estimate,
    majority,
    pass_at_k,
    quantile,
)
from megaopd.evaluation.voting import answer_of
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
        index: which of the prompt's samples it is, from 0.
    """

    prompt_id: str
    prompt_text: str
    answer: str | None
    response_text: str
    response_ids: tuple[int, ...]
    correct: bool
    score: float
    truncated: bool
    index: int = 0


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
            accuracy=fmean(r.score for r in records),
            records=tuple(records),
            mean_length=fmean(len(r.response_ids) for r in records),
            truncated_fraction=fmean(r.truncated for r in records),
        )

    @property
    def num_prompts(self) -> int:
        """Prompts with responses."""
        return len(by_prompt(self.records))


def by_prompt(records: Sequence[EvalRecord]) -> dict[str, list[EvalRecord]]:
    """The records of each prompt, in their order."""
    found: dict[str, list[EvalRecord]] = {}
    for record in records:
        found.setdefault(record.prompt_id, []).append(record)
    return found


def figures(records: Sequence[EvalRecord], reward: str, ks: Sequence[int] = ()) -> Figures:
    """What some records amount to; equally many of every prompt.

    Args:
        reward: the name of the reward, which says what a response's answer is.
        ks: for pass@k; empty takes 1, 2, 4, ... and the number of samples.

    Raises:
        ValueError: no records, prompts with different numbers of them, or a k above that number.
    """
    groups = list(by_prompt(records).values())
    sizes = {len(group) for group in groups}
    if len(sizes) != 1:
        raise ValueError(f"prompts have {sorted(sizes)} samples")
    n = sizes.pop()
    ks = ks or default_ks(n)
    answers = [[answer_of(reward, r.response_text) for r in group] for group in groups]
    correct = [sum(r.correct for r in group) for group in groups]

    def mean_of(values: Sequence[Sequence[float]]) -> Estimate:
        return estimate([fmean(own) for own in values], n)

    lengths = [len(r.response_ids) for r in records]
    right = [len(r.response_ids) for r in records if r.correct]
    wrong = [len(r.response_ids) for r in records if not r.correct]
    return Figures(
        num_prompts=len(groups),
        num_samples=n,
        mean=mean_of([[r.score for r in group] for group in groups]),
        pass_at={
            k: estimate([pass_at_k(n, c, k) for c in correct], n) for k in ks or default_ks(n)
        },
        majority=estimate(
            [
                majority(own, [r.score for r in group])
                for own, group in zip(answers, groups, strict=True)
            ]
        ),
        lengths={
            "mean": fmean(lengths),
            "median": quantile(lengths, 0.5),
            "p90": quantile(lengths, 0.9),
            "max": float(max(lengths)),
            "mean_correct": fmean(right) if right else None,
            "mean_wrong": fmean(wrong) if wrong else None,
        },
        truncated=mean_of([[float(r.truncated) for r in group] for group in groups]),
        unanswered=fmean(answer is None for own in answers for answer in own),
    )


def eval_metrics(result: EvalResult, reward: str) -> dict[str, float]:
    """An evaluation during training as metrics; `eval/pass_at_K` and `eval/majority` where prompts
    have several samples."""
    found = figures(result.records, reward)
    metrics = {
        "eval/accuracy": found.mean.value,
        "eval/accuracy_low": found.mean.low,
        "eval/accuracy_high": found.mean.high,
        "eval/response_tokens_mean": result.mean_length,
        "eval/truncated_fraction": result.truncated_fraction,
    }
    if found.num_samples > 1:
        metrics |= {f"eval/pass_at_{k}": e.value for k, e in found.pass_at.items() if k > 1}
        metrics["eval/majority"] = found.majority.value
    return metrics


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    reward: Reward,
    tokenizer: Decoder,
    params: SamplingParams,
) -> EvalResult:
    """Generates and scores responses to `prompts`; collective, as the engine is.

    Raises:
        DataError: there are no prompts, or the reward needs an answer that a prompt lacks.
        RolloutError: the engine cannot answer, or set every prompt aside.
    """
    if not prompts:
        raise DataError(
            "evaluation prompts", "there are none", "set data.eval to a file with prompts"
        )
    samples = engine.generate(prompts, params)
    if not samples:
        raise nothing_sampled("evaluation")
    return EvalResult.of(score_all(samples, reward, tokenizer))


def score_all(samples: Sequence[Sample], reward: Reward, tokenizer: Decoder) -> list[EvalRecord]:
    """Decodes and scores samples, in their order; see `rewards_of`."""
    scores = rewards_of(samples, reward, tokenizer)
    return [_record(s, score, tokenizer) for s, score in zip(samples, scores, strict=True)]


def rewards_of(samples: Sequence[Sample], reward: Reward, tokenizer: Decoder) -> list[float]:
    """The rewards of samples, in their order. Where processes are joined it is collective, with the
    same samples on every rank: each scores a part of them, and all have the same scores, also of a
    check whose time limit may end it here and not there.

    Raises:
        MegaOPDError: on every rank alike: the reward cannot score one of them.
    """
    import torch.distributed as dist

    joined = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    mine: list[float] | MegaOPDError
    try:
        mine = [reward(_response_text(s, tokenizer), s.prompt.answer) for s in samples[rank::size]]
    except MegaOPDError as error:
        mine = error
    parts = [mine]
    if size > 1:
        parts *= size
        dist.all_gather_object(parts, mine)
    scores = [0.0] * len(samples)
    for first, part in enumerate(parts):
        if isinstance(part, MegaOPDError):
            part.agreed = True
            raise part
        scores[first::size] = part
    return scores


def nothing_sampled(where: str) -> RolloutError:
    """What ends a run whose engine has no sample of any prompt that it was asked for."""
    return RolloutError(where, "the engine set every prompt aside", "look at its log for why")


def _record(sample: Sample, score: float, tokenizer: Decoder) -> EvalRecord:
    return EvalRecord(
        prompt_id=sample.prompt.prompt_id,
        prompt_text=tokenizer.decode(list(sample.prompt.token_ids), skip_special_tokens=False),
        answer=sample.prompt.answer,
        response_text=_response_text(sample, tokenizer),
        response_ids=sample.response_ids,
        correct=score >= 1.0,
        score=score,
        truncated=sample.finish_reason == "length",
        index=sample.index,
    )


def _response_text(sample: Sample, tokenizer: Decoder) -> str:
    """The student's last turn, without special tokens."""
    given = [place for place, own in enumerate(sample.response_mask) if not own]
    last_turn = list(sample.response_ids)[given[-1] + 1 if given else 0 :]
    return tokenizer.decode(last_turn, skip_special_tokens=True)
