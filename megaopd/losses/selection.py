"""Which tokens of a response are trained on: TIP's scores (arXiv 2604.14084, section 4).

A pass without a gradient tells the student's entropy h and the divergence d of every loss token;
the best share of each response's tokens is kept, and the loss is computed for those alone. TIP
scales h and d over the batch; here it is done over the response, whose tokens also compete with one
another: so the choice does not depend on what else is in the batch, nor on who computes it. Of
`entropy`, which TIP samples in proportion to h, the highest are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.batch import PackedBatch

# Entropies above this quantile of their response count as the quantile.
_ENTROPY_CAP = 0.98


@dataclass(frozen=True)
class Selection:
    """An entry of the table.

    Attributes:
        kind: the divergence that the score is made of, an entry of `DIVERGENCES`; None needs none.
        score: (h scaled to [0, 1], d as it is, d scaled to [0, 1]) -> the larger, the better.
    """

    kind: str | None
    score: Callable[[Tensor, Tensor, Tensor], Tensor]


SELECTIONS: dict[str, Selection] = {
    # h + d - h d; in this form exactly 1 where h or d is, so that equals are equal.
    "soft_or": Selection("reverse_kl", lambda h, raw, d: 1 - (1 - h) * (1 - d)),
    "entropy": Selection(None, lambda h, raw, d: h),
    "q3": Selection("forward_kl", lambda h, raw, d: (1 - h) * raw),
}


def select(
    name: str,
    ratio: float,
    lowest: bool,
    sequences: Tensor,
    places: Tensor,
    entropy: Tensor,
    divergence: Tensor,
) -> Tensor:
    """Which of N tokens are kept: of the m of each response max(1, floor(ratio m)).

    Args:
        name: an entry of `SELECTIONS`.
        lowest: keep those of the lowest scores instead.
        sequences: int64 [N], the response each belongs to, from 0.
        places: int64 [N], unique; of equal scores the lower place is kept.
        entropy, divergence: [N].

    Returns:
        [N] bool.
    """
    if not len(sequences):
        return torch.zeros_like(sequences, dtype=torch.bool)
    sizes = torch.bincount(sequences)
    starts = sizes.cumsum(0) - sizes

    def ranks(values: Tensor) -> Tensor:
        """The place of each token in its response by ascending value."""
        order = places.argsort()
        order = order[values[order].argsort(stable=True)]
        order = order[sequences[order].argsort(stable=True)]
        found = torch.empty_like(order)
        found[order] = torch.arange(len(order), device=order.device)
        return found - starts[sequences]

    def extreme(values: Tensor, which: str) -> Tensor:
        found = values.new_zeros(len(sizes))
        found.scatter_reduce_(0, sequences, values, which, include_self=False)
        return found[sequences]

    def scaled(values: Tensor) -> Tensor:
        low, high = extreme(values, "amin"), extreme(values, "amax")
        return torch.where(high > low, (values - low) / (high - low), 0.0)

    cap_rank = ((sizes - 1) * _ENTROPY_CAP).floor().long()[sequences]
    caps = torch.where(ranks(entropy) == cap_rank, entropy, -torch.inf)
    h = scaled(torch.minimum(entropy, extreme(caps, "amax")))
    score = SELECTIONS[name].score(h, divergence, scaled(divergence))
    # 1e-9: 0.3 x 10 is 2.9999999999999996 in floating point.
    num_kept = (sizes * ratio + 1e-9).floor().long().clamp(min=1)
    return ranks(score if lowest else -score) < num_kept[sequences]


def keep_in_batch(
    name: str,
    ratio: float,
    lowest: bool,
    batch: PackedBatch,
    entropy_L: Tensor,
    divergence_L: Tensor,
    cp_group: dist.ProcessGroup | None,
) -> Tensor:
    """`select` among the loss tokens of a micro-batch; one all-gather over the context-parallel
    group, whose ranks hold parts of the same responses. All of its ranks make the call.

    Returns:
        [L] bool, of this rank's loss tokens.
    """
    cp_size = 1 if cp_group is None else cp_group.size()
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long() // cp_size
    mask = batch.loss_mask_T
    sequence_T = torch.arange(len(lengths), device=mask.device).repeat_interleave(lengths)
    # fp64 holds every row's number exactly.
    mine = torch.zeros(5, len(mask), dtype=torch.float64, device=mask.device)
    mine[0] = mask
    mine[1] = sequence_T
    mine[2] = batch.rows_T
    mine[3, mask], mine[4, mask] = entropy_L.double(), divergence_L.double()
    parts = [mine]
    if cp_group is not None and cp_size > 1:
        parts = [torch.empty_like(mine) for _ in range(cp_size)]
        dist.all_gather(parts, mine, group=cp_group)
    everything = torch.cat(parts, dim=1)
    everywhere = everything[:, everything[0] != 0]
    sequences, places = everywhere[1].long(), everywhere[2].long()
    # What is not finite has no place in an order: it is kept, so that the step sees it.
    broken = ~everywhere[3:].isfinite().all(dim=0)
    entropy, divergence = torch.where(broken, 0.0, everywhere[3:]).unbind(0)
    kept = broken | select(name, ratio, lowest, sequences, places, entropy, divergence)
    first = 0
    if cp_group is not None and cp_size > 1:
        first = sum(int(part[0].sum()) for part in parts[: cp_group.rank()])
    return kept[first : first + len(entropy_L)]
