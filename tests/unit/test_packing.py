"""Packing: alignment, padding, and the shares of the data-parallel ranks."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from megaopd.batch import PackedBatch, Prompt, Sample
from megaopd.data.packing import balance, micro_batches, pack
from megaopd.errors import RolloutError


def make_sample(
    name: str, prompt: list[int], response: list[int], mask: list[bool] | None = None
) -> Sample:
    """A sample whose log-probability of token k is -k / 100, so that each is recognised."""
    return Sample(
        prompt=Prompt(name, tuple(prompt)),
        index=0,
        response_ids=tuple(response),
        response_logprobs=tuple(-k / 100 for k in response),
        response_mask=tuple([True] * len(response) if mask is None else mask),
        finish_reason="stop",
        weight_version=0,
    )


TWO = [make_sample("a", [11, 12, 13], [21, 22]), make_sample("b", [31], [41, 42, 43])]


def test_two_samples_by_hand() -> None:
    batch = pack(TWO, pad_to_multiple=4)
    assert batch.tokens_T.tolist() == [11, 12, 13, 21, 22, 31, 41, 42, 43, 0, 0, 0]
    assert batch.labels_T.tolist() == [12, 13, 21, 22, 0, 41, 42, 43, 0, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert batch.loss_mask_T.int().tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0]
    expected = torch.tensor([0, 0, 21, 22, 0, 41, 42, 43, 0, 0, 0, 0]) / -100
    assert torch.allclose(batch.rollout_logprobs_T, expected)
    assert batch.token_weights_T.tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert batch.sample_ids == ("a/0", "b/0")
    assert batch.max_seqlen == 5


def test_dtypes() -> None:
    batch = pack(TWO, 4)
    found = {name: value.dtype for name, value in vars(batch).items() if torch.is_tensor(value)}
    assert found == {
        "tokens_T": torch.int64,
        "labels_T": torch.int64,
        "positions_T": torch.int64,
        "loss_mask_T": torch.bool,
        "rollout_logprobs_T": torch.float32,
        "token_weights_T": torch.float32,
        "cu_seqlens": torch.int32,
    }


def random_samples(num: int, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for i in range(num):
        response = [rng.randrange(1, 1000) for _ in range(rng.randrange(0, 30))]
        samples.append(
            make_sample(
                f"p{i}",
                [rng.randrange(1, 1000) for _ in range(rng.randrange(1, 20))],
                response,
                [rng.random() < 0.8 for _ in response],
            )
        )
    return samples


@pytest.mark.parametrize("multiple", [1, 2, 6, 64])
def test_position_t_speaks_about_label_t(multiple: int) -> None:
    """The rule of alignment, from the samples themselves: every loss position's label is a response
    token, its log-probability is that token's, and inputs up to t precede the label."""
    samples = random_samples(9)
    batch = pack(samples, multiple)
    assert len(batch.tokens_T) % multiple == 0
    starts = batch.cu_seqlens.tolist()
    num_loss_tokens = 0
    for number, sample in enumerate(samples):
        whole = list(sample.prompt.token_ids) + list(sample.response_ids)
        for k in range(len(whole)):
            t = starts[number] + k
            assert batch.tokens_T[t] == whole[k]
            assert batch.positions_T[t] == k
            r = k + 1 - len(sample.prompt.token_ids)  # the label's place in the response
            in_loss = 0 <= r < len(sample.response_ids) and sample.response_mask[r]
            assert bool(batch.loss_mask_T[t]) == in_loss
            assert batch.labels_T[t] == (whole[k + 1] if k + 1 < len(whole) else 0)
            logprob = sample.response_logprobs[r] if in_loss else 0.0
            assert math.isclose(batch.rollout_logprobs_T[t], logprob, rel_tol=1e-6)
            num_loss_tokens += in_loss
        assert starts[number + 1] - starts[number] == len(whole)
    assert int(batch.loss_mask_T.sum()) == num_loss_tokens > 50
    assert starts[-1] == len(batch.tokens_T)
    assert not batch.loss_mask_T[starts[len(samples)] :].any()


def test_no_padding_where_none_is_needed() -> None:
    assert pack(TWO, 3).cu_seqlens.tolist() == [0, 5, 9]


def test_an_empty_response_has_no_loss_token() -> None:
    batch = pack([make_sample("a", [1, 2], []), make_sample("b", [3], [4])])
    assert batch.loss_mask_T.tolist() == [False, False, True, False]
    assert batch.cu_seqlens.tolist() == [0, 2, 4]
    assert batch.sample_ids == ("a/0", "b/0")


def test_no_samples_give_padding_alone() -> None:
    batch = pack([], 4)
    assert batch.tokens_T.tolist() == [0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert (batch.loss_mask_T.any().item(), batch.sample_ids) == (False, ())


def test_masked_tokens_carry_neither_logprob_nor_weight() -> None:
    sample = make_sample("a", [1], [2, 3, 4], [True, False, True])
    sample = replace(sample, response_logprobs=(-1.0, math.nan, -2.0))
    batch = pack([sample], weights=[0.5])
    assert batch.rollout_logprobs_T.tolist() == [-1, 0, -2, 0]
    assert batch.token_weights_T.tolist() == [0.5, 0, 0.5, 0]


def test_weights_are_per_sample() -> None:
    batch = pack(TWO, weights=[0.25, 3.0])
    assert batch.token_weights_T.tolist() == [0, 0, 0.25, 0.25, 0, 3, 3, 3, 0]


def test_malformed_samples_are_named() -> None:
    with pytest.raises(RolloutError, match=r"a/0: 2 tokens, 1 log-prob.*2 mask entries"):
        pack([replace(TWO[0], response_logprobs=(0.0,))])
    with pytest.raises(RolloutError, match="a/0: no prompt tokens"):
        pack([make_sample("a", [], [1])])


def ids_of(shares: list[list[PackedBatch]]) -> list[str]:
    return sorted(i for batches in shares for batch in batches for i in batch.sample_ids)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_shares_are_the_global_batch_whatever_the_layout(
    dp_size: int, micro_batch_size: int
) -> None:
    samples = random_samples(16, seed=1)
    shares = [micro_batches(samples, micro_batch_size, r, dp_size, 2) for r in range(dp_size)]
    assert {len(share) for share in shares} == {16 // (dp_size * micro_batch_size)}
    assert all(len(b.sample_ids) == micro_batch_size for share in shares for b in share)
    assert ids_of(shares) == sorted(s.sample_id for s in samples)
    loss_tokens = sum(int(b.loss_mask_T.sum()) for share in shares for b in share)
    assert loss_tokens == sum(sum(s.response_mask) for s in samples)


@pytest.mark.parametrize("num", [1, 3, 7, 10])
def test_ranks_agree_on_the_number_of_micro_batches_when_nothing_divides(num: int) -> None:
    samples = random_samples(num, seed=2)
    shares = [micro_batches(samples, 2, rank, 2, 4) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == math.ceil(num / 4)
    assert ids_of(shares) == sorted(s.sample_id for s in samples)


def test_no_samples_give_no_micro_batches() -> None:
    assert micro_batches([], 2, 0, 2, 4) == []


def test_weights_follow_their_samples() -> None:
    samples = random_samples(8, seed=3)
    weights = [float(i + 1) for i in range(8)]
    of_id = {s.sample_id: w for s, w in zip(samples, weights, strict=True)}
    seen = 0
    for rank in range(2):
        for batch in micro_batches(samples, 2, rank, 2, weights=weights):
            for number, sample_id in enumerate(batch.sample_ids):
                start, end = batch.cu_seqlens[number : number + 2].tolist()
                mask = batch.loss_mask_T[start:end]
                found = set(batch.token_weights_T[start:end][mask].tolist())
                assert found == ({of_id[sample_id]} if mask.any() else set())
                seen += len(found)
    assert seen >= 7


def test_the_ranks_tokens_are_balanced() -> None:
    rng = random.Random(4)
    samples = [
        make_sample(f"p{i}", [1] * 20, [2] * round(rng.lognormvariate(4, 1))) for i in range(64)
    ]
    totals = [sum(len(b.tokens_T) for b in micro_batches(samples, 4, r, 4)) for r in range(4)]
    in_order = [
        sum(20 + len(s.response_ids) for s in samples[16 * r : 16 * r + 16]) for r in range(4)
    ]
    assert max(totals) / min(totals) < 1.05
    assert max(in_order) / min(in_order) > 1.2  # what a split by position would have given


def test_balance_by_hand() -> None:
    assert balance([1, 9, 2, 8, 5], num_bins=2, capacity=3) == [[0, 1, 2], [3, 4]]
    assert balance([5, 5, 5, 5], num_bins=2, capacity=2) == [[0, 2], [1, 3]]
    # Room decides where the shortest bin is full.
    assert balance([9, 1, 1, 1], num_bins=2, capacity=2) == [[0, 3], [1, 2]]
