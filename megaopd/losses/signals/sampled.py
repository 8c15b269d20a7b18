"""Divergence estimated from the sampled tokens alone.

With y ~ p and d = log p(y) - log q(y), every divergence of the table D = sum_j value_j has

    D = E_y[value(1, e^-d, d)]        and        grad D = E_y[phi(d) grad log p(y)],

for value and p phi = pull are homogeneous of degree 1 in (p, q), and E_y[grad log p(y)] = 0 makes
phi's constant irrelevant. So one token gives unbiased estimates of the divergence and of its
gradient. For the reverse KL they are the estimators k3 and, phi being d, k1 as an advantage (or k2
as a loss, which has the same gradient); see `estimators`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaopd.batch import TokenSignal
from megaopd.losses.divergences import parts_of
from megaopd.losses.importance import IMPORTANCE
from megaopd.losses.label_rows import label_rows, write_label_gradient
from megaopd.losses.linear_rows import linear_rows
from megaopd.losses.signals.terms import LossRows, LossSettings, LossTerms, at_rows
from megaopd.losses.vocab_shard import make_shard

# A token that is e^80 times likelier for the teacher is never sampled; fp32 ends at e^88.
_LEAST_D = -80.0


def sampled_objective(settings: LossSettings, rows: LossRows, signal: TokenSignal) -> LossTerms:
    """The sum's value is the estimate of the divergence, its gradient the estimate of the
    divergence's gradient: not the derivative of that value.

    Each token is weighted with what `importance` makes of p(y) over the sampler's probability of
    it, so that it speaks for the weights in training. The sampler's softmax must be whole.

    Raises:
        LossArgumentError: a temperature other than the servers'.
    """
    c = settings.config
    settings.require_server_temperature()
    device, width = rows.hidden_LH.device, rows.head_VH.shape[0]
    shard = make_shard(width, width, settings.vocab_size, settings.tp_group)
    parts = parts_of(c.kind, c.beta, c.alpha)
    kept = rows.weights_L.nonzero()[:, 0]
    weights, labels = rows.weights_L[kept], rows.labels_L[kept]
    sampler = rows.sampler_logprobs_L[kept]
    teacher = signal.logprobs_L.to(device, non_blocking=True)[kept]
    correct = IMPORTANCE.get(c.importance)

    def row_loss(z: Tensor, chunk: slice, write_gradient: bool) -> list[Tensor]:
        found = label_rows(shard, z, labels[chunk], c.temperature, settings.sampler_temperature)
        d = (found.logprobs - teacher[chunk]).clamp(min=_LEAST_D)
        one, q = torch.ones_like(d), torch.exp(-d)
        value, phi = torch.zeros_like(d), torch.zeros_like(d)
        for part in parts:
            value += part.weight * part.value(one, q, d)
            phi += part.weight * part.pull(one, q, d)
        counts, clipped = one, torch.zeros_like(d)
        if correct is not None:
            counts, clipped = correct(torch.exp(found.logprobs - sampler[chunk]), c)
        scale = weights[chunk] * counts
        if write_gradient:
            upstream = scale * phi
            write_label_gradient(shard, z, labels[chunk], found.log_total, c.temperature, upstream)
        return [scale * value, counts * value, found.entropy, found.sampler_logprobs, clipped]

    loss_sum, columns = linear_rows(
        rows.hidden_LH[kept],
        rows.head_VH,
        row_loss,
        shard=shard,
        chunk_tokens=settings.chunk_tokens(len(kept)),
    )
    loss, entropy, student_logprobs, clipped = at_rows(columns[1:], kept, len(rows.weights_L))
    metrics = {"loss/divergence": loss, "student/entropy": entropy}
    if correct is not None:
        metrics["loss/importance_clip_fraction"] = clipped
    return LossTerms(loss_sum, student_logprobs, metrics)
