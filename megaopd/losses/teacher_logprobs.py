"""What a teacher says of the sampled tokens themselves, whatever kind of signal it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaopd.batch import HiddenSignal, TokenSignal, TopKSignal
from megaopd.losses.label_rows import label_rows
from megaopd.losses.linear_rows import linear_rows
from megaopd.losses.signals.labels import student_shard
from megaopd.losses.signals.terms import LossRows, LossSettings
from megaopd.losses.validation import require


@dataclass(frozen=True)
class TeacherLogprobs:
    """On rows of loss tokens, at the loss's temperature.

    Attributes:
        logprobs: [C] log q(y).
        entropy: [C] nats, over the whole vocabulary; None where the signal does not tell.
    """

    logprobs: Tensor
    entropy: Tensor | None = None


@torch.no_grad()
def _of_hidden(
    settings: LossSettings, rows: LossRows, kept: Tensor, signal: HiddenSignal
) -> TeacherLogprobs:
    """The teacher's logits exist chunk by chunk; two scalars per row are gathered over the
    vocabulary's shards."""
    head = signal.head.shard()
    shard, temperature = student_shard(settings, head), settings.config.temperature
    hidden = signal.hidden_LH.to(rows.hidden_LH.device, non_blocking=True)[kept]

    def row_loss(u: Tensor, chunk: slice, write_gradient: bool) -> list[Tensor]:
        found = label_rows(shard, u, rows.labels_L[chunk], temperature, temperature)
        return [found.logprobs, found.entropy]

    _, (logprobs, entropy) = linear_rows(
        hidden, head, row_loss, shard=shard, chunk_tokens=settings.chunk_tokens(len(kept))
    )
    return TeacherLogprobs(logprobs, entropy)


def _of_top_k(
    settings: LossSettings, rows: LossRows, kept: Tensor, signal: TopKSignal
) -> TeacherLogprobs:
    settings.require_server_temperature()
    device = rows.hidden_LH.device
    hits = signal.ids_LK.to(device, non_blocking=True)[kept].long() == rows.labels_L[:, None]
    logprobs = signal.logprobs_LK.to(device, non_blocking=True)[kept]
    missing = int((~hits.any(dim=1)).sum())
    require(
        missing == 0,
        "teacher.top_k",
        f"{missing} of {len(kept)} sampled tokens are not among the teacher's "
        f"{signal.ids_LK.shape[1]} likeliest, and loss.objective={settings.config.objective} needs "
        "their log-probs",
        "set teacher.top_k=0, which asks for those of the sampled tokens",
    )
    return TeacherLogprobs(torch.where(hits, logprobs, 0.0).sum(dim=1))


def _of_tokens(
    settings: LossSettings, rows: LossRows, kept: Tensor, signal: TokenSignal
) -> TeacherLogprobs:
    settings.require_server_temperature()
    return TeacherLogprobs(signal.logprobs_L.to(rows.hidden_LH.device, non_blocking=True)[kept])


_BY_SIGNAL: dict[type, Callable[[LossSettings, LossRows, Tensor, Any], TeacherLogprobs]] = {
    HiddenSignal: _of_hidden,
    TopKSignal: _of_top_k,
    TokenSignal: _of_tokens,
}


def teacher_logprobs(
    settings: LossSettings, rows: LossRows, kept: Tensor, signal: object
) -> TeacherLogprobs:
    """Called by every rank of the tensor-parallel group; all hold the result.

    Args:
        rows: the loss tokens in question.
        kept: int64, where they are among the rows of the signal.

    Raises:
        LossArgumentError: the signal does not tell the log-prob of one of them, or tells it at
            another temperature.
    """
    return _BY_SIGNAL[type(signal)](settings, rows, kept, signal)
