"""What a divergence returns, and the options that all of them share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megaopd.losses.backends import make_backend
from megaopd.losses.divergences import parts_of
from megaopd.losses.engine import Problem
from megaopd.losses.validation import require
from megaopd.losses.vocab_shard import VocabShard


@dataclass(frozen=True)
class DivergenceOutput:
    """Per-token results, fp32 (fp64 for fp64 logits), the same on every rank of the group.

    Attributes:
        loss_T: [T] the divergence, less entropy_coef times the student's entropy. Differentiable,
            unless `loss_sum` is given.
        student_entropy_T: [T] nats, at the divergence's temperature, detached.
        teacher_entropy_T: [T] likewise.
        student_logprobs_T: [T] log-probability of the labels, detached; None without labels.
        teacher_logprobs_T: [T] likewise.
        loss_sum: the differentiable scalar sum(weights_T * loss_T) where weights were given, else
            None.
    """

    loss_T: Tensor
    student_entropy_T: Tensor
    teacher_entropy_T: Tensor
    student_logprobs_T: Tensor | None = None
    teacher_logprobs_T: Tensor | None = None
    loss_sum: Tensor | None = None


def make_problem(
    kind: str,
    beta: float,
    alpha: float,
    temperature: float,
    logprob_temperature: float | None,
    shard: VocabShard,
    backend: str,
    like: Tensor,
    entropy_coef: float = 0.0,
) -> Problem:
    """Checks the options and turns them into the engine's terms.

    Args:
        like: [T, ...] on the device where the work is done.
    """
    for where, value in (
        ("loss.temperature", temperature),
        ("logprob_temperature", logprob_temperature),
    ):
        require(value is None or value > 0, where, f"{value}", "choose a positive temperature")
    if logprob_temperature == temperature:
        logprob_temperature = None
    parts = parts_of(kind, beta, alpha)
    num_logits = like.shape[0] * shard.width
    made = make_backend(
        backend, parts, temperature, logprob_temperature, like, num_logits, entropy_coef
    )
    return Problem(parts, temperature, logprob_temperature, shard, made, entropy_coef)


def check_labels(labels: Tensor | None, num_tokens: int) -> None:
    """Labels are int64 [T] or absent."""
    if labels is None:
        return
    require(
        labels.shape == (num_tokens,) and labels.dtype == torch.int64,
        "labels_T",
        f"{labels.dtype} of shape {tuple(labels.shape)}",
        f"give int64 of shape ({num_tokens},)",
    )
