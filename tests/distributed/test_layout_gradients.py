"""A layout changes neither the loss nor a gradient: every layout against one rank, in fp32.

All layouts get the same samples, with token weights from 0 to 2, a sample without a loss token, and
a teacher whose hidden states are a fixed table; so only the student's side is looked at. Few
launches do all the work. That one rank's gradients are right is shown in test_student.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.batch import HiddenSignal, PackedBatch
from megaopd.config import (
    Config,
    OptimizerConfig,
    ParallelConfig,
    StudentConfig,
    TrainConfig,
)
from megaopd.data.packing import Assignment, MicroBatch, Packing, assign, micro_batches
from megaopd.models.arch import read_arch
from tests.distributed.workbench import make_sample
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_models import make_tiny_model

VOCAB_SIZE = 509
NUM_LAYERS = 5
TEACHER_HIDDEN = 48
# "sandwich" has QKV biases, and norms behind attention and MLP; "windows" such norms too, sliding
# windows with a RoPE of their own, and a scaled embedding that is tied to the head.
FAMILIES_BY_HEAD = {
    "untied": "Qwen3ForCausalLM",
    "tied": "LlamaForCausalLM",
    "sandwich": "Glm4ForCausalLM",
    "windows": "Gemma3ForCausalLM",
}
EMBEDDING = "model.embed_tokens.weight"

TWO_RANKS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "pp2_uneven": ParallelConfig(pipeline=2, layers_per_stage=(1, 4)),
    "pp2_vp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "pp2_vp2_uneven": ParallelConfig(pipeline=2, virtual_pipeline=2, layers_per_stage=(1, 1, 1, 2)),
    "cp2": ParallelConfig(context=2),
    "dp2": ParallelConfig(),
}
FOUR_RANKS = {
    "tp4": ParallelConfig(tensor=4),
    "tp4_sp": ParallelConfig(tensor=4, sequence_parallel=True),
    "pp4": ParallelConfig(pipeline=4),
    "cp4": ParallelConfig(context=4),
    "dp4": ParallelConfig(),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "tp2_sp_pp2_vp2": ParallelConfig(
        tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True
    ),
    "tp2_cp2": ParallelConfig(tensor=2, context=2),
    "tp2_sp_cp2": ParallelConfig(tensor=2, context=2, sequence_parallel=True),
    "dp2_tp2": ParallelConfig(tensor=2),
    "dp2_cp2": ParallelConfig(context=2),
    "dp2_pp2_vp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "cp2_pp2_vp2": ParallelConfig(context=2, pipeline=2, virtual_pipeline=2),
}
# How the samples are cut: one by one, a number that does not divide, by length, all in one.
PACKINGS = {
    "one": Packing(micro_batch_size=1),
    "three": Packing(micro_batch_size=3),
    "budget": Packing(max_tokens=40),
    "all": Packing(micro_batch_size=8),
}
# Layouts of two ranks meet every family and every packing. Of four ranks, these meet them too; the
# others one family ("untied") and one packing ("three").
ALL_FAMILIES = (*TWO_RANKS, "tp4_sp", "pp4", "cp4", "tp2_sp_cp2")
ALL_PACKINGS = (*TWO_RANKS, "dp4", "dp2_tp2", "dp2_cp2", "tp2_sp_cp2", "tp2_sp_pp2_vp2")
# In `make test` each way of splitting meets others; the rest of the matrix is long.
LONG = ("tp4", "tp4_sp", "pp4", "cp4", "dp4", "tp2_pp2", "tp2_cp2", "dp2_cp2", "dp2_pp2_vp2")
RECOMPUTED = ("tp2_sp", "pp2_vp2", "cp2")
TRAINED = ("tp2_sp", "pp2_vp2", "cp2", "dp2", "tp2_sp_cp2", "dp2_tp2")
WITH_AN_IDLE_RANK = ("dp2", "dp4", "dp2_tp2", "dp2_cp2")
NUM_STEPS = 20


SAMPLES = (
    make_sample(0, 3, 21),
    make_sample(1, 4, 5, mask="xx..x"),
    make_sample(2, 3, 12),
    make_sample(3, 7, 0),
    make_sample(4, 2, 3, mask="..."),
    make_sample(5, 2, 17),
    make_sample(6, 15, 1),  # its one loss token is on one context-parallel rank
    make_sample(7, 5, 2),
)
NUM_LOSS_TOKENS = sum(sum(s.response_mask) for s in SAMPLES)


def _one_rank_idle(dp_size: int) -> Assignment:
    """All samples with a loss token to the first data-parallel rank."""
    with_loss = [i for i, s in enumerate(SAMPLES) if any(s.response_mask)]
    without = [i for i in range(len(SAMPLES)) if i not in with_loss]
    first = tuple(MicroBatch("", tuple(with_loss[i::2])) for i in range(2))
    others = tuple(MicroBatch("", tuple(without[i::2])) for i in range(2))
    return Assignment((first, *[others] * (dp_size - 1)))


class TableHead:
    """A teacher's head of which every rank knows all rows."""

    def __init__(self, tp_rank: int, tp_size: int, num_rows: int) -> None:
        generator = torch.Generator().manual_seed(7)
        head = torch.zeros(num_rows, TEACHER_HIDDEN)
        head[:VOCAB_SIZE] = torch.randn(VOCAB_SIZE, TEACHER_HIDDEN, generator=generator) * 0.3
        self.rows = head.chunk(tp_size)[tp_rank]

    def shard(self) -> Tensor:
        return self.rows


@dataclass(frozen=True)
class Workbench:
    """A layout in place, for students as many as are asked for."""

    folder: Path
    groups: Any

    def student(
        self,
        head: str,
        *,
        dtype: str = "fp32",
        recompute: str = "none",
        freeze: tuple[str, ...] = (),
        lr: float = 1e-2,
        clip_grad: float = 0.0,  # clipping would scale the gradients that are looked at
    ) -> Any:
        from megaopd.engine.student import MegatronStudent
        from megaopd.models.mapping import padded_vocab_size

        path = str(self.folder / head)
        config = Config(
            student=StudentConfig(path, dtype, freeze),
            parallel=self.groups.parallel,
            optimizer=OptimizerConfig(lr=lr, warmup_steps=2, clip_grad=clip_grad),
            train=TrainConfig(recompute=recompute, num_steps=NUM_STEPS),
        )
        rows = padded_vocab_size(VOCAB_SIZE, self.groups.tp.size())
        return MegatronStudent(config, read_arch(path), self.groups, rows, VOCAB_SIZE)

    def batches(self, packing: Packing, assignment: Assignment | None = None) -> list[PackedBatch]:
        groups, parallel = self.groups, self.groups.parallel
        packing = replace(packing, pad_to_multiple=parallel.tensor)
        multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        if assignment is None:
            assignment = assign(SAMPLES, packing, groups.place.dp_size, multiple)
        batches = micro_batches(SAMPLES, assignment, groups.place, packing)
        # From 0 to 2, by the label alone: the same under every layout.
        return [replace(b, token_weights_T=(b.labels_T % 5) / 2 * b.loss_mask_T) for b in batches]

    def signals(self, batches: list[PackedBatch]) -> list[HiddenSignal]:
        from megaopd.models.mapping import padded_vocab_size

        tp = self.groups.tp
        head = TableHead(tp.rank(), tp.size(), padded_vocab_size(VOCAB_SIZE, tp.size()))
        generator = torch.Generator().manual_seed(8)
        num_rows = sum(len(s.response_ids) for s in SAMPLES)
        table = torch.randn(num_rows, TEACHER_HIDDEN, generator=generator)
        return [HiddenSignal(table[b.rows_T[b.loss_mask_T]], head) for b in batches]

    def step(self, student: Any, batches: list[PackedBatch]) -> Any:
        result = student.train_step(batches, self.signals(batches))
        assert not result.skipped
        assert result.num_tokens == NUM_LOSS_TOKENS
        return result


@contextmanager
def layout_in_place(folder: Path, parallel: ParallelConfig) -> Iterator[Workbench]:
    from megaopd.parallel import groups as parallel_groups

    try:
        groups = parallel_groups.initialize(parallel, torch.device("cpu"), seed=1)
        yield Workbench(folder, groups)
    finally:
        parallel_groups.release()


def full_gradients(student: Any) -> dict[str, Tensor]:
    """After a step, by Hugging Face name, on every rank. It uses the student up: the gradients take
    the place of the weights, and go the weights' way out."""
    for chunk in student.ddp:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)
        for param in chunk.parameters():
            param.data.copy_(param.main_grad if param.requires_grad else torch.zeros(()))
    return {name: tensor.clone() for name, tensor in student.export_weights()}


def _difference(found: Tensor, wanted: Tensor) -> float:
    """max |difference| / max |wanted|."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {name: _difference(found[name], wanted[name]) for name in wanted}


def _compare(bench: Workbench, head: str, packing: str) -> dict[str, Any]:
    """One step against the one of a single rank."""
    assignment = _one_rank_idle(bench.groups.place.dp_size) if packing == "idle" else None
    batches = bench.batches(PACKINGS.get(packing, Packing(micro_batch_size=4)), assignment)
    student = bench.student(head)
    result = bench.step(student, batches)
    wanted = torch.load(bench.folder / f"{head}.pt")
    return {
        "metrics": result.metrics,
        "wanted": wanted["metrics"],
        "gradients": differences(full_gradients(student), wanted["gradients"]),
        "num_loss_tokens": sum(int(b.loss_mask_T.sum()) for b in batches),
    }


def _recomputed(bench: Workbench, freeze: tuple[str, ...], head: str = "tied") -> dict[str, Any]:
    """Whether every recomputation gives the gradients and the loss of none, to the bit."""
    batches = bench.batches(PACKINGS["three"])
    found = {}
    for recompute in ("none", "selective", "full"):
        student = bench.student(head, recompute=recompute, freeze=freeze)
        loss = bench.step(student, batches).metrics["loss/divergence"]
        found[recompute] = (loss, full_gradients(student))
    (loss, gradients), *others = found.values()
    return {
        "same_loss": [other == loss for other, _ in others],
        "same_bits": [all(other[n].equal(gradients[n]) for n in gradients) for _, other in others],
        "moving": sum(bool(g.any()) for g in gradients.values()),
        "all": len(gradients),
    }


def _losses(bench: Workbench, dtype: str) -> list[float]:
    """Of steps on the same samples, with clipping, in as few micro-batches as the layout allows."""
    student = bench.student("untied", dtype=dtype, lr=1e-3, clip_grad=1.0)
    batches = bench.batches(PACKINGS["all"])
    return [bench.step(student, batches).metrics["loss/divergence"] for _ in range(NUM_STEPS)]


def _record(rank: int, world_size: int, folder: Path) -> dict[str, list[float]]:
    """What one rank finds in one micro-batch of all samples, as files; and its losses."""
    with layout_in_place(folder, ParallelConfig()) as bench:
        for head in FAMILIES_BY_HEAD:
            student = bench.student(head)
            metrics = bench.step(student, bench.batches(PACKINGS["all"])).metrics
            found = {"metrics": metrics, "gradients": full_gradients(student)}
            torch.save(found, folder / f"{head}.pt")
        return {dtype: _losses(bench, dtype) for dtype in ("fp32", "bf16")}


def _run_layouts(
    rank: int, world_size: int, folder: Path, layouts: dict[str, ParallelConfig]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parallel in layouts.items():
        with layout_in_place(folder, parallel) as bench:
            packings = [*PACKINGS] if name in ALL_PACKINGS else ["three"]
            if name in WITH_AN_IDLE_RANK:
                packings.append("idle")
            cases = [("untied", packing) for packing in packings]
            if name in ALL_FAMILIES:
                cases += [(head, "three") for head in FAMILIES_BY_HEAD if head != "untied"]
            found[name] = {
                "steps": {f"{h}/{packing}": _compare(bench, h, packing) for h, packing in cases}
            }
            if name in TRAINED:
                found[name]["losses"] = {d: _losses(bench, d) for d in ("fp32", "bf16")}
            if name in RECOMPUTED:
                found[name]["recomputed"] = {
                    "frozen": _recomputed(bench, (EMBEDDING,)),
                    "windows": _recomputed(bench, (), "windows"),
                }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("layouts")
    for head, family in FAMILIES_BY_HEAD.items():
        make_tiny_model(
            path / head,
            family,
            seed=2,
            num_hidden_layers=NUM_LAYERS,
            num_key_value_heads=4,
            vocab_size=VOCAB_SIZE,
            tie_word_embeddings=head in ("tied", "windows"),
        )
    return path


@pytest.fixture(scope="module")
def one_rank(folder) -> dict[str, list[float]]:
    return run_distributed(_record, 1, folder, timeout_s=240)[0]


@pytest.fixture(scope="module")
def all_layouts(request, folder, one_rank) -> Callable[[str], list[dict[str, Any]]]:
    """By layout, what every rank found; all layouts of a world that tests are to look at are run at
    once."""
    tests = [item for item in request.session.items if item.module is request.module]
    asked_for = {test.callspec.params["layout"] for test in tests}
    worlds: dict[int, list[dict[str, Any]]] = {}

    def found(name: str) -> list[dict[str, Any]]:
        world_size, layouts = (2, TWO_RANKS) if name in TWO_RANKS else (4, FOUR_RANKS)
        if world_size not in worlds:
            layouts = {name: layout for name, layout in layouts.items() if name in asked_for}
            worlds[world_size] = run_distributed(
                _run_layouts, world_size, folder, layouts, timeout_s=840
            )
        return [rank[name] for rank in worlds[world_size]]

    return found


def _check(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        for name, step in found["steps"].items():
            assert step["metrics"] == pytest.approx(step["wanted"], rel=1e-5, abs=1e-7), name
            assert step["metrics"] == by_rank[0]["steps"][name]["metrics"]
            worst = max(step["gradients"], key=step["gradients"].__getitem__)
            assert step["gradients"][worst] < 1e-5, (name, worst, step["gradients"][worst])


def _parametrize(*layouts: str) -> pytest.MarkDecorator:
    marks = [[pytest.mark.long] if name in LONG else [] for name in layouts]
    params = [pytest.param(name, marks=mark) for name, mark in zip(layouts, marks, strict=True)]
    return pytest.mark.parametrize("layout", params)


@pytest.mark.slow
@pytest.mark.timeout(900)
@_parametrize(*TWO_RANKS, *FOUR_RANKS)
def test_every_layout_has_the_gradients_of_one_rank(all_layouts, layout):
    _check(all_layouts(layout))


@pytest.mark.slow
@pytest.mark.timeout(900)
@_parametrize(*WITH_AN_IDLE_RANK)
def test_a_rank_had_no_loss_token(all_layouts, layout):
    """So the test above says something about it."""
    steps = [found["steps"]["untied/idle"] for found in all_layouts(layout)]
    assert 0 in [step["num_loss_tokens"] for step in steps]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["frozen", "windows"])
@_parametrize(*RECOMPUTED)
def test_recomputation_changes_no_bit(all_layouts, layout, model):
    for found in (rank["recomputed"][model] for rank in all_layouts(layout)):
        assert found["same_loss"] == [True, True]
        assert found["same_bits"] == [True, True]
        assert found["moving"] == found["all"] - (model == "frozen")


@pytest.mark.slow
@pytest.mark.timeout(900)
@_parametrize(*TRAINED)
def test_every_layout_learns_alike(one_rank, all_layouts, layout):
    losses = all_layouts(layout)[0]["losses"]
    assert losses["fp32"] == pytest.approx(one_rank["fp32"], abs=1e-4)
    assert losses["fp32"][-1] < 0.9 * losses["fp32"][0]  # there was something to learn
    assert losses["bf16"] == pytest.approx(one_rank["bf16"], abs=5e-3)
