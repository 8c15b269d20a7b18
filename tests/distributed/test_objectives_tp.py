"""Teachers on servers, the student's side: whatever the layout, a step has the gradients of plain
autograd on transformers' logits in fp64, and metrics are told apart by kind of signal.

What the teacher says is a fixed table, so no server is needed. Two launches do all the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaopd.batch import PackedBatch, TeacherSignal, TokenSignal, TopKSignal
from megaopd.config import LossConfig, ParallelConfig
from tests.distributed.test_layout_gradients import full_gradients
from tests.distributed.workbench import (
    NUM_LOSS_TOKENS,
    SAMPLES,
    VOCAB_SIZE,
    Workbench,
    make_models,
    token_weights,
    with_layout,
)
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.slow

K = 5
HEAD = "untied"
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "cp2": ParallelConfig(context=2),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(),
}
# The workbench says that the sampler gave every token e^-5, and students give them some e^-7: the
# ratios lie on both sides of these bounds.
OBJECTIVES = {
    "top_k": (TopKSignal, LossConfig()),
    "top_k_jsd": (TopKSignal, LossConfig(kind="jsd", chunk_tokens=3)),
    "sampled": (TokenSignal, LossConfig(importance_cap=0.2, chunk_tokens=3)),
    "sampled_icepop": (
        TokenSignal,
        LossConfig(importance="icepop", icepop_low=0.1, icepop_high=0.4),
    ),
}


def _table() -> Tensor:
    """The teacher's log-probs [response tokens of all samples, V]."""
    generator = torch.Generator().manual_seed(8)
    num_rows = sum(len(s.response_ids) for s in SAMPLES)
    return torch.randn(num_rows, VOCAB_SIZE, generator=generator).mul(2).log_softmax(-1)


def _signal(kind: type, rows: Tensor, labels: Tensor) -> TeacherSignal:
    logprobs = _table()[rows]
    if kind is TokenSignal:
        return TokenSignal(logprobs.gather(1, labels[:, None])[:, 0])
    top = logprobs.topk(K, dim=1)
    return TopKSignal(top.indices.int(), top.values)


def _signals(kind: type, batches: list[PackedBatch]) -> list[TeacherSignal]:
    return [_signal(kind, b.rows_T[b.loss_mask_T], b.labels_T[b.loss_mask_T]) for b in batches]


def _steps(bench: Workbench) -> dict[str, Any]:
    """By objective: the gradients of a step, and its metrics."""
    found = {}
    batches = bench.micro_batches
    assert len(batches) > 1
    for name, (kind, loss) in OBJECTIVES.items():
        student = bench.student(HEAD, loss=loss)
        result = student.train_step(batches, _signals(kind, batches))
        assert not result.skipped
        assert result.num_tokens == NUM_LOSS_TOKENS
        found[name] = {"metrics": result.metrics, "gradients": full_gradients(student)}
    return found


def _evaluations(bench: Workbench) -> dict[str, dict[str, float]]:
    """By kind of signal: metrics of an evaluation; mixed, the kinds take turns."""
    student = bench.student(HEAD)
    batches = bench.micro_batches
    signals = {
        "hidden": bench.signals(HEAD),
        "top_k": _signals(TopKSignal, batches),
        "sampled": _signals(TokenSignal, batches),
    }
    # Data-parallel ranks may have kinds that others lack.
    by_turns = list(zip(*signals.values(), strict=True))
    rank = bench.groups.rank
    signals["mixed"] = [kinds[(i + rank) % 3] for i, kinds in enumerate(by_turns[:2])] + [
        kinds[0] for kinds in by_turns[2:]
    ]
    return {name: student.evaluate(batches, given).metrics for name, given in signals.items()}


def _work(bench: Workbench) -> dict[str, Any]:
    found: dict[str, Any] = {"steps": _steps(bench)}
    if bench.parallel == ParallelConfig():
        found["evaluations"] = _evaluations(bench)
    return found


def _one_rank(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    return with_layout(folder, ParallelConfig(), _work)


def _two_ranks(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    return {name: with_layout(folder, parallel, _work) for name, parallel in LAYOUTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("objectives")
    make_models(path, HEAD)
    return path


@pytest.fixture(scope="module")
def one_rank(folder) -> dict[str, Any]:
    return run_distributed(_one_rank, 1, folder, timeout_s=240)[0]


@pytest.fixture(scope="module")
def two_ranks(folder) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(_two_ranks, 2, folder, timeout_s=400)


def _bucketed(log_p: Tensor, ids: Tensor) -> Tensor:
    rest = log_p.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, ids), rest], dim=1)


def _plain(folder: Path, name: str) -> tuple[dict[str, Tensor], float]:
    """fp64: (gradients by Hugging Face name, share of the tokens that are clipped)."""
    kind, config = OBJECTIVES[name]
    model = AutoModelForCausalLM.from_pretrained(folder / f"{HEAD}_student", dtype=torch.float64)
    total, row, clipped, scored = torch.zeros((), dtype=torch.float64), 0, 0, 0
    for sample in SAMPLES:
        start, num = len(sample.prompt.token_ids), len(sample.response_ids)
        rows = torch.arange(row, row + num)[torch.tensor(sample.response_mask, dtype=torch.bool)]
        row += num
        if not len(rows):
            continue
        logits = model(torch.tensor([sample.prompt.token_ids + sample.response_ids])).logits[0]
        mask = torch.tensor(sample.response_mask)
        log_p = logits[start - 1 : -1][mask].log_softmax(-1)
        labels = torch.tensor(sample.response_ids)[mask]
        weights = token_weights(labels).double()
        log_q = _table()[rows].double()
        if kind is TokenSignal:
            log_y, log_t = (x.gather(1, labels[:, None])[:, 0] for x in (log_p, log_q))
            ratio = (log_y + 5.0).exp().detach()
            if config.importance == "icepop":
                out = (ratio < config.icepop_low) | (ratio > config.icepop_high)
                counts = torch.where(out, 0.0, ratio)
            else:
                out = ratio > config.importance_cap
                counts = ratio.clamp(max=config.importance_cap)
            clipped += int((out & (weights != 0)).sum())
            scored += int((weights != 0).sum())
            value = counts * (log_y - log_t).detach() * log_y
        else:
            ids = log_q.topk(K, dim=1).indices
            p, q = (_bucketed(x, ids) for x in (log_p, log_q))
            if config.kind == "jsd":
                m = torch.log(config.beta * q.exp() + (1 - config.beta) * p.exp())
                value = config.beta * (q.exp() * (q - m)).sum(-1)
                value = value + (1 - config.beta) * (p.exp() * (p - m)).sum(-1)
            else:
                value = (p.exp() * (p - q)).sum(-1)
        total = total + (weights * value).sum()
    (total / NUM_LOSS_TOKENS).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, clipped / max(scored, 1)


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_rank_has_the_gradients_of_plain_autograd(folder, one_rank, name):
    theirs, clipped = _plain(folder, name)
    ours = one_rank["steps"][name]
    assert ours["gradients"].keys() == theirs.keys()
    for parameter, gradient in ours["gradients"].items():
        assert _difference(gradient, theirs[parameter]) < 1e-5, parameter
    if OBJECTIVES[name][0] is TokenSignal:
        assert ours["metrics"]["loss/importance_clip_fraction"] == pytest.approx(clipped)
        assert 0.1 < clipped < 0.9
        assert "teacher/entropy" not in ours["metrics"]
    else:
        assert 0 < ours["metrics"]["teacher/top_k_mass"] < 1
        assert "loss/importance_clip_fraction" not in ours["metrics"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_layout_has_the_step_of_one_rank(one_rank, two_ranks, name, layout):
    wanted = one_rank["steps"][name]
    for outcome in two_ranks:
        found = outcome[layout]["steps"][name]
        assert found["gradients"].keys() == wanted["gradients"].keys()
        for parameter, gradient in found["gradients"].items():
            assert _difference(gradient, wanted["gradients"][parameter]) < 1e-5, parameter
        assert found["metrics"] == pytest.approx(wanted["metrics"], rel=1e-4, abs=1e-7)


def test_an_evaluation_says_what_it_measured(one_rank, two_ranks):
    names = {
        "hidden": "eval/reverse_kl",
        "top_k": "eval/reverse_kl_lower_bound",
        "sampled": "eval/reverse_kl_estimate",
    }
    for kind, name in names.items():
        metrics = one_rank["evaluations"][kind]
        assert metrics[name] == metrics["loss/divergence"] > 0
        assert not (set(names.values()) - {name}) & metrics.keys()
        for outcome in two_ranks:
            assert outcome["dp2"]["evaluations"][kind] == pytest.approx(metrics, rel=1e-4, abs=1e-7)


def test_ranks_with_different_kinds_of_signals_agree(two_ranks):
    first, second = (outcome["dp2"]["evaluations"]["mixed"] for outcome in two_ranks)
    assert first == second
    names = {"eval/reverse_kl", "eval/reverse_kl_lower_bound", "eval/reverse_kl_estimate"}
    assert names <= first.keys()
    assert all(first[name] > 0 for name in names)
