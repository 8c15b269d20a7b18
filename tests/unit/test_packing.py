"""Packing: alignment, padding, and the shares of the data-parallel ranks."""

from __future__ import annotations

import itertools
import math
import random
import time
from dataclasses import replace

import pytest
import torch

from megaopd.batch import Prompt, Sample
from megaopd.config import ParallelConfig
from megaopd.data.packing import (
    Assignment,
    Batching,
    CostModel,
    Packing,
    assign,
    balance,
    label_runs,
    micro_batches,
    pack,
)
from megaopd.errors import RolloutError
from megaopd.parallel.layout import Layout, Place


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
    assert batch.rows_T.tolist() == [-1, -1, 0, 1, -1, 2, 3, 4, -1, -1, -1, -1]
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
        "sampled_T": torch.bool,
        "rows_T": torch.int64,
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
    assert batch.rows_T.tolist() == [0, -1, 2, -1]  # the masked token counts


def test_weights_are_per_sample() -> None:
    batch = pack(TWO, weights=[0.25, 3.0])
    assert batch.token_weights_T.tolist() == [0, 0, 0.25, 0.25, 0, 3, 3, 3, 0]


def test_malformed_samples_are_named() -> None:
    with pytest.raises(RolloutError, match=r"a/0: 2 tokens, 1 log-prob.*2 mask entries"):
        pack([replace(TWO[0], response_logprobs=(0.0,))])
    with pytest.raises(RolloutError, match="a/0: no prompt tokens"):
        pack([make_sample("a", [], [1])])


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize("multiple", [1, 2, 3, 4])
def test_context_parallel_ranks_hold_the_whole_once(cp_size: int, multiple: int) -> None:
    """The ranks' pieces, put back in order, are the sequences of one rank, padded."""
    samples = random_samples(9)
    whole = pack(samples)
    parts = [pack(samples, multiple, place=Place(0, 1, r, cp_size)) for r in range(cp_size)]
    starts = parts[0].cu_seqlens.tolist()
    assert all(part.cu_seqlens.tolist() == starts for part in parts)
    assert all(len(p.tokens_T) == starts[-1] // cp_size for p in parts)
    assert len(parts[0].tokens_T) % multiple == 0
    lengths = [len(s.prompt.token_ids) + len(s.response_ids) for s in samples]
    for name, fill in (("tokens_T", 0), ("labels_T", 0), ("loss_mask_T", 0), ("rows_T", -1)):
        for number, (start, end) in enumerate(itertools.pairwise(starts)):
            assert (end - start) % (2 * cp_size) == 0
            piece = (end - start) // (2 * cp_size)
            pieces: list[torch.Tensor] = [torch.empty(0)] * (2 * cp_size)
            for r, part in enumerate(parts):
                own = getattr(part, name)[start // cp_size : end // cp_size]
                pieces[r], pieces[-1 - r] = own[:piece], own[piece:]
            found = torch.cat(pieces)
            first = sum(lengths[:number])
            length = lengths[number] if number < len(samples) else 0
            wanted = getattr(whole, name)[first : first + length]
            assert found[:length].equal(wanted)
            assert (found[length:] == fill).all()
    positions = torch.cat([p.positions_T for p in parts])
    padded = [end - start for start, end in itertools.pairwise(starts)]
    assert sorted(positions.tolist()) == sorted(k for n in padded for k in range(n))


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_label_runs_say_where_a_response_is_computed(cp_size: int) -> None:
    for sample in random_samples(20, seed=6):
        sample = replace(sample, response_mask=(True,) * len(sample.response_ids))
        runs = label_runs(len(sample.prompt.token_ids), len(sample.response_ids), cp_size)
        of_rank: dict[int, list[int]] = {rank: [] for rank in range(cp_size)}
        for rank, start, stop in runs:
            of_rank[rank] += range(start, stop)
        assert [t for _, a, b in runs for t in range(a, b)] == list(range(len(sample.response_ids)))
        for rank in range(cp_size):
            batch = pack([sample], place=Place(0, 1, rank, cp_size))
            assert batch.rows_T[batch.loss_mask_T].tolist() == of_rank[rank]


def test_a_privileged_prompt_moves_positions_and_no_label() -> None:
    prompt = Prompt("a", (11, 12), teacher_token_ids=(7, 8, 9, 11, 12))
    samples = [replace(TWO[0], prompt=prompt), TWO[1]]
    ours, theirs = pack(samples), pack(samples, side="teacher")
    assert theirs.tokens_T.tolist() == [7, 8, 9, 11, 12, 21, 22, 31, 41, 42, 43]
    assert len(ours.tokens_T) == 8
    for name in ("labels_T", "rows_T", "rollout_logprobs_T"):
        mine, other = (getattr(b, name)[b.loss_mask_T].tolist() for b in (ours, theirs))
        assert mine == other  # row l of one is row l of the other


def parts_of(assignment: Assignment) -> list[tuple[int, ...]]:
    return [part.samples for parts in assignment.by_rank for part in parts]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("packing", [Packing(1), Packing(2), Packing(4), Packing(1, 50)])
def test_the_shares_are_the_global_batch_whatever_the_layout(
    dp_size: int, packing: Packing
) -> None:
    samples = random_samples(16, seed=1)
    assignment = assign(samples, packing, dp_size)
    shares = [
        micro_batches(samples, assignment, Place(rank, dp_size), packing) for rank in range(dp_size)
    ]
    assert {len(share) for share in shares} == {assignment.num_micro_batches}
    batches = [batch for share in shares for batch in share]
    ids = sorted(i for batch in batches for i in batch.sample_ids)
    assert ids == sorted(s.sample_id for s in samples)
    if packing.max_tokens is None:
        assert assignment.num_micro_batches == 16 // (dp_size * packing.micro_batch_size)
        assert all(len(b.sample_ids) == packing.micro_batch_size for b in batches)
    else:
        assert all(len(b.tokens_T) <= packing.max_tokens for b in batches)
    # Every loss token once, under the name that it has in the global batch.
    flags = [m for s in samples for m in s.response_mask]
    rows = torch.cat([b.rows_T[b.loss_mask_T] for b in batches])
    assert sorted(rows.tolist()) == [row for row, flag in enumerate(flags) if flag]
    responses = [t for s in samples for t in s.response_ids]
    assert all(
        b.labels_T[b.loss_mask_T].tolist() == [responses[r] for r in b.rows_T[b.loss_mask_T]]
        for b in batches
    )


@pytest.mark.parametrize("num", [1, 3, 7, 10])
@pytest.mark.parametrize("packing", [Packing(2), Packing(1, 64)])
@pytest.mark.parametrize("multiple", [1, 3])
def test_ranks_agree_on_the_number_of_micro_batches_when_nothing_divides(
    num: int, packing: Packing, multiple: int
) -> None:
    assignment = assign(random_samples(num, seed=2), packing, 2, multiple)
    assert len(assignment.by_rank[0]) == len(assignment.by_rank[1])
    assert assignment.num_micro_batches % multiple == 0
    if packing.max_tokens is None and multiple == 1:
        assert assignment.num_micro_batches == math.ceil(num / 4)
    assert sorted(i for part in parts_of(assignment) for i in part) == list(range(num))


def test_no_samples_give_no_micro_batches() -> None:
    assignment = assign([], Packing(2), 2)
    assert assignment.num_micro_batches == 0
    assert micro_batches([], assignment, Place(1, 2), Packing(2)) == []


def test_a_token_budget_fills_micro_batches() -> None:
    lengths = [90, 60, 40, 30, 30, 20, 20, 10]
    samples = [make_sample(f"p{i}", [1], [2] * (n - 1)) for i, n in enumerate(lengths)]
    assignment = assign(samples, Packing(max_tokens=100), 1)
    totals = [sum(lengths[i] for i in part) for part in parts_of(assignment)]
    assert totals == [100, 100, 100]  # nothing smaller would hold 300 tokens
    assert assignment.num_over_budget == 0


def test_what_is_longer_than_the_budget_is_alone_and_counted() -> None:
    lengths = [30, 130, 20, 101, 10]
    samples = [make_sample(f"p{i}", [1], [2] * (n - 1)) for i, n in enumerate(lengths)]
    assignment = assign(samples, Packing(max_tokens=100), 1)
    assert parts_of(assignment) == [(1,), (3,), (0, 2, 4)]
    assert assignment.num_over_budget == 2


@pytest.mark.parametrize("packing", [Packing(3), Packing(1, 80)])
def test_teachers_never_share_a_micro_batch(packing: Packing) -> None:
    names = ["", "math", "code"]
    samples = [
        replace(s, prompt=replace(s.prompt, teacher=names[i % 7 % 3]))
        for i, s in enumerate(random_samples(40, seed=5))
    ]
    assignment = assign(samples, packing, 4)
    for parts in assignment.by_rank:
        order = [part.teacher for part in parts]
        assert order == sorted(order)
        for part in parts:
            assert {samples[i].prompt.teacher for i in part.samples} <= {part.teacher}
    assert sorted(i for part in parts_of(assignment) for i in part) == list(range(40))
    for name in names:
        own = sorted(
            i for part in parts_of(assign(samples, packing, 4, teacher=name)) for i in part
        )
        assert own == [i for i, s in enumerate(samples) if s.prompt.teacher == name]


def test_weights_follow_their_samples() -> None:
    samples = random_samples(8, seed=3)
    weights = [float(i + 1) for i in range(8)]
    of_id = {s.sample_id: w for s, w in zip(samples, weights, strict=True)}
    assignment = assign(samples, Packing(2), 2)
    seen = 0
    for rank in range(2):
        place = Place(rank, 2)
        for batch in micro_batches(samples, assignment, place, Packing(2), weights=weights):
            for number, sample_id in enumerate(batch.sample_ids):
                start, end = batch.cu_seqlens[number : number + 2].tolist()
                mask = batch.loss_mask_T[start:end]
                found = set(batch.token_weights_T[start:end][mask].tolist())
                assert found == ({of_id[sample_id]} if mask.any() else set())
                seen += len(found)
    assert seen >= 7


def long_tailed(num: int, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    return [
        make_sample(f"p{i}", [1] * 20, [2] * min(8000, round(rng.lognormvariate(5, 1))))
        for i in range(num)
    ]


@pytest.mark.parametrize("packing", [Packing(4), Packing(1, 9000)])
def test_the_ranks_costs_are_balanced(packing: Packing) -> None:
    samples, cost = long_tailed(128, seed=4), CostModel(attention_length=500)
    batching = Batching(Layout(ParallelConfig(), 4), packing, cost=cost)
    by_cost = batching.utilisation(samples, batching.assign(samples))
    lengths = [20 + len(s.response_ids) for s in samples]
    in_order = [sum(map(cost, lengths[32 * r : 32 * r + 32])) for r in range(4)]
    assert by_cost["perf/dp_balance"] > 0.97
    assert sum(in_order) / 4 / max(in_order) < 0.9  # what a split by position would have given


def test_utilisation_counts_padding() -> None:
    parallel = ParallelConfig(tensor=2, context=2)
    batching = Batching(Layout(parallel, 4), Packing(2, pad_to_multiple=2))
    samples = [make_sample("a", [1] * 5, [2] * 5), make_sample("b", [1], [2] * 2)]
    found = batching.utilisation(samples, batching.assign(samples))
    # 10 and 3 tokens become 12 and 4, 8 on each context-parallel rank.
    assert found["perf/packing_efficiency"] == pytest.approx(13 / 16)
    assert found["perf/dp_balance"] == 1.0
    assert found["perf/num_micro_batches"] == 1
    (batch,) = batching.micro_batches(samples, batching.assign(samples), rank=0)
    assert len(batch.tokens_T) * 2 == 16


def test_interleaved_stages_get_multiples_of_the_pipeline_size() -> None:
    samples = random_samples(5)
    parallel = ParallelConfig(pipeline=4, virtual_pipeline=2)
    assert Batching(Layout(parallel, 4), Packing(1)).assign(samples).num_micro_batches == 8
    plain = ParallelConfig(pipeline=4)
    assert Batching(Layout(plain, 4), Packing(1)).assign(samples).num_micro_batches == 5


def test_the_cost_model_is_that_of_the_multiply_adds() -> None:
    class Arch:
        num_layers, hidden_size, ffn_hidden_size, vocab_size = 2, 8, 32, 100
        num_heads, num_kv_heads, head_dim = 4, 2, 4

    # q and o 2 x 8 x 16, k and v 2 x 8 x 8, MLP 3 x 8 x 32, head 100 x 8 / 2; attention 16.
    assert CostModel.of(Arch()).attention_length == (256 + 128 + 768 + 400) / 16
    assert CostModel(50)(10) == 10 * 1.2


@pytest.mark.parametrize("packing", [Packing(4), Packing(1, 8192)])
def test_sharing_out_a_large_batch_is_fast(packing: Packing) -> None:
    samples = long_tailed(8192, seed=7)
    start = time.process_time()
    assign(samples, packing, 16)
    assert time.process_time() - start < 0.5


def test_balance_by_hand() -> None:
    assert balance([1, 9, 2, 8, 5], num_bins=2, capacity=3) == [[0, 1, 2], [3, 4]]
    assert balance([5, 5, 5, 5], num_bins=2, capacity=2) == [[0, 2], [1, 3]]
    # Room decides where the shortest bin is full.
    assert balance([9, 1, 1, 1], num_bins=2, capacity=2) == [[0, 3], [1, 2]]
