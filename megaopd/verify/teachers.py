"""Checks of teachers: whether they know text better than noise, and agree with themselves.

The text is that of the prompts: of each the second half, given the first. It is scored twice, the
samples in opposite orders, so that the same tokens lie in other packs and on other ranks; what a
teacher says of a token must not depend on that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.batch import HiddenSignal, PackedBatch, Sample, TeacherSignal, TokenSignal, TopKSignal
from megaopd.errors import CheckpointError, NumericError
from megaopd.inputs import teacher_configs, teacher_key
from megaopd.losses import linear_divergence
from megaopd.verify.setup import Setup, halves

# Prompts that a teacher scores, at most, and tokens of each.
NUM_PROMPTS, NUM_TOKENS = 8, 64
# Nats by which a token of the text must be likelier than one drawn at random.
MARGIN = 0.5
# Reverse KL of a teacher to itself, nats a token: what rounding in other packs amounts to.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}

# (sample id, place in the response) of a token.
Key = tuple[str, int]


@dataclass(frozen=True)
class Reading:
    """What a teacher says of a token.

    Attributes:
        logprob: log q of it, nats.
        noise: of a token drawn at random, or of the uniform distribution where the signal does not
            tell.
        self_kl: KL of its distribution to the one that it had in the other order; of one log-prob,
            the difference.
    """

    logprob: float
    noise: float
    self_kl: float


def read_text(setup: Setup) -> dict[str, list[Reading]]:
    """By teacher, what it says of the tokens; collective, equal on every rank."""
    prompts = []
    for name in teacher_configs(setup.config):
        mine = [p for p in setup.inputs.train_prompts if p.teacher == name]
        prompts += mine[:NUM_PROMPTS]
    samples = halves(prompts, NUM_TOKENS)
    again = _values(setup, samples[::-1])
    student = setup.side
    assignment = student.batching.assign(samples)
    batches = student.batching.micro_batches(samples, assignment, student.groups.rank)
    signals = setup.teacher.score(samples)
    mine_: dict[tuple[str, Key], Reading] = {}
    for batch, signal in zip(batches, signals, strict=True):
        keys = _keys(samples, batch)
        if not keys or not student.groups.is_last_stage:
            continue
        other = torch.stack([again[key] for key in keys])
        readings = READERS[type(signal)](setup, batch, signal, other)
        mine_ |= {(batch.teacher, key): r for key, r in zip(keys, readings, strict=True)}
    by_teacher: dict[str, list[Reading]] = {}
    for (teacher, _), reading in sorted(_gathered(mine_).items()):
        by_teacher.setdefault(teacher, []).append(reading)
    return by_teacher


def _values(setup: Setup, samples: Sequence[Sample]) -> dict[Key, Tensor]:
    """The teachers' word on every token, on every rank, as one row of numbers."""
    side = setup.side
    batches = side.batching.micro_batches(samples, side.batching.assign(samples), side.groups.rank)
    mine: dict[Key, Tensor] = {}
    for batch, signal in zip(batches, setup.teacher.score(samples), strict=True):
        if side.groups.is_last_stage:
            mine |= dict(zip(_keys(samples, batch), _rows(signal).cpu().unbind(), strict=True))
    return _gathered(mine)


def _rows(signal: TeacherSignal) -> Tensor:
    match signal:
        case HiddenSignal():
            return signal.hidden_LH
        case TopKSignal():
            return torch.cat([signal.ids_LK.double(), signal.logprobs_LK.double()], dim=1)
        case TokenSignal():
            return signal.logprobs_L[:, None]


def _gathered(mine: dict[Any, Any]) -> dict[Any, Any]:
    """The union over all ranks."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def _keys(samples: Sequence[Sample], batch: PackedBatch) -> list[Key]:
    """The batch's loss tokens, in order."""
    places = [(s.sample_id, i) for s in samples for i in range(len(s.response_ids))]
    return [places[row] for row in batch.rows_T[batch.loss_mask_T].tolist()]


@torch.no_grad()
def _from_hidden(
    setup: Setup, batch: PackedBatch, signal: HiddenSignal, other: Tensor
) -> list[Reading]:
    groups = setup.side.groups
    vocab_size, head = setup.inputs.vocab_size, signal.head.shard()
    hidden = signal.hidden_LH.to(head.device)
    labels = batch.labels_T[batch.loss_mask_T].to(head.device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(vocab_size, labels.shape, generator=generator).to(head.device)
    found = [
        linear_divergence(
            hidden,
            head,
            other.to(hidden),
            head,
            vocab_size=vocab_size,
            tp_group=groups.tp,
            labels_T=tokens,
        )
        for tokens in (labels, noise)
    ]
    columns = (found[0].student_logprobs_T, found[1].student_logprobs_T, found[0].loss_T)
    rows = zip(*(c.tolist() for c in columns if c is not None), strict=True)
    return [Reading(*row) for row in rows]


def _from_top_k(
    setup: Setup, batch: PackedBatch, signal: TopKSignal, other: Tensor
) -> list[Reading]:
    """A label outside the likeliest tokens has an equal share of what they leave."""
    vocab_size, k = setup.inputs.vocab_size, signal.ids_LK.shape[1]
    labels = batch.labels_T[batch.loss_mask_T]
    logprobs = signal.logprobs_LK.double().cpu()
    hits = signal.ids_LK.cpu().long() == labels[:, None]
    tail = (1 - logprobs.exp().sum(1)).clamp(min=1e-9) / max(vocab_size - k, 1)
    found = torch.where(hits.any(1), torch.where(hits, logprobs, 0.0).sum(1), tail.log())
    apart = (logprobs - other[:, k:]).abs().mean(1)
    return [
        Reading(a, -math.log(vocab_size), b)
        for a, b in zip(found.tolist(), apart.tolist(), strict=True)
    ]


def _from_tokens(
    setup: Setup, batch: PackedBatch, signal: TokenSignal, other: Tensor
) -> list[Reading]:
    logprobs = signal.logprobs_L.double().cpu()
    apart = (logprobs - other[:, 0]).abs()
    return [
        Reading(a, -math.log(setup.inputs.vocab_size), b)
        for a, b in zip(logprobs.tolist(), apart.tolist(), strict=True)
    ]


READERS: dict[type, Any] = {
    HiddenSignal: _from_hidden,
    TopKSignal: _from_top_k,
    TokenSignal: _from_tokens,
}
"""By kind of signal: (set-up, micro-batch, signal, `_rows` of the other order) -> a reading of each
loss token."""


def _readings(setup: Setup) -> dict[str, list[Reading]]:
    """Of `read_text`, which is done once."""
    if setup.readings is None:
        setup.readings = read_text(setup)
    readings: dict[str, list[Reading]] = setup.readings
    return readings


def check_knowledge(setup: Setup) -> str:
    """Every teacher finds the text of its prompts likelier than noise."""
    readings = _readings(setup)
    uniform = -math.log(setup.inputs.vocab_size)
    said = []
    for name, of_teacher in readings.items():
        where = teacher_key(name)
        logprob, noise = (_mean([getattr(r, x) for r in of_teacher]) for x in ("logprob", "noise"))
        found = (
            f"{logprob:.2f} nats a token of the prompts, {noise:.2f} of random tokens, "
            f"{uniform:.2f} uniformly"
        )
        if not math.isfinite(logprob):
            raise NumericError(where, f"log-probs of the prompts are {logprob}", _CONVERSION)
        if logprob < max(noise, uniform) + MARGIN:
            raise CheckpointError(
                where, f"no better than noise: {found}, over {len(of_teacher)} tokens", _CONVERSION
            )
        said.append(f"{where} {found}")
    return "; ".join(said)


_CONVERSION = (
    "see with tools/check_conversion.py whether its weights are what they should be, and that the "
    "prompts are text of the kind that it was trained on"
)


def check_agreement(setup: Setup) -> str:
    """A teacher says the same of a token in other packs and on other ranks."""
    said = []
    for name, readings in _readings(setup).items():
        own = teacher_configs(setup.config)[name]
        where = teacher_key(name)
        mean = _mean([r.self_kl for r in readings])
        # A server computes in whatever dtype it was started with.
        limit = TOLERANCE["bf16" if own.kind == "sglang" else own.dtype]
        if not mean <= limit:
            raise NumericError(
                where,
                f"differs from itself by {mean:.2g} nats a token when the same samples are packed "
                f"in another order (at most {limit:g})",
                "sequences of a pack see each other, or ranks hold different weights: compare "
                f"{where}.parallel with a layout of one rank",
            )
        said.append(f"{where} {max(mean, 0.0):.1g}")
    return f"reverse KL to itself, packed otherwise: {'; '.join(said)}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
