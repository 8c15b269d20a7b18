"""What the plan says a student takes, against the storages of real ones.

One launch of two ranks builds students in several layouts, each of which takes a real step.
Weights, gradients, optimizer state and main weights are compared to the byte; activations are what
autograd holds at its fullest moment.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaopd.batch import HiddenSignal, Prompt, Sample
from megaopd.config import (
    Config,
    OptimizerConfig,
    ParallelConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from megaopd.models.arch import ModelArch, read_arch
from megaopd.models.mapping import padded_vocab_size
from megaopd.plan.activations import training_activations
from megaopd.plan.parameters import rank_parameters
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

WORLD = 2
TEACHER_HIDDEN, NUM_MICRO_BATCHES, TOKENS = 96, 4, 128
# Every tensor is a multiple of 64 elements, as in real models: no gaps in Megatron's buffers.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 64,
    "num_attention_heads": 4,
    "vocab_size": 509,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("Qwen3ForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "moe": ("Qwen3MoeForCausalLM", MOE),
    "windows": ("Gemma3ForCausalLM", {"tie_word_embeddings": True, "sliding_window": 32}),
    "norms": ("Glm4ForCausalLM", {}),  # of outputs too; biases; gate and up in one tensor
}
LAYOUTS = {
    "dp2": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "pp2x2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "cp2": ParallelConfig(context=2),
    "ep2": ParallelConfig(expert=2),
}
# (model, layout, dtype, recompute)
Case = tuple[str, str, str, str]
CASES: tuple[Case, ...] = (
    *(("untied", layout, "bf16", "none") for layout in LAYOUTS if layout != "ep2"),
    ("untied", "dp2", "fp32", "none"),
    ("untied", "dp2", "bf16", "selective"),
    ("untied", "pp2", "bf16", "full"),
    ("tied", "dp2", "bf16", "none"),
    ("tied", "tp2", "bf16", "none"),
    ("tied", "pp2", "bf16", "none"),
    ("moe", "dp2", "bf16", "none"),
    ("moe", "ep2", "bf16", "none"),
    ("norms", "dp2", "bf16", "none"),
    ("norms", "tp2_sp", "bf16", "none"),
    ("windows", "dp2", "bf16", "none"),
    ("windows", "cp2", "bf16", "none"),
)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of every storage, whatever share of it a tensor is."""
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


class _Kept:
    """A tensor that autograd keeps; it lives as long as the graph wants it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """The most that autograd kept at any time, by storage.

    Args:
        known: addresses of storages that are not activations.
    """

    def __init__(self, known: set[int]) -> None:
        self.peak, self._known = 0, known
        self._alive: weakref.WeakSet[_Kept] = weakref.WeakSet()
        super().__init__(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor.detach())
        self._alive.add(kept)
        return kept

    def look(self, *_: Any) -> None:
        """Counts what is alive."""
        storages = _storages(kept.tensor for kept in self._alive)
        self.peak = max(self.peak, sum(n for a, n in storages.items() if a not in self._known))


def _sample(index: int) -> Sample:
    ids = torch.randint(0, 500, (TOKENS,), generator=torch.Generator().manual_seed(index)).tolist()
    num = TOKENS // 2
    prompt = Prompt(str(index), tuple(ids[:num]))
    return Sample(prompt, 0, tuple(ids[num:]), (-5.0,) * num, (True,) * num, "stop", 0)


@dataclass(frozen=True)
class _Head:
    rows: Tensor

    def shard(self) -> Tensor:
        return self.rows


def _measure(rank: int, world_size: int, folder: str, cases: tuple[Case, ...]) -> list[Any]:
    return [_measure_one(Path(folder), *case) for case in cases]


def _measure_one(folder: Path, name: str, layout: str, dtype: str, recompute: Any) -> Any:
    from megaopd.data.packing import pack
    from megaopd.engine.student import MegatronStudent
    from megaopd.models.build import DTYPES
    from megaopd.parallel.groups import initialize

    parallel = LAYOUTS[layout]
    groups = initialize(parallel, torch.device("cpu"), seed=1)
    path = str(folder / name)
    config = Config(
        student=StudentConfig(path, dtype),
        teacher=TeacherConfig(path=path, dtype=dtype),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-3),
        train=replace(TrainConfig(), recompute=recompute),
    )
    arch = read_arch(path)
    rows = padded_vocab_size(arch.vocab_size, parallel.tensor)
    student = MegatronStudent(config, arch, groups, rows, arch.vocab_size)

    # A sample a micro-batch: TOKENS tokens over the context-parallel ranks.
    batches = [
        pack([_sample(i)], parallel.tensor, place=groups.place) for i in range(NUM_MICRO_BATCHES)
    ]
    head = _Head(torch.randn(rows // parallel.tensor, TEACHER_HIDDEN).to(DTYPES[dtype]))
    signals = []
    for batch in batches:
        length = int(batch.loss_mask_T.sum()) if groups.is_last_stage else 0
        signals.append(HiddenSignal(torch.randn(length, TEACHER_HIDDEN).to(DTYPES[dtype]), head))

    weights = _storages(p for chunk in student.chunks for p in chunk.parameters())
    buffers = [b for d in student.ddp for b in (*d.buffers, *d.expert_parallel_buffers)]
    gradients = _storages(b.grad_data for b in buffers)
    saved = SavedBytes({*weights, *gradients})
    for chunk in student.chunks:
        chunk.register_forward_hook(saved.look)
        for layer in chunk.decoder.layers:  # also when a layer is computed again
            layer.register_forward_hook(saved.look)
    with saved:
        student.train_step(batches, signals)

    optimizers = getattr(student.optimizer, "chained_optimizers", [student.optimizer])
    state, main = [], []
    for part in optimizers:
        for values in part.optimizer.state.values():
            # torch's Adam counts steps in a scalar per tensor; a fused one in its group.
            state += [v for v in values.values() if isinstance(v, Tensor) and v.dim()]
        main += [p for group in part.optimizer.param_groups for p in group["params"]]
    main_storages = {a: n for a, n in _storages(main).items() if a not in weights}
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(_storages(state).values()),
        "main": sum(main_storages.values()),
        "activations": saved.peak,
        "stage": groups.pp.rank(),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    for name, (family, fields) in MODELS.items():
        make_tiny_model(folder / name, family, **(SIZES | fields))
    return folder


@pytest.fixture(scope="module")
def measured(models: Path) -> dict[Case, list[dict[str, int]]]:
    by_rank = run_distributed(_measure, WORLD, str(models), CASES, timeout_s=180)
    return {case: [rank[i] for rank in by_rank] for i, case in enumerate(CASES)}


def _arch(models: Path, case: Case) -> ModelArch:
    return read_arch(models / case[0])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_weights_gradients_and_optimizer_are_planned_to_the_byte(
    case: Case, measured: dict[Case, list[dict[str, int]]], models: Path
) -> None:
    size = {"bf16": 2, "fp32": 4}[case[2]]
    for rank in measured[case]:
        plan = rank_parameters(_arch(models, case), LAYOUTS[case[1]], WORLD, rank["stage"])
        assert rank["weights"] == plan.stored * size
        assert rank["gradients"] == plan.gradients * 4
        main = plan.optimizer_shard * 4
        assert rank["optimizer"] == 2 * main
        assert rank["main"] == (main if size == 2 else 0)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_activations_are_planned_within_the_stated_error(
    case: Case, measured: dict[Case, list[dict[str, int]]], models: Path
) -> None:
    parallel = LAYOUTS[case[1]]
    for rank in measured[case]:
        plan = training_activations(
            _arch(models, case),
            parallel,
            rank["stage"],
            tokens=TOKENS // parallel.context,
            num_micro_batches=NUM_MICRO_BATCHES,
            dtype_bytes={"bf16": 2, "fp32": 4}[case[2]],
            recompute=case[3],
            fused=False,
        )
        # Shown with -rA: the figures of docs/parallelism.md.
        print("-".join(case), "stage", rank["stage"], rank["activations"], plan.saved)
        assert rank["activations"] == pytest.approx(plan.saved, rel=0.1)
