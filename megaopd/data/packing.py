"""Samples laid end to end in micro-batches (THD), for any rank of any layout.

The one place where labels are shifted, and where sequences are cut for context parallelism:
outside it, position t of every `_T` tensor speaks about `labels_T[t]`. Needs torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megaopd.batch import PackedBatch, Sample
from megaopd.data.balancing import (
    Assignment,
    CostModel,
    MicroBatch,
    Packing,
    Side,
    assign,
    balance,
    prompt_ids,
    sequence_length,
)
from megaopd.errors import RolloutError
from megaopd.parallel.layout import Layout, Place

__all__ = [
    "Assignment",
    "Batching",
    "CostModel",
    "MicroBatch",
    "Packing",
    "Side",
    "assign",
    "balance",
    "label_runs",
    "micro_batches",
    "pack",
    "with_credit",
]


def pack(
    samples: Sequence[Sample],
    pad_to_multiple: int = 1,
    weights: Sequence[float] | None = None,
    *,
    place: Place | None = None,
    side: Side = "student",
    first_rows: Sequence[int] | None = None,
    teacher: str = "",
) -> PackedBatch:
    """Packs samples into one micro-batch, on the CPU.

    Each sequence is prompt + response; its last token has no label. Under context parallelism it is
    padded at its end, where causal attention of real tokens does not reach, and cut. The tokens
    that fill up to the multiple are one more sequence of zeros, without loss, so that no real
    sequence attends to them. A sample whose response is empty has no loss token; no samples at all
    give a batch of padding.

    Args:
        samples: S' samples, in the order they are laid down.
        pad_to_multiple: T is a multiple of it (sequence parallelism needs its group's size).
        weights: one per sample, given to all its loss tokens; None is 1 each.
        place: this rank's context-parallel rank; None is not cut.
        side: whose prompts.
        first_rows: the row (`PackedBatch.rows_T`) of each sample's first response token; None
            counts these samples alone.
        teacher: the name of the teacher of all samples.

    Raises:
        RolloutError: a sample without prompt tokens, or whose response fields differ in length.
    """
    place = place or Place()
    for sample in samples:
        _check(sample)
    if first_rows is None:
        first_rows = _first_rows(samples)
    lengths = [sequence_length(s, side) for s in samples]
    *padded, filler = _padded_lengths(lengths, pad_to_multiple, place.cp_size)
    sequences = [
        _sequence(s, prompt_ids(s, side), 1.0 if weights is None else weights[i], first_rows[i])
        for i, s in enumerate(samples)
    ]
    sequences = [_lengthen(fields, n) for fields, n in zip(sequences, padded, strict=True)]
    if filler:
        padded.append(filler)
        sequences.append(_lengthen(_NOTHING, filler))
    tokens, labels, positions, mask, logprobs, token_weights, rows, sampled = (
        torch.cat([_cut(sequence, place) for sequence in sequences_of_field])
        for sequences_of_field in zip(*sequences, strict=True)
    )
    return PackedBatch(
        tokens_T=tokens,
        labels_T=labels,
        positions_T=positions,
        loss_mask_T=mask,
        rollout_logprobs_T=logprobs,
        token_weights_T=token_weights,
        rows_T=rows,
        cu_seqlens=torch.tensor(list(accumulate(padded, initial=0)), dtype=torch.int32),
        sample_ids=tuple(s.sample_id for s in samples),
        teacher=teacher,
        sampled_T=sampled,
    )


def _padded_lengths(lengths: Sequence[int], multiple: int, cp_size: int) -> list[int]:
    """Length of every sequence over all context-parallel ranks, the filling one's (or 0) last."""
    piece = 1 if cp_size == 1 else 2 * cp_size
    padded = [-(-length // piece) * piece for length in lengths]
    # The filling sequence is cut like any other: a rank's part of it is even.
    unit = cp_size * (multiple if cp_size == 1 else math.lcm(2, multiple))
    total = sum(padded)
    return [*padded, -total % unit if total else unit]


def _check(sample: Sample) -> None:
    lengths = {
        "tokens": len(sample.response_ids),
        "log-probabilities": len(sample.response_logprobs),
        "mask entries": len(sample.response_mask),
    }
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{n} {what}" for what, n in lengths.items())
        raise RolloutError(f"sample {sample.sample_id}", found, "they must be as many")
    if not sample.prompt.token_ids or sample.prompt.teacher_token_ids == ():
        raise RolloutError(f"sample {sample.sample_id}", "no prompt tokens", "remove the prompt")


def _first_rows(samples: Sequence[Sample]) -> list[int]:
    """The row of each sample's first response token, all response tokens end to end."""
    return list(accumulate((len(s.response_ids) for s in samples), initial=0))


_Fields = tuple[Tensor, ...]
# (tokens, labels, positions, loss mask, rollout logprobs, weights, rows, sampled) of no token.
_NOTHING: _Fields = (
    *[torch.zeros(0, dtype=torch.int64)] * 3,
    torch.zeros(0, dtype=torch.bool),
    *[torch.zeros(0)] * 2,
    torch.zeros(0, dtype=torch.int64),
    torch.zeros(0, dtype=torch.bool),
)
# What a token of padding holds; its position goes on counting.
_FILL = (0, 0, 0, False, 0.0, 0.0, -1, False)


def _sequence(sample: Sample, prompt: tuple[int, ...], weight: float, first_row: int) -> _Fields:
    """The fields of one sequence.

    They are first written about the token itself, as a sample has them, and then all moved one
    place to the left together: position t then speaks about token t + 1, which is its label.
    """
    num_prompt, num_response = len(prompt), len(sample.response_ids)
    tokens = torch.tensor(prompt + tuple(sample.response_ids))
    mask = torch.tensor((False,) * num_prompt + tuple(sample.response_mask))
    logprobs = torch.tensor((0.0,) * num_prompt + tuple(sample.response_logprobs))
    rows = torch.arange(first_row - num_prompt, first_row + num_response)
    labels, mask, logprobs, rows = (_shift(x) for x in (tokens, mask, logprobs, rows))
    logprobs, rows = logprobs.where(mask, 0.0), rows.where(mask, -1)
    positions = torch.arange(len(tokens))
    sampled = mask & (sample.source == "student")
    return tokens, labels, positions, mask, logprobs, mask * float(weight), rows, sampled


def _shift(values: Tensor) -> Tensor:
    """values[t + 1] at t, and 0 (False) at the end."""
    return torch.cat((values[1:], torch.zeros_like(values[:1])))


def _lengthen(fields: _Fields, length: int) -> _Fields:
    """The sequence, padded at its end."""
    have = len(fields[0])
    if have == length:
        return fields
    tails = [x.new_full((length - have,), v) for x, v in zip(fields, _FILL, strict=True)]
    tails[2] = torch.arange(have, length)
    return tuple(torch.cat(pair) for pair in zip(fields, tails, strict=True))


def _cut(values: Tensor, place: Place) -> Tensor:
    """This context-parallel rank's two pieces of a sequence."""
    if place.cp_size == 1:
        return values
    pieces = values.view(2 * place.cp_size, -1)
    return torch.cat((pieces[place.cp_rank], pieces[-1 - place.cp_rank]))


def label_runs(num_prompt: int, num_response: int, cp_size: int) -> list[tuple[int, int, int]]:
    """Which context-parallel rank computes which tokens of a response.

    Returns:
        (cp_rank, start, stop) in ascending order, without gaps: response tokens start to stop - 1
        are labels on that rank.
    """
    if cp_size == 1:
        return [(0, 0, num_response)] if num_response else []
    piece = -(-(num_prompt + num_response) // (2 * cp_size))
    runs = []
    for number in range(2 * cp_size):
        # Response token r is the label of position num_prompt - 1 + r.
        start = max(0, number * piece - num_prompt + 1)
        stop = min(num_response, (number + 1) * piece - num_prompt + 1)
        if start < stop:
            runs.append((min(number, 2 * cp_size - 1 - number), start, stop))
    return runs


def micro_batches(
    samples: Sequence[Sample],
    assignment: Assignment,
    place: Place,
    packing: Packing,
    side: Side = "student",
    weights: Sequence[float] | None = None,
) -> list[PackedBatch]:
    """This rank's share of the samples, packed.

    Args:
        samples: the global batch, the same on every rank.
        assignment: of these samples, over place.dp_size ranks.
        side: whose prompts.
        weights: one per sample.

    Raises:
        RolloutError: any of the samples is malformed; on every rank, so that all fail together.
    """
    for sample in samples:
        _check(sample)
    first_rows = _first_rows(samples)
    return [
        pack(
            [samples[i] for i in part.samples],
            packing.pad_to_multiple,
            None if weights is None else [weights[i] for i in part.samples],
            place=place,
            side=side,
            first_rows=[first_rows[i] for i in part.samples],
            teacher=part.teacher,
        )
        for part in assignment.by_rank[place.dp_rank]
    ]


def with_credit(
    batches: Sequence[PackedBatch], weights_R: Tensor | None, advantages_R: Tensor | None
) -> list[PackedBatch]:
    """The same micro-batches with what each token is worth.

    Args:
        weights_R: fp32 weight of every response token of the global batch, by `rows_T`; None leaves
            the weights.
        advantages_R: likewise its advantage; None has none.
    """

    found = []
    for batch in batches:
        values: dict[str, Any] = {}
        for name, table in (("token_weights_T", weights_R), ("advantages_T", advantages_R)):
            if table is not None:
                values[name] = torch.zeros(batch.loss_mask_T.shape)
                values[name][batch.loss_mask_T] = table[batch.rows_T[batch.loss_mask_T]]
        found.append(replace(batch, **values))
    return found


@dataclass(frozen=True)
class Batching:
    """How one model's ranks share out and pack the samples of a step.

    Attributes:
        layout: the model's, over the whole world.
        side: whose prompts it sees.
    """

    layout: Layout
    packing: Packing
    side: Side = "student"
    cost: CostModel = field(default_factory=CostModel)

    def assign(
        self,
        samples: Sequence[Sample],
        teacher: str | None = None,
        like: Assignment | None = None,
    ) -> Assignment:
        """Shares out all samples, or those of one teacher; see `assign`."""
        parallel = self.layout.parallel
        return assign(
            samples,
            self.packing,
            self.layout.dp_size,
            parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
            side=self.side,
            teacher=teacher,
            cost=self.cost,
            like=like,
        )

    def micro_batches(
        self, samples: Sequence[Sample], assignment: Assignment, rank: int
    ) -> list[PackedBatch]:
        """What `rank` computes; see `micro_batches`."""
        return micro_batches(samples, assignment, self.layout.place(rank), self.packing, self.side)

    def utilisation(self, samples: Sequence[Sample], assignment: Assignment) -> dict[str, float]:
        """Metrics of an assignment, equal on every rank.

        `perf/packing_efficiency` is real tokens over computed ones, `perf/dp_balance` the mean over
        the maximum of the data-parallel ranks' costs, 1 where none waits.
        """
        cp_size = self.layout.parallel.context
        real = computed = 0
        costs = []
        for parts in assignment.by_rank:
            lengths = [[sequence_length(samples[i], self.side) for i in p.samples] for p in parts]
            real += sum(map(sum, lengths))
            computed += sum(
                sum(_padded_lengths(part, self.packing.pad_to_multiple, cp_size))
                for part in lengths
            )
            costs.append(sum(self.cost(n) for part in lengths for n in part))
        return {
            "perf/packing_efficiency": real / max(computed, 1),
            "perf/dp_balance": sum(costs) / max(len(costs) * max(costs), 1e-9),
            "perf/num_micro_batches": float(assignment.num_micro_batches),
            "perf/over_budget_samples": float(assignment.num_over_budget),
        }
