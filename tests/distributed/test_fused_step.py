"""An optimizer step with the fused loss is the step with whole logits and autograd.

Both take the same micro-batches, several chunks each, accumulated into main_grad.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaopd.config import LossConfig, ParallelConfig
from tests.distributed.workbench import (
    NUM_LOSS_TOKENS,
    Gradients,
    Workbench,
    exported,
    full_gradients,
    make_models,
    with_layout,
)
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.slow

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "dp2": ParallelConfig(),
}
# One kind of one pass over the logits, one of two.
HEADS = ("untied", "tied")
KINDS = ("reverse_kl", "jsd")
HEAD_OR_EMBEDDING = ("output_layer.weight", "embedding.word_embeddings.weight")


def _step(bench: Workbench, head: str, kind: str, fused: bool) -> dict[str, Any]:
    loss = LossConfig(kind=kind, chunk_tokens=4, beta=0.3)
    assert loss.fused  # the default
    student = bench.student(head, loss=replace(loss, fused=fused))
    before = exported(student)
    result = student.train_step(bench.micro_batches, bench.signals(head))
    after = exported(student)
    assert not result.skipped
    assert result.num_tokens == NUM_LOSS_TOKENS
    return {
        "metrics": result.metrics,
        "gradients": full_gradients(student),
        "moves": {name: after[name] - before[name] for name in before},
    }


def _accumulation(bench: Workbench, head: str) -> dict[str, Gradients]:
    """The averaged gradients of all micro-batches in one step, and of parts of them times their
    share of the loss tokens, added up."""
    batches, signals = bench.micro_batches, bench.signals(head)
    parts: list[Gradients] = []
    for part in (slice(0, None), slice(0, 1), slice(1, None)):
        student = bench.student(head)
        share = student.train_step(batches[part], signals[part]).num_tokens / NUM_LOSS_TOKENS
        parts.append({name: grad * share for name, grad in full_gradients(student).items()})
    whole, first, rest = parts
    return {"whole": whole, "added": {name: first[name] + rest[name] for name in whole}}


def _two_ranks(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    def work(bench: Workbench) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for head in HEADS:
            for kind in KINDS:
                found[head, kind] = {f: _step(bench, head, kind, f) for f in (True, False)}
            if bench.parallel.tensor == 2:
                found[head, "accumulation"] = _accumulation(bench, head)
        return found

    return {name: with_layout(folder, parallel, work) for name, parallel in LAYOUTS.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, Any]]:
    """By rank."""
    folder = tmp_path_factory.mktemp("fused_step")
    make_models(folder)
    return run_distributed(_two_ranks, 2, folder, timeout_s=240)


def _relative_difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_step_equals_the_unfused_one(outcomes, layout, head, kind):
    for by_layout in outcomes:
        fused, unfused = (by_layout[layout][head, kind][form] for form in (True, False))
        assert fused["metrics"] == pytest.approx(unfused["metrics"], rel=1e-5, abs=1e-6)
        assert fused["metrics"]["loss/divergence"] > 0.01

        assert fused["gradients"].keys() == unfused["gradients"].keys()
        assert (HEAD_OR_EMBEDDING[0] in fused["gradients"]) == (head == "untied")
        assert HEAD_OR_EMBEDDING[1] in fused["gradients"]
        for name, wanted in unfused["gradients"].items():
            assert wanted.norm() > 0, name
            assert _relative_difference(fused["gradients"][name], wanted) < 1e-5, name

        for name, wanted in unfused["moves"].items():
            assert wanted.norm() > 0, name
            assert _relative_difference(fused["moves"][name], wanted) < 1e-3, name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("layout", [n for n, p in LAYOUTS.items() if p.tensor == 2])
def test_micro_batches_add_up_in_main_grad(outcomes, layout, head):
    for by_layout in outcomes:
        found = by_layout[layout][head, "accumulation"]
        for name, wanted in found["added"].items():
            assert _relative_difference(found["whole"][name], wanted) < 1e-5, name
