"""The teacher's hidden states on their way from the teacher's layout to the student's.

The last stage of the teacher computes hidden states, equal on its tensor-parallel ranks; the last
stage of the student needs those of its own tokens on every tensor-parallel rank. Who sends what to
whom follows from the samples and the two layouts alone, so every rank knows it without asking:
`plan`. Rows go straight from a rank that holds them to the rank that needs them, one all-to-all per
student micro-batch; a rank that holds what it needs copies, and where no row of a micro-batch
leaves its rank, nothing is communicated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.batch import Sample
from megaopd.data.balancing import prompt_ids
from megaopd.data.packing import Assignment, Batching, label_runs
from megaopd.parallel.layout import Coordinates, Layout

# Which tokens a rank computes: its data-parallel and its context-parallel rank.
Cell = tuple[int, int]


@dataclass(frozen=True)
class Move:
    """Loss tokens among response tokens start to stop - 1 of a sample, from a rank to a rank."""

    sample: int
    start: int
    stop: int
    source: int
    target: int


@dataclass(frozen=True)
class Round:
    """The moves of one student micro-batch on every data-parallel rank.

    Attributes:
        moves: for any target in the order of its micro-batch's loss tokens.
        num_sent: loss tokens that leave their rank, anywhere in the world, once per receiver.
    """

    moves: tuple[Move, ...]
    num_sent: int


def plan(
    samples: Sequence[Sample],
    teacher: Batching,
    teacher_assignment: Assignment,
    student: Batching,
    student_assignment: Assignment,
    rank: int | None = None,
) -> list[Round]:
    """Who sends what to whom, per student micro-batch.

    Args:
        samples: the global batch; what the teacher's assignment leaves out does not move.
        rank: keep only the moves from or to this rank; None keeps all.
    """

    @cache
    def routes(source: Cell, target: Cell) -> tuple[tuple[tuple[int, int], ...], int]:
        """((from rank, to rank) per rank that needs the tokens, how many of all pairs differ)."""
        pairs = _routes(teacher.layout, source, student.layout, target)
        kept = tuple(pair for pair in pairs if rank is None or rank in pair)
        return kept, sum(a != b for a, b in pairs)

    dp_of = {
        sample: dp
        for dp, parts in enumerate(teacher_assignment.by_rank)
        for part in parts
        for sample in part.samples
    }
    moves: list[list[Move]] = [[] for _ in range(student_assignment.num_micro_batches)]
    num_sent = [0] * len(moves)
    for dp, parts in enumerate(student_assignment.by_rank):
        for index, part in enumerate(parts):
            for sample in part.samples:
                if sample not in dp_of:
                    continue
                for source_cp, cp, start, stop in _common_runs(samples[sample], teacher, student):
                    pairs, num_receivers = routes((dp_of[sample], source_cp), (dp, cp))
                    if num_receivers:
                        rows = sum(samples[sample].response_mask[start:stop])
                        num_sent[index] += rows * num_receivers
                    moves[index] += [Move(sample, start, stop, a, b) for a, b in pairs]
    return [Round(tuple(m), n) for m, n in zip(moves, num_sent, strict=True)]


def _common_runs(
    sample: Sample, teacher: Batching, student: Batching
) -> Iterator[tuple[int, int, int, int]]:
    """(teacher's cp rank, student's cp rank, start, stop), ascending, of a sample's response."""
    ours, theirs = (
        label_runs(
            len(prompt_ids(sample, side.side)),
            len(sample.response_ids),
            side.layout.parallel.context,
        )
        for side in (student, teacher)
    )
    i = j = 0
    while i < len(ours) and j < len(theirs):
        (cp, a, b), (source_cp, c, d) = ours[i], theirs[j]
        if max(a, c) < min(b, d):
            yield source_cp, cp, max(a, c), min(b, d)
        if b <= d:
            i += 1
        if d <= b:
            j += 1


def _routes(teacher: Layout, source: Cell, student: Layout, target: Cell) -> list[tuple[int, int]]:
    """For every rank that needs a cell's tokens the rank that it has them from.

    A holder has them from itself; the others are spread over the holders by their number.
    """
    holders, takers = (
        [
            layout.rank(Coordinates(tp, cp, dp, layout.parallel.pipeline - 1))
            for tp in range(layout.parallel.tensor)
        ]
        for layout, (dp, cp) in ((teacher, source), (student, target))
    )
    return [
        (taker if taker in holders else holders[taker % len(holders)], taker) for taker in takers
    ]


class HandOver:
    """One step's hand-over, for one rank. Every rank makes one and runs it.

    Args:
        samples: the global batch.
        teacher, student: how either side shares out and packs the samples.
        teacher_assignment, student_assignment: and what came of it.
        rank: this rank.

    Attributes:
        num_held: loss tokens whose hidden states this rank computes as the teacher, in the order of
            its micro-batches.
        total_rows_sent: hidden states that leave their rank, over all ranks, once per receiver.
        bytes_sent: what this rank sent to others, once `run` has returned.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        teacher: Batching,
        teacher_assignment: Assignment,
        student: Batching,
        student_assignment: Assignment,
        rank: int,
    ) -> None:
        self.rank = rank
        self.bytes_sent = 0
        self.rounds = plan(samples, teacher, teacher_assignment, student, student_assignment, rank)
        self.total_rows_sent = sum(r.num_sent for r in self.rounds)
        self._masks = [sample.response_mask for sample in samples]
        # By sample: (start, stop, place in the cache) of the runs that this rank computes.
        self._held: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self.num_held = 0
        at = teacher.layout.coordinates(rank)
        if at.pp < teacher.layout.parallel.pipeline - 1:
            return
        for part in teacher_assignment.by_rank[at.dp]:
            for index in part.samples:
                num_prompt = len(prompt_ids(samples[index], teacher.side))
                num_response = len(samples[index].response_ids)
                for cp, start, stop in label_runs(
                    num_prompt, num_response, teacher.layout.parallel.context
                ):
                    if cp == at.cp:
                        self._held[index].append((start, stop, self.num_held))
                        self.num_held += self._num_rows(index, start, stop)

    def run(self, cache_LH: Tensor, device: torch.device) -> list[Tensor]:
        """Moves the hidden states; collective over the world.

        Args:
            cache_LH: [num_held, H] on the host.
            device: where the process group's collectives want their tensors.

        Returns:
            One [L, H] host tensor per student micro-batch of this rank, a row per loss token, in
            order; no row where this rank is not on the student's last stage. It may be a view of
            the cache.
        """
        handed = [self._round(r, cache_LH, device) for r in self.rounds]
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the copies to the host are under way
        return handed

    def _round(self, round_: Round, cache_LH: Tensor, device: torch.device) -> Tensor:
        incoming = [m for m in round_.moves if m.target == self.rank]
        if all(m.source == self.rank for m in incoming):
            view = self._view(incoming, cache_LH)
            out = self._copied(incoming, cache_LH) if view is None else view
            places: dict[Move, int] = {}
        else:
            sizes = [self._size(m) for m in incoming]
            out = host_empty(sum(sizes), cache_LH.shape[1], cache_LH.dtype)
            places, first = {}, 0
            for move, size in zip(incoming, sizes, strict=True):
                places[move] = first
                if move.source == self.rank:
                    out[first : first + size] = self._rows(move, cache_LH)
                first += size
        if round_.num_sent:
            self._exchange(round_, places, cache_LH, out, device)
        return out

    def _exchange(
        self,
        round_: Round,
        places: dict[Move, int],
        cache_LH: Tensor,
        out_LH: Tensor,
        device: torch.device,
    ) -> None:
        """One all-to-all of the rows that leave their rank, as bytes: any dtype, any backend."""
        outgoing = self._by_rank(round_, "target")
        incoming = self._by_rank(round_, "source")
        row_bytes = cache_LH.shape[1] * cache_LH.element_size()
        send, receive = (
            [sum(self._size(m) for m in moves) for moves in by_rank]
            for by_rank in (outgoing, incoming)
        )
        sent, received = (
            torch.empty(sum(sizes), cache_LH.shape[1], dtype=cache_LH.dtype, device=device)
            for sizes in (send, receive)
        )
        first = 0
        for move in (m for moves in outgoing for m in moves):
            rows = self._rows(move, cache_LH)
            sent[first : first + len(rows)].copy_(rows, non_blocking=True)
            first += len(rows)
        dist.all_to_all_single(
            received.view(torch.uint8).flatten(),
            sent.view(torch.uint8).flatten(),
            [n * row_bytes for n in receive],
            [n * row_bytes for n in send],
        )
        self.bytes_sent += sum(send) * row_bytes
        first = 0
        for move in (m for moves in incoming for m in moves):
            size = self._size(move)
            target = out_LH[places[move] : places[move] + size]
            target.copy_(received[first : first + size], non_blocking=True)
            first += size

    def _by_rank(self, round_: Round, end: str) -> list[list[Move]]:
        """The moves that leave their rank and have this rank at the other end, by rank at `end`."""
        other = attrgetter(end)
        found: list[list[Move]] = [[] for _ in range(dist.get_world_size())]
        moves = [m for m in round_.moves if m.source != m.target and other(m) != self.rank]
        for rank, of_rank in groupby(sorted(moves, key=other), key=other):
            found[rank] = list(of_rank)
        return found

    def _num_rows(self, sample: int, start: int, stop: int) -> int:
        """Loss tokens in a run of response tokens."""
        return sum(self._masks[sample][start:stop])

    def _size(self, move: Move) -> int:
        return self._num_rows(move.sample, move.start, move.stop)

    def _rows(self, move: Move, cache_LH: Tensor) -> Tensor:
        """The rows of a move in the cache: a run lies in one piece of its sample, so together."""
        start, _, first = next(
            run for run in self._held[move.sample] if run[0] <= move.start and move.stop <= run[1]
        )
        first += self._num_rows(move.sample, start, move.start)
        return cache_LH[first : first + self._size(move)]

    def _view(self, moves: list[Move], cache_LH: Tensor) -> Tensor | None:
        """The rows of all moves as one part of the cache, where they follow each other in it."""
        rows = [part for m in moves if len(part := self._rows(m, cache_LH))]
        if not rows:
            return cache_LH[:0]
        for part, following in pairwise(rows):
            if part.storage_offset() + part.numel() != following.storage_offset():
                return None
        first = (rows[0].storage_offset() - cache_LH.storage_offset()) // cache_LH.shape[1]
        return cache_LH[first : first + sum(map(len, rows))]

    def _copied(self, moves: list[Move], cache_LH: Tensor) -> Tensor:
        out = host_empty(sum(map(self._size, moves)), cache_LH.shape[1], cache_LH.dtype)
        return torch.cat([self._rows(m, cache_LH) for m in moves], out=out)


def host_empty(num_rows: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """[num_rows, hidden_size] in host memory, pinned where there is a GPU to copy to."""
    return torch.empty(num_rows, hidden_size, dtype=dtype, pin_memory=torch.cuda.is_available())
