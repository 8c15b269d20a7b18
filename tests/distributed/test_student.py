"""The student's step under every layout: gradients by parameter, skipped steps, frozen weights,
bf16.

Two launches, of one rank and of two, do all the work; the tests look at what came back. The
gradients' yardstick is transformers with plain autograd, in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaopd.config import ParallelConfig
from megaopd.errors import ConfigError
from megaopd.models.arch import read_arch
from megaopd.models.families import param_mappings
from megaopd.models.mapping import Replicated
from tests.distributed.workbench import (
    FAMILIES_BY_HEAD,
    NUM_LOSS_TOKENS,
    SAMPLES,
    TIED,
    Gradients,
    Workbench,
    exported,
    full_gradients,
    make_models,
    token_weights,
    with_layout,
)
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.slow

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "dp2": ParallelConfig(),
    "pp2": ParallelConfig(pipeline=2),
}
EMBEDDING = "model.embed_tokens.weight"
BAD_PARAMETERS = ("decoder.layers.0.mlp.linear_fc2.weight", "embedding.word_embeddings.weight")
BF16_STEPS = 5


def _gradients(bench: Workbench) -> dict[str, Gradients]:
    """By kind of head, after one step."""
    found = {}
    for head in FAMILIES_BY_HEAD:
        student = bench.student(head)
        result = student.train_step(bench.micro_batches, bench.signals(head))
        assert not result.skipped
        assert result.num_tokens == NUM_LOSS_TOKENS
        found[head] = full_gradients(student)
    return found


def _non_finite_gradient(bench: Workbench) -> dict[str, Any]:
    """Two steps with an infinite gradient on rank 1 alone, then a good one; what every rank saw."""
    from megaopd.models import weights

    batches, signals = bench.micro_batches, bench.signals("untied")
    undisturbed = bench.student("untied")
    undisturbed.train_step(batches, signals)
    wanted = exported(undisturbed)

    student = bench.student("untied")
    before = exported(student)
    params = weights.named_parameters(student.chunks, student.arch)
    results, unchanged = [], []
    for name in BAD_PARAMETERS:
        handle = None
        if dist.get_rank() == 1:
            handle = params[name].register_hook(lambda grad: torch.full_like(grad, torch.inf))
        results.append(student.train_step(batches, signals))
        if handle is not None:
            handle.remove()
        now = exported(student)
        unchanged.append(all(now[n].equal(before[n]) for n in before))
    recovered = student.train_step(batches, signals)
    after = exported(student)
    return {
        "results": results,
        "unchanged": unchanged,
        "recovered": recovered,
        "moved": sum(not after[n].equal(before[n]) for n in before),
        "as_undisturbed": all(after[n].equal(wanted[n]) for n in wanted),
        "num_tensors": len(before),
    }


def _frozen(bench: Workbench, free: dict[str, Gradients]) -> dict[str, Any]:
    """By kind of head: what a step moved with the embedding frozen, and what is exported."""
    found = {}
    for head in FAMILIES_BY_HEAD:
        student = bench.student(head, freeze=(EMBEDDING,))
        before = exported(student)
        student.train_step(bench.micro_batches, bench.signals(head))
        after = exported(student)
        gradients = full_gradients(student)
        found[head] = {
            "all": set(before),
            "moved": {name for name in before if not after[name].equal(before[name])},
            "trainable": set(exported(student, only_trainable=True)),
            "gradients": set(gradients),
            "largest_difference": max(_difference(g, free[head][n]) for n, g in gradients.items()),
        }
    return found


def _losses(bench: Workbench, dtype: str) -> dict[str, Any]:
    student, signals = bench.student("untied", dtype, lr=1e-3), bench.signals("untied", dtype)
    losses = []
    for _ in range(BF16_STEPS):
        result = student.train_step(bench.micro_batches, signals)
        assert not result.skipped
        losses.append(result.metrics["loss/divergence"])
    main = [p for group in student.optimizer.param_groups for p in group["params"]]
    return {
        "losses": losses,
        "model_dtypes": {p.dtype for p in student.chunks[0].parameters()},
        "main_dtypes": {p.dtype for p in main},
        "num_main": sum(p.numel() for p in main),
        "num_model": sum(p.numel() for p in student.chunks[0].parameters()),
        "exported_dtypes": {tensor.dtype for tensor in exported(student).values()},
    }


def _freeze_errors(bench: Workbench) -> list[str]:
    said = []
    for patterns in (("model.embed.weight",), (EMBEDDING, "*.q_proj.weight"), ("*.up_proj.*",)):
        try:
            bench.student("untied", freeze=patterns)
        except ConfigError as error:
            said.append(str(error))
        else:
            said.append("no error")
    return said


def _one_rank(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    def work(bench: Workbench) -> dict[str, Any]:
        gradients = _gradients(bench)
        return {
            "gradients": gradients,
            "frozen": _frozen(bench, gradients),
            "losses": {dtype: _losses(bench, dtype) for dtype in ("fp32", "bf16")},
            "freeze_errors": _freeze_errors(bench),
        }

    return with_layout(folder, ParallelConfig(), work)


def _two_ranks(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    def work(bench: Workbench) -> dict[str, Any]:
        found: dict[str, Any] = {"gradients": _gradients(bench)}
        if bench.parallel.pipeline == 1:
            found["non_finite"] = _non_finite_gradient(bench)
        return found

    return {name: with_layout(folder, parallel, work) for name, parallel in LAYOUTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    make_models(path)
    return path


@pytest.fixture(scope="module")
def one_rank(folder) -> dict[str, Any]:
    return run_distributed(_one_rank, 1, folder, timeout_s=180)[0]


@pytest.fixture(scope="module")
def two_ranks(folder) -> list[dict[str, dict[str, Any]]]:
    return run_distributed(_two_ranks, 2, folder, timeout_s=240)


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative to what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _assembled(folder: Path, head: str, by_rank: Sequence[Gradients], tp: int) -> dict[str, Tensor]:
    """Full gradients by Hugging Face name; what several ranks hold must be the same."""
    full = {}
    for name, mapping in param_mappings(read_arch(folder / f"{head}_student")).items():
        held = [gradients[name] for gradients in by_rank if name in gradients]
        if tp == 1 or isinstance(mapping.layout, Replicated):
            assert all(other.equal(held[0]) for other in held), name
            held = held[:1]
        else:
            assert len(held) == tp
        full.update(zip(mapping.hf, mapping.layout.export(held), strict=True))
    return full


def _plain_gradients(folder: Path, head: str) -> dict[str, Tensor]:
    """Of sum(weight * KL(p || q)) / number of loss tokens, each sample by itself, in fp64."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / f"{head}_{role}", dtype=torch.float64)
        for role in ("student", "teacher")
    )
    loss = torch.zeros((), dtype=torch.float64)
    for sample in SAMPLES:
        ids = torch.tensor([sample.prompt.token_ids + sample.response_ids])
        p = student(ids).logits[0].log_softmax(-1)
        with torch.no_grad():
            q = teacher(ids).logits[0].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        start = len(sample.prompt.token_ids)
        for i, (label, counts) in enumerate(
            zip(sample.response_ids, sample.response_mask, strict=True)
        ):
            if counts:
                loss = loss + float(token_weights(torch.tensor(label))) * kl[start + i - 1]
    (loss / NUM_LOSS_TOKENS).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", FAMILIES_BY_HEAD)
def test_one_rank_has_the_gradients_of_plain_autograd(folder, one_rank, head):
    ours = _assembled(folder, head, [one_rank["gradients"][head]], tp=1)
    theirs = _plain_gradients(folder, head)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert _difference(gradient, theirs[name]) < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", FAMILIES_BY_HEAD)
def test_every_layout_has_the_gradients_of_one_rank(folder, one_rank, two_ranks, head, layout):
    wanted = _assembled(folder, head, [one_rank["gradients"][head]], tp=1)
    by_rank = [outcome[layout]["gradients"][head] for outcome in two_ranks]
    found = _assembled(folder, head, by_rank, tp=LAYOUTS[layout].tensor)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert _difference(gradient, wanted[name]) < 1e-5, name


@pytest.mark.parametrize("layout", [n for n, p in LAYOUTS.items() if p.pipeline == 1])
def test_a_non_finite_gradient_of_one_rank_skips_the_step_on_all(two_ranks, layout):
    for outcome in (by_layout[layout]["non_finite"] for by_layout in two_ranks):
        for result in outcome["results"]:
            assert result.skipped
            assert math.isfinite(result.metrics["loss/divergence"])
            assert not math.isfinite(result.metrics["train/grad_norm"])
            assert result.nonfinite_sample_ids == ()  # every loss was finite
        assert outcome["unchanged"] == [True] * len(BAD_PARAMETERS)
        # The next step is the one that would have been taken, to the bit: nothing was left behind.
        assert not outcome["recovered"].skipped
        assert math.isfinite(outcome["recovered"].metrics["train/grad_norm"])
        assert outcome["moved"] == outcome["num_tensors"] > 10
        assert outcome["as_undisturbed"]


@pytest.mark.parametrize("head", FAMILIES_BY_HEAD)
def test_a_frozen_embedding_stays_and_all_else_moves(one_rank, head):
    found = one_rank["frozen"][head]
    assert EMBEDDING in found["all"]
    assert ("lm_head.weight" in found["all"]) == (head not in TIED)
    assert found["moved"] == found["all"] - {EMBEDDING}
    assert found["trainable"] == found["all"] - {EMBEDDING}
    assert "embedding.word_embeddings.weight" not in found["gradients"]
    assert found["largest_difference"] < 1e-6  # the other gradients are what they were


def test_bf16_follows_fp32(one_rank):
    fp32, bf16 = one_rank["losses"]["fp32"], one_rank["losses"]["bf16"]
    assert bf16["model_dtypes"] == bf16["exported_dtypes"] == {torch.bfloat16}
    assert bf16["main_dtypes"] == {torch.float32}
    assert bf16["num_main"] == bf16["num_model"]
    assert bf16["losses"] == pytest.approx(fp32["losses"], abs=1e-2)
    assert fp32["losses"][-1] < fp32["losses"][0] - 0.05  # there was something to follow
    assert bf16["losses"] != fp32["losses"]


def test_freeze_patterns_that_cannot_be_meant(one_rank):
    nothing, part_of_qkv, part_of_mlp = one_rank["freeze_errors"]
    assert nothing.startswith("student.freeze: 'model.embed.weight' matches no tensor;")
    for said, others in ((part_of_qkv, "k_proj.weight"), (part_of_mlp, "gate_proj.weight")):
        assert said.startswith("student.freeze: matches only some of ")
        assert others in said
