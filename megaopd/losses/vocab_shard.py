"""Who owns which vocabulary column, and the collectives over the owners.

Rank r of a tensor-parallel group of R owns the global ids [r * width, (r + 1) * width). Ids at or
past
the true vocabulary are padding: they are cut off here, so that nothing else ever sees them. A rank
may own padding only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.losses.validation import require


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary.

    Attributes:
        group: the tensor-parallel process group, or None for one shard.
        rank, size: this rank in it and its size.
        width: columns per rank, padding included.
        vocab_size: the true vocabulary.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    width: int
    vocab_size: int

    @property
    def first_id(self) -> int:
        return self.rank * self.width

    @property
    def num_columns(self) -> int:
        """True columns of this rank, from 0 to width; they come first, padding after them."""
        return min(max(self.vocab_size - self.first_id, 0), self.width)

    def local_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Global ids -> (local columns, 0 if another rank owns the id; whether this one does)."""
        local = ids - self.first_id
        owned = (local >= 0) & (local < self.num_columns)
        return torch.where(owned, local, 0), owned

    def all_gather(self, values: Tensor) -> Tensor:
        """[...] on each rank -> [R, ...] on all, in rank order. Every rank makes the call."""
        if self.size == 1 or values.numel() == 0:
            return values.expand(self.size, *values.shape)
        values = values.contiguous()
        gathered = values.new_empty((self.size, *values.shape))
        dist.all_gather(list(gathered.unbind(0)), values, group=self.group)
        return gathered

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the group, in place, held by all. Called by every rank of the group."""
        if self.size > 1 and values.numel() > 0:
            dist.all_reduce(values, group=self.group)
        return values


def make_shard(
    student_width: int,
    teacher_width: int,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
) -> VocabShard:
    """The student's partition; without `vocab_size` the smaller of the two padded ones is taken.

    Raises:
        LossArgumentError: `vocab_size` is larger than what either side holds.
    """
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    held = min(student_width, teacher_width) * size
    vocab = held if vocab_size is None else vocab_size
    require(
        0 < vocab <= held,
        "vocab_size",
        f"{vocab}, but {size} shard(s) of {student_width} (student) and {teacher_width} (teacher)",
        f"give the true vocabulary, at most {held}",
    )
    return VocabShard(group, rank, size, student_width, vocab)


def reshard_columns(logits: Tensor, shard: VocabShard) -> Tensor:
    """Teacher logits in their own partition -> the columns of the student's shard, by global id.

    Args:
        logits: [T, width_t] of this rank, width_t columns per rank of `shard.group`.

    Returns:
        [T, shard.num_columns], a view when the partitions agree; otherwise one all-to-all, called
        by every rank of the group.
    """
    own_width = logits.shape[1]
    if shard.size == 1 or own_width == shard.width:
        return logits[:, : shard.num_columns]

    def overlap(owner: int, reader: int) -> tuple[int, int]:
        low = max(owner * own_width, reader * shard.width)
        high = min((owner + 1) * own_width, (reader + 1) * shard.width, shard.vocab_size)
        return low, max(low, high)

    num_tokens, base = logits.shape[0], shard.rank * own_width
    outgoing = [overlap(shard.rank, reader) for reader in range(shard.size)]
    sent = [logits[:, lo - base : hi - base].reshape(-1) for lo, hi in outgoing]
    incoming = [overlap(owner, shard.rank) for owner in range(shard.size)]
    sizes = [(hi - lo) * num_tokens for lo, hi in incoming]
    received = logits.new_empty(sum(sizes))
    dist.all_to_all_single(
        received, torch.cat(sent), sizes, [piece.numel() for piece in sent], group=shard.group
    )
    pieces = received.split(sizes)
    widths = [hi - lo for lo, hi in incoming]
    return torch.cat([p.view(num_tokens, w) for p, w in zip(pieces, widths, strict=True)], dim=1)
