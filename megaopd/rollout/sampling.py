"""From logits to sampled tokens: temperature, truncation, random numbers and log-probabilities.

Random numbers belong to a sample, not to a batch: they follow from the seed, the prompt's id and
the sample's index alone, so neither the batch, its order nor the number of ranks changes a sample.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from megaopd.batch import SamplingParams
from megaopd.errors import RolloutError


def check_sampling_params(params: SamplingParams) -> None:
    """Raises RolloutError if a value has no meaning."""
    bounds = {
        "max_new_tokens": (params.max_new_tokens >= 1, "at least 1"),
        "temperature": (params.temperature >= 0, "0 (greedy) or more"),
        "top_p": (0 < params.top_p <= 1, "a value above 0 and at most 1"),
        "top_k": (params.top_k >= 0, "0 (all tokens) or more"),
        "n": (params.n >= 1, "at least 1"),
    }
    for name, (valid, wanted) in bounds.items():
        if not valid:
            raise RolloutError(f"sampling {name}", f"{getattr(params, name)}", f"use {wanted}")


def sample_uniforms(seed: int, prompt_id: str, index: int, num_tokens: int) -> Tensor:
    """Returns the random numbers of one sample: float64 [num_tokens] in [0, 1), on the CPU."""
    key = hashlib.blake2b(f"{seed}/{index}/{prompt_id}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big", signed=True))
    return torch.rand(num_tokens, generator=generator, dtype=torch.float64)


def sample_tokens(
    logits_BV: Tensor, params: SamplingParams, uniforms_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Picks one token per row.

    A sample is drawn by inverting the cumulative distribution at `uniforms_B`, which needs one
    random number per token instead of one per vocabulary entry.

    Args:
        logits_BV: raw logits of any dtype.
        uniforms_B: float64 in [0, 1); not used when `params.temperature` is 0.

    Returns:
        ids_B: int64.
        logprobs_B: fp32 log-probabilities of `ids_B` under softmax(logits / temperature) over the
            whole vocabulary, before top-k and top-p; greedy tokens are reported at temperature 1.
            NaN where the logits are.
    """
    scores_BV = logits_BV.float()
    if params.temperature not in (0, 1):
        scores_BV = scores_BV / params.temperature
    logprobs_BV = scores_BV.log_softmax(-1)
    if params.temperature == 0:
        ids_B = logprobs_BV.argmax(-1)
    else:
        kept_BV = logprobs_BV
        if params.top_k > 0:
            kept_BV = TopKLogitsWarper(params.top_k)(None, kept_BV)
        if params.top_p < 1:
            kept_BV = TopPLogitsWarper(params.top_p)(None, kept_BV)
        cdf_BV = kept_BV.double().exp_().cumsum(-1)
        # The first entry whose cumulative mass exceeds u * total is never one of probability 0. The
        # clamp is for rows of NaN alone: the caller sees their log-probability.
        cut_B1 = uniforms_B[:, None] * cdf_BV[:, -1:]
        ids_B = torch.searchsorted(cdf_BV, cut_B1, right=True)[:, 0]
        ids_B = ids_B.clamp(max=cdf_BV.shape[-1] - 1)
    return ids_B, logprobs_BV.gather(-1, ids_B[:, None])[:, 0]
