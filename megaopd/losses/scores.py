"""What student and teacher say about sampled tokens before a step: `megaopd.batch.TokenScores`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megaopd.batch import HiddenSignal, TokenSignal, TopKSignal
from megaopd.losses.fused import linear_divergence
from megaopd.losses.label_rows import LabelRows
from megaopd.losses.signals.labels import TokenLoss, label_terms
from megaopd.losses.signals.terms import LossRows, LossSettings
from megaopd.losses.teacher_logprobs import teacher_logprobs

NUM_SCORES = 5
"""student and teacher log-prob, student and teacher entropy, reverse KL: `TokenScores`' fields."""


def _of_hidden(settings: LossSettings, rows: LossRows, signal: HiddenSignal) -> Tensor:
    c = settings.config
    out = linear_divergence(
        rows.hidden_LH,
        rows.head_VH,
        signal.hidden_LH.to(rows.hidden_LH.device, non_blocking=True),
        signal.head.shard(),
        kind="reverse_kl",
        temperature=c.temperature,
        vocab_size=settings.vocab_size,
        tp_group=settings.tp_group,
        chunk_tokens=c.chunk_tokens,
        backend=c.backend,
        labels_T=rows.labels_L,
    )
    assert out.student_logprobs_T is not None  # labels were given
    assert out.teacher_logprobs_T is not None
    entropies = out.student_entropy_T, out.teacher_entropy_T
    return torch.stack([out.student_logprobs_T, out.teacher_logprobs_T, *entropies, out.loss_T])


def _of_labels(settings: LossSettings, rows: LossRows, signal: TopKSignal | TokenSignal) -> Tensor:
    """A teacher on servers tells neither its entropy nor the whole divergence."""
    num = len(rows.labels_L)
    every = torch.arange(num, device=rows.labels_L.device)
    teacher = teacher_logprobs(settings, rows, every, signal).logprobs

    def token_loss(found: LabelRows, chunk: slice) -> TokenLoss:
        return TokenLoss(found.logprobs, found.logprobs, {"logprobs": found.logprobs})

    terms = label_terms(settings, replace(rows, advantages_L=None), every, num, token_loss)
    student, entropy = terms.metrics["logprobs"], terms.metrics["student/entropy"]
    unknown = torch.full_like(student, torch.nan)
    return torch.stack([student, teacher.to(student), entropy, unknown, unknown])


SCORES: dict[type, Callable[[LossSettings, LossRows, Any], Tensor]] = {
    HiddenSignal: _of_hidden,
    TopKSignal: _of_labels,
    TokenSignal: _of_labels,
}


@torch.no_grad()
def scores(settings: LossSettings, rows: LossRows, signal: object) -> Tensor:
    """[NUM_SCORES, L] of all loss tokens, whatever their weights; every rank of the tensor-parallel
    group calls it and holds the same.

    Raises:
        LossArgumentError: the teacher does not tell a sampled token's log-prob.
    """
    return SCORES[type(signal)](settings, rows, signal)
