"""The student's step under every layout: gradients by parameter, skipped steps, frozen weights,
bf16.

Two launches, of one rank and of two, do all the work; the tests look at what came back. The
gradients' yardstick is transformers with plain autograd, in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaopd.batch import PackedBatch, Prompt, Sample
from megaopd.config import Config, OptimizerConfig, ParallelConfig, StudentConfig, TeacherConfig
from megaopd.data.packing import pack
from megaopd.errors import ConfigError
from megaopd.models.arch import read_arch
from megaopd.models.families import param_mappings
from megaopd.models.mapping import Replicated
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_models import make_tiny_model

VOCAB_SIZE = 509
FAMILIES_BY_HEAD = {"untied": "Qwen3ForCausalLM", "tied": "LlamaForCausalLM"}
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "dp2": ParallelConfig(),
    "pp2": ParallelConfig(pipeline=2),
}
EMBEDDING = "model.embed_tokens.weight"
BAD_PARAMETERS = ("decoder.layers.0.mlp.linear_fc2.weight", "embedding.word_embeddings.weight")
BF16_STEPS = 5

# Parameter's canonical name -> this rank's shard of its gradient.
Gradients = dict[str, Tensor]


def _sample(index: int, num_prompt: int, num_response: int, mask: str = "") -> Sample:
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, VOCAB_SIZE, (num_prompt + num_response,), generator=generator).tolist()
    flags = tuple(c == "x" for c in mask) or (True,) * num_response
    return Sample(
        Prompt(str(index), tuple(ids[:num_prompt])),
        0,
        tuple(ids[num_prompt:]),
        (-5.0,) * num_response,
        flags,
        "stop",
        0,
    )


# Four micro-batches. The third has no loss token; with two data-parallel ranks it is one of the
# second rank's.
MICRO_BATCHES = (
    (_sample(0, 3, 6), _sample(1, 4, 5, mask="xx..x")),
    (_sample(2, 3, 9),),
    (_sample(3, 7, 0), _sample(4, 2, 3, mask="...")),
    (_sample(5, 2, 7), _sample(6, 5, 2)),
)
NUM_LOSS_TOKENS = sum(sum(s.response_mask) for group in MICRO_BATCHES for s in group)


def _token_weights(labels: Tensor) -> Tensor:
    """From 0 to 2, by the label alone: the same under every layout."""
    return (labels % 5) / 2


def _micro_batches(dp_rank: int, dp_size: int, pad_to_multiple: int) -> list[PackedBatch]:
    share = len(MICRO_BATCHES) // dp_size
    batches = []
    for samples in MICRO_BATCHES[dp_rank * share : (dp_rank + 1) * share]:
        batch = pack(samples, pad_to_multiple)
        weights = _token_weights(batch.labels_T) * batch.loss_mask_T
        batches.append(replace(batch, token_weights_T=weights))
    return batches


@dataclass(frozen=True)
class Workbench:
    """A layout in place: teacher's signals, and students as many as are asked for."""

    folder: Path
    parallel: ParallelConfig
    groups: Any

    @property
    def micro_batches(self) -> list[PackedBatch]:
        groups = self.groups
        return _micro_batches(groups.dp.rank(), groups.dp.size(), self.parallel.tensor)

    def config(self, head: str, dtype: str, freeze: tuple[str, ...], lr: float) -> Config:
        return Config(
            student=StudentConfig(str(self.folder / f"{head}_student"), dtype, freeze),
            teacher=TeacherConfig(str(self.folder / f"{head}_teacher"), dtype),
            parallel=self.parallel,
            # Clipping would scale the gradients that are looked at.
            optimizer=OptimizerConfig(lr=lr, warmup_steps=2, clip_grad=0.0),
        )

    def student(
        self, head: str, dtype: str = "fp32", freeze: tuple[str, ...] = (), lr: float = 1e-2
    ) -> Any:
        from megaopd.engine.student import MegatronStudent
        from megaopd.models.build import padded_vocab_size

        config = self.config(head, dtype, freeze, lr)
        rows = padded_vocab_size(VOCAB_SIZE, self.parallel.tensor)
        arch = read_arch(config.student.path)
        return MegatronStudent(config, arch, self.groups, rows, VOCAB_SIZE)

    def signals(self, head: str, dtype: str = "fp32") -> list[Any]:
        from megaopd.models.build import padded_vocab_size
        from megaopd.teacher.megatron import MegatronTeacher

        config = self.config(head, dtype, (), 1e-2)
        rows = padded_vocab_size(VOCAB_SIZE, self.parallel.tensor)
        arch = read_arch(config.teacher.path)
        teacher = MegatronTeacher(config.teacher, self.parallel, arch, self.groups, rows)
        return teacher.score(self.micro_batches)


def _with_layout(
    folder: Path, parallel: ParallelConfig, work: Callable[[Workbench], dict[str, Any]]
) -> dict[str, Any]:
    from megaopd.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(parallel, torch.device("cpu"), seed=1)
    try:
        return work(Workbench(folder, parallel, groups))
    finally:
        parallel_groups.release()


def _full_gradients(student: Any) -> Gradients:
    """After a step: the averaged gradients, the data-parallel ranks' shards put together again."""
    from megaopd.models import weights

    for buffer in student.ddp.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(group.size()))
            dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    named = weights.named_parameters(student.model, student.arch)
    return {name: p.main_grad.clone() for name, p in named.items() if p.requires_grad}


def _exported(student: Any, only_trainable: bool = False) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in student.export_weights(only_trainable)}


def _gradients(bench: Workbench) -> dict[str, Gradients]:
    """By kind of head, after one step."""
    found = {}
    for head in FAMILIES_BY_HEAD:
        student = bench.student(head)
        result = student.train_step(bench.micro_batches, bench.signals(head))
        assert not result.skipped
        assert result.num_tokens == NUM_LOSS_TOKENS
        found[head] = _full_gradients(student)
    return found


def _non_finite_gradient(bench: Workbench) -> dict[str, Any]:
    """Two steps with an infinite gradient on rank 1 alone, then a good one; what every rank saw."""
    from megaopd.models import weights

    batches, signals = bench.micro_batches, bench.signals("untied")
    undisturbed = bench.student("untied")
    undisturbed.train_step(batches, signals)
    wanted = _exported(undisturbed)

    student = bench.student("untied")
    before = _exported(student)
    params = weights.named_parameters(student.model, student.arch)
    results, unchanged = [], []
    for name in BAD_PARAMETERS:
        handle = None
        if dist.get_rank() == 1:
            handle = params[name].register_hook(lambda grad: torch.full_like(grad, torch.inf))
        results.append(student.train_step(batches, signals))
        if handle is not None:
            handle.remove()
        now = _exported(student)
        unchanged.append(all(now[n].equal(before[n]) for n in before))
    recovered = student.train_step(batches, signals)
    after = _exported(student)
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
        before = _exported(student)
        student.train_step(bench.micro_batches, bench.signals(head))
        after = _exported(student)
        gradients = _full_gradients(student)
        found[head] = {
            "all": set(before),
            "moved": {name for name in before if not after[name].equal(before[name])},
            "trainable": set(_exported(student, only_trainable=True)),
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
        "model_dtypes": {p.dtype for p in student.model.parameters()},
        "main_dtypes": {p.dtype for p in main},
        "num_main": sum(p.numel() for p in main),
        "num_model": sum(p.numel() for p in student.model.parameters()),
        "exported_dtypes": {tensor.dtype for tensor in _exported(student).values()},
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

    return _with_layout(folder, ParallelConfig(), work)


def _two_ranks(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    def work(bench: Workbench) -> dict[str, Any]:
        found: dict[str, Any] = {"gradients": _gradients(bench)}
        if bench.parallel.pipeline == 1:
            found["non_finite"] = _non_finite_gradient(bench)
        return found

    return {name: _with_layout(folder, parallel, work) for name, parallel in LAYOUTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    for head, family in FAMILIES_BY_HEAD.items():
        sizes = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": head == "tied"}
        make_tiny_model(path / f"{head}_student", family, seed=2, num_hidden_layers=2, **sizes)
        make_tiny_model(path / f"{head}_teacher", family, seed=1, **sizes)
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
    for sample in (s for group in MICRO_BATCHES for s in group):
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
                loss = loss + float(_token_weights(torch.tensor(label))) * kl[start + i - 1]
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
    assert ("lm_head.weight" in found["all"]) == (head == "untied")
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
