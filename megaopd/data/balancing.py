"""Which rank computes which samples, and in which micro-batches: arithmetic on lengths alone.

Every rank computes the same answer for all ranks, so nobody asks anybody.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from megaopd.batch import Sample

Side = Literal["student", "teacher"]


class Architecture(Protocol):
    """What the cost model asks of a model."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class CostModel:
    """Work of a sequence of n tokens: n (1 + n / attention_length), in tokens of a short sequence.

    Attributes:
        attention_length: the length at which causal attention costs as much as all else together.
            The default is an 8B model's (hidden size 4096, 36 layers, MLP 12,288).
    """

    attention_length: float = 50_000.0

    def __call__(self, num_tokens: int) -> float:
        return num_tokens * (1.0 + num_tokens / self.attention_length)

    @classmethod
    def of(cls, arch: Architecture) -> CostModel:
        """From the multiply-adds of a token in one layer: its projections, its experts or MLP and
        its share of the LM head on one side; (heads x head_dim) per position on the other, which is
        the causal half of scores and of weighted values."""
        attention = arch.num_heads * arch.head_dim
        projections = arch.hidden_size * (2 * attention + 2 * arch.num_kv_heads * arch.head_dim)
        moe: Any = getattr(arch, "moe", None)
        ffn = arch.ffn_hidden_size if moe is None else moe.top_k * moe.ffn_hidden_size
        head = arch.vocab_size * arch.hidden_size / arch.num_layers
        return cls((projections + 3 * arch.hidden_size * ffn + head) / attention)


@dataclass(frozen=True)
class Packing:
    """How samples are cut into micro-batches.

    Attributes:
        micro_batch_size: samples of a micro-batch, where there is no token budget.
        max_tokens: token budget of a micro-batch, prompt and response together, over all
            context-parallel ranks; a longer sample has a micro-batch of its own. None cuts by
            micro_batch_size.
        pad_to_multiple: a rank's tokens T are a multiple of it (sequence parallelism needs the
            tensor-parallel size).
    """

    micro_batch_size: int = 1
    max_tokens: int | None = None
    pad_to_multiple: int = 1


@dataclass(frozen=True)
class MicroBatch:
    """Samples computed together.

    Attributes:
        teacher: the name of the teacher of all of them.
        samples: ascending indices into the global batch; none is a micro-batch of padding.
    """

    teacher: str
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """The micro-batches of every data-parallel rank, equally many for each.

    Attributes:
        by_rank: by data-parallel rank, in the order in which they are computed.
        num_over_budget: samples longer than the token budget.
    """

    by_rank: tuple[tuple[MicroBatch, ...], ...]
    num_over_budget: int = 0

    @property
    def num_micro_batches(self) -> int:
        """Of one rank."""
        return len(self.by_rank[0])


def prompt_ids(sample: Sample, side: Side) -> tuple[int, ...]:
    """The prompt as the student or as the teacher sees it."""
    privileged = sample.prompt.teacher_token_ids
    return privileged if side == "teacher" and privileged is not None else sample.prompt.token_ids


def sequence_length(sample: Sample, side: Side) -> int:
    """Tokens of prompt and response."""
    return len(prompt_ids(sample, side)) + len(sample.response_ids)


def assign(
    samples: Sequence[Sample],
    packing: Packing,
    dp_size: int,
    num_multiple: int = 1,
    *,
    side: Side = "student",
    teacher: str | None = None,
    cost: CostModel | None = None,
    like: Assignment | None = None,
) -> Assignment:
    """Shares out the samples; the same on every rank.

    The data-parallel ranks get shares of like cost (longest first, to the rank with the least), and
    a rank spreads its share over micro-batches of like length. Samples of different teachers never
    share a micro-batch; a rank computes teacher after teacher, in the order of their names, and
    each teacher's longest micro-batch first, so that a step that fits starts with its peak.

    Args:
        num_multiple: every rank has a multiple of this many micro-batches (Megatron's interleaved
            schedule asks for multiples of the pipeline size).
        side: whose prompts count for the lengths.
        teacher: only the samples of this teacher; None takes all.
        cost: what is balanced over the ranks.
        like: another assignment of all samples. Where it has as many data-parallel ranks, and all
            samples are this teacher's, each rank gets the samples that it has there: what is equal
            on both sides then need not change ranks, which is worth more than the better balance.
    """
    cost = cost or CostModel()
    chosen = [i for i, s in enumerate(samples) if teacher in (None, s.prompt.teacher)]
    if not chosen:
        return Assignment(((),) * dp_size)
    lengths = {i: sequence_length(samples[i], side) for i in chosen}
    most = len(chosen)
    if packing.max_tokens is None:
        most = -(-most // (dp_size * packing.micro_batch_size)) * packing.micro_batch_size
    if like is not None and len(like.by_rank) == dp_size and len(chosen) == len(samples):
        shares = [sorted(i for part in rank for i in part.samples) for rank in like.by_rank]
    else:
        shares = balance([cost(lengths[i]) for i in chosen], dp_size, most)
    names = sorted({samples[i].prompt.teacher for i in chosen})
    by_teacher = [
        {
            name: own
            for name in names
            if (own := [chosen[j] for j in share if samples[chosen[j]].prompt.teacher == name])
        }
        for share in shares
    ]
    least = [
        {name: _fewest_bins(own, lengths, packing) for name, own in parts.items()}
        for parts in by_teacher
    ]
    needed = max(sum(map(len, parts.values())) for parts in least)
    num = -(-needed // num_multiple) * num_multiple
    ranks = tuple(
        _rank_micro_batches(parts, fewest, lengths, packing, num, names[-1])
        for parts, fewest in zip(by_teacher, least, strict=True)
    )
    budget = packing.max_tokens
    over = 0 if budget is None else sum(n > budget for n in lengths.values())
    return Assignment(ranks, over)


def _rank_micro_batches(
    by_teacher: dict[str, list[int]],
    fewest: dict[str, list[list[int]]],
    lengths: dict[int, int],
    packing: Packing,
    num: int,
    padding_teacher: str,
) -> tuple[MicroBatch, ...]:
    """One rank's samples in `num` micro-batches; those beyond its samples are padding."""
    counts = {name: len(bins) for name, bins in fewest.items()}
    tokens = {name: sum(lengths[i] for i in own) for name, own in by_teacher.items()}
    # Slots that other ranks need anyway make this rank's micro-batches smaller.
    for _ in range(num - sum(counts.values())):
        divisible = [name for name in counts if counts[name] < len(by_teacher[name])]
        if not divisible:
            break
        counts[max(divisible, key=lambda name: tokens[name] / counts[name])] += 1
    made = []
    for name, own in by_teacher.items():
        bins = _spread(own, lengths, packing, counts[name]) or fewest[name]
        bins.sort(key=lambda items: (-sum(lengths[i] for i in items), items))
        made += [MicroBatch(name, tuple(items)) for items in bins if items]
    return (*made, *[MicroBatch(padding_teacher, ())] * (num - len(made)))


def _fewest_bins(items: list[int], lengths: dict[int, int], packing: Packing) -> list[list[int]]:
    """About as few micro-batches as there can be; for a budget, best fit with the longest first."""
    if packing.max_tokens is None:
        size = packing.micro_batch_size
        return [items[start : start + size] for start in range(0, len(items), size)]
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for item in _longest_first(items, lengths):
        place = bisect_left(room, (lengths[item], -1))
        if place < len(room):
            left, index = room.pop(place)
        else:
            left, index = packing.max_tokens, len(bins)
            bins.append([])
        bins[index].append(item)
        insort(room, (left - lengths[item], index))
    return [sorted(items) for items in bins]


def _spread(
    items: list[int], lengths: dict[int, int], packing: Packing, num_bins: int
) -> list[list[int]] | None:
    """Items over bins of like length, longest first; None where the budget then does not hold."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for item in _longest_first(items, lengths):
        total, index = heap[0]
        # The shortest bin has the most room: what does not go into it goes nowhere.
        over = packing.max_tokens is not None and total + lengths[item] > packing.max_tokens
        if over and bins[index]:
            return None
        bins[index].append(item)
        if packing.max_tokens is None and len(bins[index]) == packing.micro_batch_size:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (total + lengths[item], index))
    return [sorted(items) for items in bins]


def _longest_first(items: Sequence[int], lengths: dict[int, int]) -> list[int]:
    return sorted(items, key=lambda i: (-lengths[i], i))


def balance(costs: Sequence[float], num_bins: int, capacity: int) -> list[list[int]]:
    """Shares out items over bins of at most `capacity` items so that the bins' costs are alike.

    Costliest first, each to the bin that has least so far and has room; ties go to the first, so
    the result is the same everywhere.

    Returns:
        The indices of each bin's items, ascending.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap: list[tuple[float, int]] = [(0, index) for index in range(num_bins)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, index = heap[0]
        bins[index].append(item)
        if len(bins[index]) == capacity:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (total + costs[item], index))
    return [sorted(items) for items in bins]
