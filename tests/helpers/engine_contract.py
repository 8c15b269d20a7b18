"""What every rollout engine does, as checks that each engine's tests run on a tiny model.

A check is an entry of `CONTRACT`: a function of a `Case`. An engine whose tests are parametrised
over the table is held to a new entry by its being entered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.errors import RolloutError
from megaopd.protocols import RolloutEngine

VOCAB = 512
PARAMS = SamplingParams(max_new_tokens=16, temperature=0.8, seed=5)
GREEDY = replace(PARAMS, temperature=0.0)
# fp32 against fp32, by other kernels and in another order of additions.
TOLERANCE = 1e-4


def make_prompts(lengths: list[int]) -> list[Prompt]:
    """Random prompts with a common beginning of six tokens."""
    random = torch.Generator().manual_seed(3)
    first = torch.randint(0, VOCAB, (6,), generator=random).tolist()
    rest = [torch.randint(0, VOCAB, (n,), generator=random).tolist() for n in lengths]
    return [Prompt(f"p{i}", tuple(first + ids)) for i, ids in enumerate(rest)]


PROMPTS = make_prompts([9, 1, 4, 17, 30])


@dataclass
class Case:
    """An engine to hold to the contract.

    Attributes:
        engine: with the weights of `model_dir`.
        model_dir: a Hugging Face directory in fp32.
        can_load: whether `load_weights` works.
        exact: whether log-probabilities do not depend on what else is in the batch.
    """

    engine: RolloutEngine
    model_dir: Path
    can_load: bool = True
    exact: bool = True

    @cached_property
    def model(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32).eval()

    def greedy(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """transformers' own greedy response."""
        ids = torch.tensor([prompt.token_ids])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=list(params.stop_token_ids) or None,
            pad_token_id=0,
        )
        return output[0, ids.shape[1] :].tolist()

    def logprobs(self, sample: Sample, temperature: float) -> Tensor:
        """The log-probabilities of a response by one forward pass over the whole sequence."""
        ids = torch.tensor([sample.prompt.token_ids + sample.response_ids])
        with torch.no_grad():
            logprobs = (self.model(ids).logits[0, :-1].double() / temperature).log_softmax(-1)
        start = len(sample.prompt.token_ids) - 1
        return logprobs[start:].gather(1, ids[0, start + 1 :, None])[:, 0]

    def max_error(self, samples: list[Sample], temperature: float) -> float:
        """The largest difference between the engine's log-probabilities and the forward pass's."""
        return max(
            float(
                (torch.tensor(s.response_logprobs).double() - self.logprobs(s, temperature))
                .abs()
                .max()
            )
            for s in samples
        )


def assert_same(case: Case, found: list[Sample], expected: list[Sample]) -> None:
    """Equal, but for the rounding of log-probabilities where the engine's depend on the batch."""
    if not case.exact:
        for one, other in zip(found, expected, strict=True):
            assert one.response_logprobs == pytest.approx(other.response_logprobs, abs=TOLERANCE)
        found = [
            replace(one, response_logprobs=other.response_logprobs)
            for one, other in zip(found, expected, strict=True)
        ]
    assert found == expected


def check_order_and_shapes(case: Case) -> None:
    params = replace(PARAMS, n=3, stop_token_ids=tuple(range(0, VOCAB, 16)))
    samples = case.engine.generate(PROMPTS, params)
    assert [s.sample_id for s in samples] == [f"p{i}/{j}" for i in range(5) for j in range(3)]
    for sample in samples:
        assert sample.prompt == PROMPTS[int(sample.prompt.prompt_id[1:])]
        count = len(sample.response_ids)
        assert 1 <= count <= params.max_new_tokens
        assert len(sample.response_logprobs) == count
        assert sample.response_mask == (True,) * count
        assert sample.weight_version == case.engine.weight_version
        assert set(sample.model_token_versions) == {case.engine.weight_version}
        ended = sample.response_ids[-1] in params.stop_token_ids
        assert sample.finish_reason == ("stop" if ended else "length")
        assert not set(sample.response_ids[:-1]) & set(params.stop_token_ids)
        assert ended or count == params.max_new_tokens
    # The samples of a prompt are different draws.
    assert len({s.response_ids for s in samples}) > 12


def check_greedy_is_transformers_greedy(case: Case) -> None:
    expected = [case.greedy(prompt, GREEDY) for prompt in PROMPTS]
    samples = case.engine.generate(PROMPTS, GREEDY)
    assert [list(s.response_ids) for s in samples] == expected
    assert {s.finish_reason for s in samples} == {"length"}
    stops = replace(GREEDY, stop_token_ids=(expected[0][2], expected[1][5], expected[2][0]))
    expected = [case.greedy(prompt, stops) for prompt in PROMPTS]
    samples = case.engine.generate(PROMPTS, stops)
    assert [list(s.response_ids) for s in samples] == expected
    assert len({len(s.response_ids) for s in samples}) > 1


def check_logprobs_are_those_of_a_forward_pass(case: Case) -> None:
    for options in ({}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9}, {"temperature": 0.0}):
        params = replace(PARAMS, n=2, stop_token_ids=tuple(range(0, VOCAB, 16)), **options)
        samples = case.engine.generate(PROMPTS, params)
        assert case.max_error(samples, params.temperature or 1.0) <= TOLERANCE


def check_the_model_s_own_end_token_ends_nothing(case: Case) -> None:
    """Only the request's stop tokens end a response, whatever the model's files say."""
    eos = case.model.config.eos_token_id
    params = replace(PARAMS, temperature=8.0, n=40, max_new_tokens=48, stop_token_ids=(1,))
    samples = case.engine.generate(PROMPTS[:1], params)
    before_end = [s for s in samples if eos in s.response_ids[:-1]]
    assert before_end  # at this temperature it is sampled now and then
    assert {s.finish_reason for s in samples if s.response_ids[-1] == eos} <= {"length"}
    assert case.max_error(before_end, 8.0) <= TOLERANCE


def check_rollouts_under_way(case: Case) -> None:
    """Several are started before the first result; the results are those of `generate`."""
    pending = [case.engine.start(PROMPTS[i : i + 2], GREEDY) for i in (0, 2, 3)]
    found = [[s.response_ids for s in rollout.result()] for rollout in pending]
    expected = [s.response_ids for s in case.engine.generate(PROMPTS, GREEDY)]
    assert found == [expected[i : i + 2] for i in (0, 2, 3)]
    assert all(isinstance(value, float) for value in case.engine.metrics.values())


def check_samples_are_taken_when_they_are_there(case: Case) -> None:
    """Taking them waits for nothing and changes nothing; what is given up is out of the way."""
    expected = case.engine.generate(PROMPTS[:2], GREEDY)
    kept, given_up = (case.engine.start(PROMPTS[:2], GREEDY) for _ in range(2))
    taken = kept.take()
    given_up.give_up()
    given_up.give_up()
    left = given_up.take()
    for samples in (taken, left):
        if samples is not None:
            assert_same(case, samples, expected)
    assert_same(case, kept.result(), expected)
    kept.give_up()
    assert_same(case, case.engine.generate(PROMPTS[:2], GREEDY), expected)


def check_nothing_to_do(case: Case) -> None:
    assert case.engine.generate([], PARAMS) == []


def check_bad_prompts_are_named(case: Case) -> None:
    for token_ids, message in {
        (): "prompt bad: it is empty",
        (1,) * 245: "prompt bad: 245 \\+ 16 new tokens exceed the context 25",
    }.items():
        with pytest.raises(RolloutError, match=message):
            case.engine.generate([PROMPTS[0], Prompt("bad", token_ids)], PARAMS)
    with pytest.raises(RolloutError, match="sampling top_p"):
        case.engine.generate(PROMPTS, replace(PARAMS, top_p=0.0))
    assert len(case.engine.generate(PROMPTS, GREEDY)) == 5


def check_weights_can_be_loaded(case: Case) -> None:
    """Other weights, then the first ones again: samples follow, and carry the version."""
    if not case.can_load:
        pytest.skip("this engine serves the weights that it was started with")
    weights = load_file(case.model_dir / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"

    def changed() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in weights.items():
            yield key, tensor * 3 if key == name else tensor

    before = case.engine.generate(PROMPTS, GREEDY)
    case.engine.load_weights(changed(), version=7)
    after = case.engine.generate(PROMPTS, GREEDY)
    assert {s.weight_version for s in after} == {7}
    assert [s.response_ids for s in after] != [s.response_ids for s in before]
    case.engine.load_weights(iter(weights.items()), version=8)
    again = case.engine.generate(PROMPTS, GREEDY)
    assert {s.weight_version for s in again} == {8}
    assert [s.response_ids for s in again] == [s.response_ids for s in before]


CONTRACT: dict[str, Callable[[Case], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
