"""Recipes under every layout and packing: scores, credit and a step have the values and the
gradients of plain autograd on transformers' logits in fp64. Two launches do all the work.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaopd.batch import Sample
from megaopd.config import Config, CreditConfig, LossConfig, LossStage, ParallelConfig
from megaopd.credit import CreditAssignment
from megaopd.data.packing import Packing, with_credit
from tests.distributed.test_layout_gradients import full_gradients
from tests.distributed.workbench import (
    SAMPLES,
    Workbench,
    make_models,
    token_weights,
    with_layout,
)
from tests.helpers.distributed import run_distributed
from tests.unit.losses.reference import from_logprobs
from tests.unit.test_objective_selection import slow as slow_selection

pytestmark = pytest.mark.slow

HEAD = "untied"
STEP = 2
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "cp2": ParallelConfig(context=2),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(),
}
# Two samples to a micro-batch are what all the others have.
PACKINGS = {
    "one by one": Packing(micro_batch_size=1),
    "by length": Packing(max_tokens=24),
    "all in one": Packing(micro_batch_size=8),
}
# The workbench says that the sampler gave every token e^-5, and students give them some e^-7: the
# ratios lie on both sides of these bounds.
CASES = {
    "policy_gradient": (
        LossConfig(objective="policy_gradient", clip_low=0.85, clip_high=0.0, chunk_tokens=3),
        CreditConfig(
            discount=0.5,
            baseline="divergence",
            weights="reward_weighted",
            reward_softmax="batch",
            reward_beta=0.5,
        ),
    ),
    "k2": (LossConfig(objective="estimator", estimator="k2"), CreditConfig()),
    "k3": (
        LossConfig(objective="estimator", estimator="k3", importance_cap=0.2, entropy_coef=0.1),
        CreditConfig(aggregation="sample"),
    ),
    "likelihood": (LossConfig(objective="likelihood"), CreditConfig(weights="paced")),
    "bonus": (LossConfig(kind="jsd", entropy_coef=0.2, chunk_tokens=3), CreditConfig()),
    "schedule": (
        LossConfig(
            beta=0.0,
            schedule={"blend": LossStage(until_step=4, kind="mixed", beta=1.0, linear=True)},
        ),
        CreditConfig(),
    ),
    "soft_or": (LossConfig(selection="soft_or", selection_ratio=0.5), CreditConfig()),
    "q3": (LossConfig(selection="q3", selection_ratio=0.4, entropy_coef=0.1), CreditConfig()),
    "entropy": (LossConfig(selection="entropy", selection_ratio=0.5), CreditConfig()),
}


def _rewards(samples: Any) -> list[float]:
    return [(int(s.prompt.prompt_id) * 3) % 5 / 4 for s in samples]


def _steps(bench: Workbench) -> dict[str, Any]:
    batches, signals = bench.micro_batches, bench.signals(HEAD)
    num_rows = sum(len(s.response_ids) for s in SAMPLES)
    found: dict[str, Any] = {}
    for name, (loss, credit) in CASES.items():
        student = bench.student(HEAD, loss=loss)
        scores = student.score(batches, signals, num_rows)
        assignment = CreditAssignment(Config(loss=loss, credit=credit), _rewards)
        worth = assignment(SAMPLES, scores if assignment.needs_scores else None)
        credited = with_credit(batches, worth.weights_R, worth.advantages_R)
        result = student.train_step(credited, signals, STEP)
        assert not result.skipped
        found[name] = {
            "scores": vars(scores),
            "metrics": result.metrics | worth.metrics,
            "num_tokens": result.num_tokens,
            "gradients": full_gradients(student),
        }
    return found


def _packed(bench: Workbench) -> dict[str, Any]:
    packings = {name: _steps(replace(bench, packing=p)) for name, p in PACKINGS.items()}
    return {"two by two": _steps(bench), **packings}


def _one_rank(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    return with_layout(folder, ParallelConfig(), _packed)


def _two_ranks(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    return {name: with_layout(folder, parallel, _steps) for name, parallel in LAYOUTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes")
    make_models(path, HEAD)
    return path


@pytest.fixture(scope="module")
def packings(folder) -> dict[str, dict[str, Any]]:
    return run_distributed(_one_rank, 1, folder, timeout_s=300)[0]


@pytest.fixture(scope="module")
def one_rank(packings) -> dict[str, Any]:
    return packings["two by two"]


@pytest.fixture(scope="module")
def two_ranks(folder) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(_two_ranks, 2, folder, timeout_s=600)


def _logprobs(model: Any, sample: Sample) -> Tensor:
    """[loss tokens, V] in fp64."""
    start, mask = len(sample.prompt.token_ids), torch.tensor(sample.response_mask)
    logits = model(torch.tensor([sample.prompt.token_ids + sample.response_ids])).logits[0]
    return logits[start - 1 : -1][mask].log_softmax(-1)


def _factors(credit: CreditConfig) -> list[float] | None:
    """The weight of each sample's tokens, by the definitions; None is the workbench's weights."""
    n = [sum(s.response_mask) for s in SAMPLES]
    rewards = _rewards(SAMPLES)
    if credit.aggregation == "sample":
        num = sum(m > 0 for m in n)
        return [sum(n) / (num * m) if m else 0.0 for m in n]
    if credit.weights == "uniform":
        return None
    raw = {
        "paced": [r * (1 - r) for r in rewards],  # one sample of each prompt
        "reward_weighted": [math.exp(r / credit.reward_beta) for r in rewards],
    }[credit.weights]
    scale = sum(n) / sum(w * m for w, m in zip(raw, n, strict=True))
    return [w * scale for w in raw]


def _token_losses(name: str, sample: Sample, log_p: Tensor, log_q: Tensor) -> Tensor:
    """[loss tokens], whose autograd gradient is the loss's."""
    loss, credit = CASES[name]
    mask = torch.tensor(sample.response_mask)
    labels = torch.tensor(sample.response_ids)[mask][:, None]
    own, theirs = (x.gather(1, labels)[:, 0] for x in (log_p, log_q))
    ratio = (own + 5.0).exp()
    if loss.objective == "policy_gradient":
        places = mask.nonzero()[:, 0]
        distance = places[None, :] - places[:, None]
        share = torch.where(distance >= 0, credit.discount ** distance.clamp(min=0).double(), 0.0)
        baseline = -(log_p.exp() * (log_p - log_q)).sum(-1)
        a = (share @ (theirs - own) - baseline).detach()
        bounded = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
        value = -torch.minimum(ratio * a, bounded * a)
    elif loss.objective == "estimator":
        d = own - theirs
        value = {"k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[loss.estimator]
        value = ratio.detach().clamp(max=loss.importance_cap) * value
    elif loss.objective == "likelihood":
        value = -own
    else:
        # Half way from the forward to the reverse KL: step 2 of 4.
        kind, beta = ("mixed", 0.5) if loss.schedule else (loss.kind, loss.beta)
        value = from_logprobs(kind, log_p, log_q, beta, loss.alpha)
    return value + loss.entropy_coef * (log_p.exp() * log_p).sum(-1)


def _selected(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    loss, _ = CASES[name]
    kept = torch.ones(len(log_p), dtype=torch.bool)
    if loss.selection != "none":
        kind = "forward_kl" if loss.selection == "q3" else "reverse_kl"
        h = -(log_p.exp() * log_p).sum(-1)
        d = from_logprobs(kind, log_p, log_q, 0.5, 0.1)
        chosen = slow_selection(loss.selection, loss.selection_ratio, h.tolist(), d.tolist())
        kept = torch.tensor([i in chosen for i in range(len(log_p))])
    return kept


@pytest.fixture(scope="module")
def plain(folder) -> dict[str, tuple[dict[str, Tensor], int]]:
    """By case: gradients by Hugging Face name, and the number that the loss is divided by."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / f"{HEAD}_{role}", dtype=torch.float64)
        for role in ("student", "teacher")
    )
    found = {}
    for name, (_, credit) in CASES.items():
        student.zero_grad()
        factors = _factors(credit)
        total, num_tokens = torch.zeros((), dtype=torch.float64), 0
        for index, sample in enumerate(SAMPLES):
            if not any(sample.response_mask):
                continue
            log_p, log_q = _logprobs(student, sample), _logprobs(teacher, sample).detach()
            labels = torch.tensor(sample.response_ids)[torch.tensor(sample.response_mask)]
            weights = token_weights(labels).double()
            if factors is not None:
                weights = torch.full_like(weights, factors[index])
            kept = _selected(name, log_p.detach(), log_q)
            num_tokens += int(kept.sum())
            total = total + (weights * kept * _token_losses(name, sample, log_p, log_q)).sum()
        (total / num_tokens).backward()
        gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        found[name] = gradients, num_tokens
    return found


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", CASES)
def test_one_rank_has_the_gradients_of_plain_autograd(one_rank, plain, name):
    gradients, num_tokens = plain[name]
    ours = one_rank[name]
    assert ours["num_tokens"] == num_tokens
    assert ours["gradients"].keys() == gradients.keys()
    for parameter, gradient in ours["gradients"].items():
        assert _difference(gradient, gradients[parameter]) < 1e-4, parameter


def test_one_rank_has_the_scores_of_plain_logits(folder, one_rank):
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / f"{HEAD}_{role}", dtype=torch.float64)
        for role in ("student", "teacher")
    )
    row = 0
    scores = one_rank["k3"]["scores"]
    for sample in SAMPLES:
        rows = torch.arange(row, row + len(sample.response_ids))
        row += len(sample.response_ids)
        mask = torch.tensor(sample.response_mask, dtype=torch.bool)
        if mask.any():
            with torch.no_grad():
                log_p, log_q = _logprobs(student, sample), _logprobs(teacher, sample)
            labels = torch.tensor(sample.response_ids)[mask][:, None]
            expected = (
                log_p.gather(1, labels)[:, 0],
                log_q.gather(1, labels)[:, 0],
                -(log_p.exp() * log_p).sum(-1),
                -(log_q.exp() * log_q).sum(-1),
                (log_p.exp() * (log_p - log_q)).sum(-1),
            )
            for values, wanted in zip(scores.values(), expected, strict=True):
                torch.testing.assert_close(values[rows[mask]].double(), wanted, rtol=0, atol=1e-4)
        for values in scores.values():
            assert not values[rows[~mask]].any()


def _assert_same_step(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["num_tokens"] == wanted["num_tokens"]
    assert found["metrics"] == pytest.approx(wanted["metrics"], rel=1e-4, abs=1e-6)
    assert found["gradients"].keys() == wanted["gradients"].keys()
    for parameter, gradient in found["gradients"].items():
        assert _difference(gradient, wanted["gradients"][parameter]) < 1e-4, parameter
    for values, expected in zip(found["scores"].values(), wanted["scores"].values(), strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_every_layout_has_the_step_of_one_rank(one_rank, two_ranks, name, layout):
    for outcome in two_ranks:
        _assert_same_step(outcome[layout][name], one_rank[name])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(packings, one_rank, name, packing):
    _assert_same_step(packings[packing][name], one_rank[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_hold_the_same_scores_to_the_bit(two_ranks, layout):
    """Advantages are made of them on every rank."""
    first, second = (outcome[layout]["policy_gradient"]["scores"] for outcome in two_ranks)
    for one, other in zip(first.values(), second.values(), strict=True):
        assert torch.equal(one, other)
