"""The loss of objectives that look at the student's probability of the sampled token alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from megaopd.losses.label_rows import LabelRows, label_rows, write_label_gradient
from megaopd.losses.linear_rows import linear_rows
from megaopd.losses.signals.terms import LossRows, LossSettings, LossTerms, at_rows
from megaopd.losses.vocab_shard import VocabShard, make_shard


@dataclass(frozen=True)
class TokenLoss:
    """The loss of C tokens, [C] each.

    Attributes:
        value: the loss.
        slope: its gradient with respect to log p(y); need not be the derivative of `value`.
        metrics: name -> [C].
    """

    value: Tensor
    slope: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def student_shard(settings: LossSettings, head_VH: Tensor) -> VocabShard:
    """This rank's columns of logits that are made with its rows of the student's head."""
    width = head_VH.shape[0]
    return make_shard(width, width, settings.vocab_size, settings.tp_group)


def label_terms(
    settings: LossSettings,
    rows: LossRows,
    kept: Tensor,
    num_rows: int,
    token_loss: Callable[[LabelRows, slice], TokenLoss],
) -> LossTerms:
    """The sum of weight times (token loss - entropy_coef entropy), its gradient by chunks.

    Args:
        rows: the scored tokens.
        kept: int64, where these are among the micro-batch's `num_rows` loss tokens.
        token_loss: (log p(y) and entropy of a chunk, which of the rows they are) -> their loss; the
            same on every rank of the tensor-parallel group.
    """
    c, shard = settings.config, student_shard(settings, rows.head_VH)
    names: list[str] = []

    def row_loss(z: Tensor, chunk: slice, write_gradient: bool) -> list[Tensor]:
        labels, weights = rows.labels_L[chunk], rows.weights_L[chunk]
        found = label_rows(shard, z, labels, c.temperature, settings.sampler_temperature)
        loss = token_loss(found, chunk)
        if write_gradient:
            bonus = -c.entropy_coef * weights if c.entropy_coef else None
            slope = weights * loss.slope
            write_label_gradient(shard, z, labels, found, c.temperature, slope, bonus)
        names[:] = loss.metrics
        total = weights * (loss.value - c.entropy_coef * found.entropy)
        return [total, found.entropy, found.sampler_logprobs, *loss.metrics.values()]

    loss_sum, columns = linear_rows(
        rows.hidden_LH,
        rows.head_VH,
        row_loss,
        shard=shard,
        chunk_tokens=settings.chunk_tokens(len(kept)),
    )
    entropy, student_logprobs, *measured = at_rows(columns[1:], kept, num_rows)
    metrics = dict(zip(names, measured, strict=True))
    return LossTerms(loss_sum, student_logprobs, {**metrics, "student/entropy": entropy})
