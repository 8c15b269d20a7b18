"""Evaluation over an engine with known answers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.errors import DataError
from megaopd.evaluation import EvalRecord, evaluate
from megaopd.rewards import REWARDS

EOS = 0
PARAMS = SamplingParams(max_new_tokens=5, temperature=0.0, stop_token_ids=(EOS,))


class Letters:
    """A tokenizer: id 1 is "a"; id 0 is the end of the text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        letters = ["" if i == EOS and skip_special_tokens else "#abcdefgh"[i] for i in token_ids]
        return "".join(letters)


class Scripted:
    """An engine that answers each prompt with fixed responses."""

    weight_version = 0

    def __init__(self, responses: dict[str, list[tuple[int, ...]]]) -> None:
        self.responses = responses
        self.asked: list[SamplingParams] = []

    def load_weights(self, weights, version) -> None:
        raise AssertionError("evaluation loads nothing")

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        self.asked.append(params)
        return [
            Sample(
                prompt=prompt,
                index=index,
                response_ids=ids,
                response_logprobs=(0.0,) * len(ids),
                response_mask=(True,) * len(ids),
                finish_reason="stop" if ids[-1] == EOS else "length",
                weight_version=0,
            )
            for prompt in prompts
            for index, ids in enumerate(self.responses[prompt.prompt_id][: params.n])
        ]


PROMPTS = [
    Prompt("right", (EOS, 1), "bc"),
    Prompt("wrong", (2,), "b"),
    Prompt("cut", (3,), "aaaaa"),
    Prompt("late", (4,), "d"),
]
RESPONSES = {
    "right": [(2, 3, EOS), (2, 2, EOS)],
    "wrong": [(3, EOS), (2, EOS)],
    "cut": [(1, 1, 1, 1, 1), (1, EOS)],
    "late": [(1, 2, 3, 4, 5), (4, EOS)],
}


def test_evaluation():
    engine = Scripted(RESPONSES)
    result = evaluate(engine, PROMPTS, REWARDS["exact_match"], Letters(), PARAMS)
    assert engine.asked == [PARAMS]
    assert result.num_prompts == 4
    assert result.accuracy == 0.5
    assert result.mean_length == (3 + 2 + 5 + 5) / 4
    assert result.truncated_fraction == 0.5
    assert result.records[0] == EvalRecord(
        prompt_id="right",
        prompt_text="#a",
        answer="bc",
        response_text="bc",
        response_ids=(2, 3, EOS),
        correct=True,
        score=1.0,
        truncated=False,
    )
    assert [(r.prompt_id, r.correct, r.truncated) for r in result.records[1:]] == [
        ("wrong", False, False),
        ("cut", True, True),
        ("late", False, True),
    ]


def test_sampled_evaluation_and_partial_marks():
    engine = Scripted(RESPONSES)
    params = SamplingParams(5, temperature=0.7, n=2)

    def half_or_full(response: str, answer: str | None) -> float:
        return 1.0 if response == answer else 0.5

    result = evaluate(engine, PROMPTS, half_or_full, Letters(), params)
    assert engine.asked == [params]
    assert [r.correct for r in result.records] == [
        True,
        False,
        False,
        True,
        True,
        False,
        False,
        True,
    ]
    assert result.accuracy == (4 * 1.0 + 4 * 0.5) / 8


def test_no_prompts():
    with pytest.raises(DataError, match="evaluation prompts: there are none"):
        evaluate(Scripted({}), [], REWARDS["zero"], Letters(), PARAMS)
