"""Picking tokens: distributions, truncation, log-probabilities and random numbers."""

from __future__ import annotations

import pytest
import torch

from megaopd.batch import SamplingParams
from megaopd.errors import RolloutError
from megaopd.rollout.sampling import check_sampling_params, sample_tokens, sample_uniforms

PROBS = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3, 0.0])


def frequencies(params: SamplingParams, probs_V: torch.Tensor) -> torch.Tensor:
    """How often each token is drawn when the random numbers cover [0, 1) evenly."""
    num = 10_000
    uniforms = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    ids, _ = sample_tokens(probs_V.log().expand(num, -1), params, uniforms)
    return torch.bincount(ids, minlength=len(probs_V)) / num


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBS),
        ({"top_k": 2}, torch.tensor([0, 4 / 7, 0, 0, 3 / 7, 0])),
        ({"top_k": 99}, PROBS),
        # 0.4 + 0.3 falls short of 0.8, so the third token is still in.
        ({"top_p": 0.8}, torch.tensor([0, 0.4, 0, 0.25, 0.3, 0]) / 0.95),
        ({"top_p": 1e-6}, torch.tensor([0.0, 1, 0, 0, 0, 0])),
        # Of the four that top-k leaves, 0.4 and 0.3 make up the nucleus of 0.7.
        ({"top_k": 3, "top_p": 0.7}, torch.tensor([0, 4 / 7, 0, 0, 3 / 7, 0])),
        ({"temperature": 0.5}, PROBS**2 / (PROBS**2).sum()),
        ({"temperature": 2.0}, PROBS**0.5 / (PROBS**0.5).sum()),
        ({"temperature": 0.0}, torch.tensor([0.0, 1, 0, 0, 0, 0])),
    ],
)
def test_frequencies_are_the_distributions(options, expected):
    found = frequencies(SamplingParams(max_new_tokens=1, **options), PROBS)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_impossible_tokens_are_never_drawn(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    ids, logprobs = sample_tokens(
        logits, SamplingParams(1), torch.tensor([uniform], dtype=torch.float64)
    )
    assert ids.tolist() == [1 if uniform == 0 else 3]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, ids[0]])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_of_the_whole_softmax_in_fp32(temperature):
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).bfloat16() * 4
    params = SamplingParams(1, temperature=temperature, top_k=5, top_p=0.6)
    uniforms = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids, logprobs = sample_tokens(logits, params, uniforms)
    expected = (logits.double() / (temperature or 1)).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=0)


def test_nan_logits_show_as_nan_logprobs():
    logits = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 1.0, 2.0]])
    for temperature in (0.0, 1.0):
        _, logprobs = sample_tokens(
            logits, SamplingParams(1, temperature=temperature), torch.full((2,), 0.5).double()
        )
        assert logprobs.isfinite().tolist() == [False, True]


def test_random_numbers_follow_from_seed_prompt_and_index_alone():
    first = sample_uniforms(7, "p", 0, 16)
    assert first.dtype == torch.float64
    assert torch.equal(first, sample_uniforms(7, "p", 0, 16))
    assert torch.equal(first[:5], sample_uniforms(7, "p", 0, 5))
    others = [sample_uniforms(*key, 16) for key in [(8, "p", 0), (7, "q", 0), (7, "p", 1)]]
    for other in others:
        assert not torch.isclose(first, other).any()
    # Seeds, indices and ids that read alike when written side by side are still apart.
    assert not torch.equal(sample_uniforms(1, "1/a", 1, 4), sample_uniforms(1, "a", 1, 4))
    many = torch.cat([sample_uniforms(0, f"prompt {i}", 0, 4) for i in range(2_000)])
    assert abs(many.mean().item() - 0.5) < 0.01
    assert abs(many.var().item() - 1 / 12) < 0.003


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"n": 0}, "n"),
    ],
)
def test_parameters_without_meaning_are_refused(options, name):
    with pytest.raises(RolloutError, match=f"^sampling {name}: "):
        check_sampling_params(SamplingParams(**({"max_new_tokens": 1} | options)))
