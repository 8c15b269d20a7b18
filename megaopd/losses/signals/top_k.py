"""Divergence over the teacher's K likeliest tokens and one bucket of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from megaopd.batch import TopKSignal
from megaopd.losses import topk
from megaopd.losses.label_rows import label_rows
from megaopd.losses.linear_rows import linear_rows
from megaopd.losses.output import make_problem
from megaopd.losses.signals.labels import student_shard
from megaopd.losses.signals.terms import LossRows, LossSettings, LossTerms, at_rows


def top_k_objective(settings: LossSettings, rows: LossRows, signal: TopKSignal) -> LossTerms:
    """A lower bound of the full divergence, see `topk`; it is taken at the sampled positions but
    not over the sampled tokens, so stale samples need no correction.

    Raises:
        LossArgumentError: a temperature other than the servers', or ids outside the vocabulary.
    """
    c = settings.config
    settings.require_server_temperature()
    device, shard = rows.hidden_LH.device, student_shard(settings, rows.head_VH)
    problem = make_problem(
        *(c.kind, c.beta, c.alpha, c.temperature, None, shard, "eager", rows.hidden_LH),
        c.entropy_coef,
    )
    scored, kept = rows.scored()
    weights, labels = scored.weights_L, scored.labels_L
    ids = signal.ids_LK.to(device, non_blocking=True)[kept].long()
    logprobs = signal.logprobs_LK.to(device, non_blocking=True)[kept]
    topk.check_ids(ids, shard)
    bucket = topk.has_tail(ids, shard)

    def row_loss(z: Tensor, chunk: slice, write_gradient: bool) -> list[Tensor]:
        label = label_rows(shard, z, labels[chunk], c.temperature, settings.sampler_temperature)
        values, state = topk.forward_rows(problem, z, ids[chunk], logprobs[chunk], bucket)
        if write_gradient:
            topk.gradient_rows(problem, z, ids[chunk], state, weights[chunk], bucket, z)
        return [weights[chunk] * values[0], *values, label.sampler_logprobs]

    loss_sum, columns = linear_rows(
        scored.hidden_LH,
        rows.head_VH,
        row_loss,
        shard=shard,
        chunk_tokens=settings.chunk_tokens(len(kept)),
    )
    mass = torch.where(ids < 0, 0.0, logprobs.exp()).sum(1)
    loss, student_entropy, teacher_entropy, student_logprobs, mass = at_rows(
        [*columns[1:], mass], kept, len(rows.weights_L)
    )
    return LossTerms(
        loss_sum,
        student_logprobs,
        {
            "loss/divergence": loss + c.entropy_coef * student_entropy,
            "student/entropy": student_entropy,
            "teacher/entropy": teacher_entropy,
            "teacher/top_k_mass": mass,
        },
    )
