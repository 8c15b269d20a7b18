"""Samples laid end to end in micro-batches (THD), and shared out over the data-parallel ranks.

The one place where labels are shifted: outside it, position t of every `_T` tensor speaks about
`labels_T[t]`. Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megaopd.batch import PackedBatch, Sample
from megaopd.errors import RolloutError


def pack(
    samples: Sequence[Sample], pad_to_multiple: int = 1, weights: Sequence[float] | None = None
) -> PackedBatch:
    """Packs samples into one micro-batch, on the CPU.

    Each sequence is prompt + response; its last token has no label. The tokens that fill up to the
    multiple are one more sequence of zeros, without loss, so that no real sequence attends to them.
    A sample whose response is empty has no loss token; no samples at all give a batch of padding.

    Args:
        samples: S' samples, in the order they are laid down.
        pad_to_multiple: T is a multiple of it (sequence parallelism needs its group's size).
        weights: one per sample, given to all its loss tokens; None is 1 each.

    Raises:
        RolloutError: a sample without prompt tokens, or whose response fields differ in length.
    """
    for sample in samples:
        _check(sample)
    sequences = [
        _sequence(s, 1.0 if weights is None else weights[i]) for i, s in enumerate(samples)
    ]
    length = sum(len(s.prompt.token_ids) + len(s.response_ids) for s in samples)
    padding = -length % pad_to_multiple if samples else pad_to_multiple
    if padding:
        sequences.append(_sequence(None, 0.0, padding))
    ends = accumulate((len(sequence[0]) for sequence in sequences), initial=0)
    tokens, labels, positions, mask, logprobs, token_weights = map(
        torch.cat, zip(*sequences, strict=True)
    )
    return PackedBatch(
        tokens_T=tokens,
        labels_T=labels,
        positions_T=positions,
        loss_mask_T=mask,
        rollout_logprobs_T=logprobs,
        token_weights_T=token_weights,
        cu_seqlens=torch.tensor(list(ends), dtype=torch.int32),
        sample_ids=tuple(s.sample_id for s in samples),
    )


def _check(sample: Sample) -> None:
    lengths = {
        "tokens": len(sample.response_ids),
        "log-probabilities": len(sample.response_logprobs),
        "mask entries": len(sample.response_mask),
    }
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{n} {what}" for what, n in lengths.items())
        raise RolloutError(f"sample {sample.sample_id}", found, "they must be as many")
    if not sample.prompt.token_ids:
        raise RolloutError(f"sample {sample.sample_id}", "no prompt tokens", "remove the prompt")


def _sequence(sample: Sample | None, weight: float, padding: int = 0) -> tuple[Tensor, ...]:
    """(tokens, labels, positions, loss mask, rollout logprobs, weights) of one sequence.

    The fields are first written about the token itself, as a sample has them, and then all moved
    one place to the left together: position t then speaks about token t + 1, which is its label.
    """
    if sample is None:
        tokens = torch.zeros(padding, dtype=torch.int64)
        mask = torch.zeros(padding, dtype=torch.bool)
        logprobs = torch.zeros(padding)
    else:
        num_prompt = len(sample.prompt.token_ids)
        tokens = torch.tensor(sample.prompt.token_ids + tuple(sample.response_ids))
        mask = torch.tensor((False,) * num_prompt + tuple(sample.response_mask))
        logprobs = torch.tensor((0.0,) * num_prompt + tuple(sample.response_logprobs))
    labels, mask, logprobs = (_shift(x) for x in (tokens, mask, logprobs))
    logprobs = logprobs.where(mask, 0.0)
    return tokens, labels, torch.arange(len(tokens)), mask, logprobs, mask * float(weight)


def _shift(values: Tensor) -> Tensor:
    """values[t + 1] at t, and 0 (False) at the end."""
    return torch.cat((values[1:], torch.zeros_like(values[:1])))


def micro_batches(
    samples: Sequence[Sample],
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    pad_to_multiple: int = 1,
    weights: Sequence[float] | None = None,
) -> list[PackedBatch]:
    """This data-parallel rank's share of the samples, packed.

    Every rank gets the same number of micro-batches, and the ranks' tokens are balanced. Which
    samples are drawn never depends on the layout: the ranks' shares together are all of `samples`.

    Args:
        samples: the global batch, the same on every rank.
        micro_batch_size: samples per micro-batch; where the numbers do not divide, some hold fewer.
        weights: one per sample.
    """
    for sample in samples:  # all of them on every rank, so that the ranks fail together
        _check(sample)
    num_micro_batches = -(-len(samples) // (dp_size * micro_batch_size))
    lengths = [len(s.prompt.token_ids) + len(s.response_ids) for s in samples]
    share = balance(lengths, dp_size, num_micro_batches * micro_batch_size)[dp_rank]
    parts = balance([lengths[i] for i in share], num_micro_batches, micro_batch_size)
    return [
        pack(
            [samples[share[i]] for i in part],
            pad_to_multiple,
            None if weights is None else [weights[share[i]] for i in part],
        )
        for part in parts
    ]


def balance(lengths: Sequence[int], num_bins: int, capacity: int) -> list[list[int]]:
    """Shares out items over bins of at most `capacity` items so that the bins' lengths are alike.

    Longest first, each to the bin that is shortest so far and has room; ties go to the first, so
    the result is the same everywhere.

    Returns:
        The indices of each bin's items, ascending.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0] * num_bins
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        open_bins = [b for b in range(num_bins) if len(bins[b]) < capacity]
        target = min(open_bins, key=lambda b: (totals[b], b))
        bins[target].append(index)
        totals[target] += lengths[index]
    return [sorted(items) for items in bins]
