"""What is alive on the device in which phase, by counting live tensor storage; offloading and
recomputation change no bit of losses and weights.

On the CPU "the device" is every live tensor storage but the memory that `HostOffload` holds. One
launch of two ranks, tensor-parallel, with a teacher of another hidden size than the student's.
"""

from __future__ import annotations

import gc
import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaopd.batch import Prompt, Sample
from megaopd.config import (
    Config,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from megaopd.data.packing import Batching, Packing
from megaopd.models.arch import read_arch
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

VOCAB_SIZE = 2048
SHARD_ROWS = VOCAB_SIZE // 2
STUDENT_HIDDEN, TEACHER_HIDDEN = 48, 80
STUDENTS = {"dense": "Qwen3ForCausalLM", "tied": "LlamaForCausalLM", "moe": "Qwen3MoeForCausalLM"}
TEACHERS = {"untied": "Qwen3ForCausalLM", "tied": "LlamaForCausalLM"}
# Small things that no owner claims: positions, masks, labels, rotary tables, sums of metrics.
SMALL_BYTES = 16 << 10
NUM_STEPS = 3
CHUNK_TOKENS = 32

P = ParallelConfig
# Name -> (student, teacher, dtype of both, student's layout, teacher's layout).
RUNS: dict[str, tuple[str, str, str, P, P]] = {
    "fp32": ("dense", "untied", "fp32", P(tensor=2), P(tensor=2)),
    "bf16": ("dense", "untied", "bf16", P(tensor=2), P(tensor=2)),
    "tied": ("tied", "tied", "fp32", P(tensor=2), P(tensor=2)),
    "bf16_sharded_state": ("tied", "untied", "bf16", P(), P(tensor=2)),
    "moe": ("moe", "tied", "bf16", P(expert=2), P(pipeline=2)),
    "stages": ("dense", "tied", "fp32", P(pipeline=2), P()),
}
RECOMPUTE = ("none", "selective", "full")


def _samples() -> tuple[Sample, ...]:
    """Enough loss tokens that [tokens, vocabulary shard] is larger than any tensor of weights."""
    rng = random.Random(5)
    samples = []
    for i in range(8):
        ids = [rng.randrange(VOCAB_SIZE) for _ in range(70)]
        samples.append(
            Sample(
                Prompt(str(i), tuple(ids[:6])),
                0,
                tuple(ids[6:]),
                (-7.0,) * 64,
                (True,) * 64,
                "stop",
                0,
            )
        )
    return tuple(samples)


SAMPLES = _samples()
LOSS_TOKENS = 4 * 64  # of a micro-batch


@dataclass
class Bench:
    """Teacher and student of a run, and what they are fed."""

    teacher: Any
    student: Any
    batching: Batching
    rank: int

    @classmethod
    def build(
        cls,
        folder: Path,
        run: tuple[str, str, str, P, P],
        offload: bool,
        recompute: str = "none",
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> Bench:
        from megaopd.engine.student import MegatronStudent
        from megaopd.models.mapping import padded_vocab_size
        from megaopd.parallel import groups as parallel_groups
        from megaopd.teacher.megatron import MegatronTeacher

        student, teacher, dtype, layout, teacher_layout = run
        config = Config(
            student=StudentConfig(str(folder / f"student_{student}"), dtype),
            teacher=TeacherConfig(
                path=str(folder / f"teacher_{teacher}"), dtype=dtype, offload=offload
            ),
            parallel=layout,
            loss=LossConfig(chunk_tokens=chunk_tokens, backend="eager"),
            optimizer=OptimizerConfig(lr=1e-2),
            train=TrainConfig(offload=offload, recompute=recompute),
        )
        device = torch.device("cpu")
        groups = parallel_groups.initialize(layout, device, seed=1)
        own = parallel_groups.initialize(teacher_layout, device, seed=1)
        batching = Batching(groups.layout, Packing(4, pad_to_multiple=layout.tensor))
        scoring = Batching(own.layout, Packing(2, pad_to_multiple=teacher_layout.tensor), "teacher")
        rows = padded_vocab_size(VOCAB_SIZE, layout.tensor)
        arch = read_arch(config.teacher.path)
        return cls(
            MegatronTeacher(config.teacher, arch, own, scoring, batching, rows),
            MegatronStudent(config, read_arch(config.student.path), groups, rows, VOCAB_SIZE),
            batching,
            groups.rank,
        )

    def micro_batches(self) -> list[Any]:
        batches = self.batching.micro_batches(SAMPLES, self.batching.assign(SAMPLES), self.rank)
        # From 1/3 to 5/3, by the label: none is 0, so every loss token is scored.
        return [
            replace(b, token_weights_T=(b.labels_T % 5 + 1) / 3 * b.loss_mask_T) for b in batches
        ]


def _train(bench: Bench) -> dict[str, Any]:
    """Some steps as the trainer takes them; what came of them."""
    found: dict[str, Any] = {"losses": [], "grad_norms": []}
    student, teacher = bench.student, bench.teacher
    for _ in range(NUM_STEPS):
        with student.off_device():
            pass  # an engine would generate
        result = student.train_step(bench.micro_batches(), teacher.score(SAMPLES))
        assert not result.skipped
        found["losses"].append(result.metrics["loss/divergence"])
        found["grad_norms"].append(result.metrics["train/grad_norm"])
    evaluated = student.evaluate(bench.micro_batches(), teacher.score(SAMPLES))
    found["evaluated"] = evaluated.metrics["loss/divergence"]
    return found


def _weights(bench: Bench) -> dict[str, str]:
    """The weights by name, as digests of their bits.

    Asked for last: gloo's threads keep what they sent last for a while.
    """
    return {
        # A copy: `numpy` fixes the size of a storage for good.
        name: hashlib.sha256(t.clone().float().numpy().tobytes()).hexdigest()
        for name, t in bench.student.export_weights()
    }


def _storages(tensors: Iterable[Tensor | None]) -> dict[torch.UntypedStorage, int]:
    """The distinct storages that hold anything, and their bytes."""
    found = (t.untyped_storage() for t in tensors if t is not None and t.device.type == "cpu")
    return {s: s.nbytes() for s in found if s.nbytes()}


def _alive() -> dict[torch.UntypedStorage, int]:
    """The storages that came to life since `gc.freeze`."""
    gc.collect()
    return _storages(o for o in gc.get_objects() if issubclass(type(o), Tensor))


def _account(bench: Bench) -> dict[str, int]:
    """Bytes on the device by what they are for; `other` is what no owner claims."""
    from megaopd.engine.offload import gradients, optimizer_tensors, parameters

    student, teacher = bench.student, bench.teacher
    pools = (teacher.offload, student.weights, student.training_state)
    # Megatron's stages keep what they received last, and its gradient.
    inputs = [c.decoder.input_tensor for c in (*student.chunks, *teacher.chunks)]
    owners: dict[str, Iterable[Tensor | None]] = {
        "host": [piece for pool in pools for piece in pool.host_buffers],
        "head": [teacher.head.rows],
        "teacher": parameters(teacher.chunks),
        "weights": parameters(student.chunks),
        "gradients": gradients(student.ddp),
        "optimizer": optimizer_tensors(student.optimizer, student.chunks),
        "stage input": [*inputs, *(t.grad for t in inputs if t is not None)],
    }
    alive = _alive()
    account = {
        name: sum(alive.pop(storage, 0) for storage in _storages(tensors))
        for name, tensors in owners.items()
    }
    account["other"] = sum(size for size in alive.values() if size > SMALL_BYTES)
    return account


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor of numbers that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return out


def _phases(bench: Bench) -> dict[str, Any]:
    """The accounts of one more step, phase by phase, and the largest tensor of its student
    phase."""
    accounts = {}
    teacher, optimizer = bench.teacher, bench.student.optimizer
    with bench.student.off_device():
        accounts["rollout"] = _account(bench)
    forward, prepare = teacher._hidden_states, optimizer.prepare_grads

    def scoring(*args: Any) -> Tensor:
        accounts["teacher"] = _account(bench)
        return forward(*args)

    def prepared() -> Any:
        accounts["student"] = _account(bench)
        return prepare()

    teacher._hidden_states, optimizer.prepare_grads = scoring, prepared
    batches, signals = bench.micro_batches(), bench.teacher.score(SAMPLES)
    cache = sum(_storages(s.hidden_LH for s in signals).values())
    with Largest() as largest:
        bench.student.train_step(batches, signals)
    del signals, batches
    accounts["after"] = _account(bench)
    return {"accounts": accounts, "cache": cache, "largest": largest.numel}


def _saved_bytes(bench: Bench) -> int:
    """What the forward pass of one micro-batch keeps for the backward pass, weights left out."""
    from megaopd.engine import schedule
    from megaopd.engine.offload import parameters

    weights = _storages(parameters(bench.student.chunks))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() == -1:  # not in the recomputed forward
            saved.append(tensor)
        return tensor

    def loss(index: int, batch: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
        return hidden.sum(), batch.loss_mask_T.sum().int(), None

    with bench.student.training_state.on_device(), saved_tensors_hooks(pack, lambda t: t):
        batches = bench.micro_batches()[:1]
        schedule.forward_backward(bench.student.ddp, batches, bench.student.groups, loss)
    return sum(size for storage, size in _storages(saved).items() if storage not in weights)


def _work(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from megaopd.engine.student import MegatronStudent  # noqa: F401, before the first freeze
    from megaopd.parallel import groups as parallel_groups

    found: dict[str, Any] = {}

    def of(key: Any, run: str, *works: Callable[..., Any], **how: Any) -> None:
        gc.collect()
        gc.freeze()  # what is alive now is nobody's affair
        bench = Bench.build(folder, RUNS[run], **how)
        found[key] = {work.__name__: work(bench) for work in works}
        parallel_groups.release()

    for run in RUNS:
        for offload in (False, True):
            of((run, offload), run, _train, _phases, _weights, offload=offload)
    for recompute in RECOMPUTE:
        of(recompute, "fp32", _saved_bytes, _train, _weights, offload=False, recompute=recompute)
    of("whole", "fp32", _phases, offload=True, chunk_tokens=LOSS_TOKENS)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two_phase")
    for role, families, hidden_size in (
        ("student", STUDENTS, STUDENT_HIDDEN),
        ("teacher", TEACHERS, TEACHER_HIDDEN),
    ):
        for name, family in families.items():
            make_tiny_model(
                path / f"{role}_{name}",
                family,
                seed=hidden_size,
                vocab_size=VOCAB_SIZE,
                num_hidden_layers=2,
                hidden_size=hidden_size,
                tie_word_embeddings=name == "tied",
            )
    return path


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[Any, Any]]:
    return run_distributed(_work, 2, folder, timeout_s=400)


@pytest.mark.parametrize("run", RUNS)
def test_offload_changes_no_bit(outcomes: list[dict[Any, Any]], run: str) -> None:
    for outcome in outcomes:
        trained = outcome[run, False]["_train"]
        assert outcome[run, True]["_train"] == trained
        assert outcome[run, True]["_weights"] == outcome[run, False]["_weights"]
        assert trained["losses"][-1] < 0.9 * trained["losses"][0]  # it does train


@pytest.mark.parametrize("run", RUNS)
def test_what_is_alive_in_which_phase(outcomes: list[dict[Any, Any]], run: str) -> None:
    _, _, dtype, layout, _ = RUNS[run]
    head_bytes = VOCAB_SIZE // layout.tensor * TEACHER_HIDDEN * (4 if dtype == "fp32" else 2)
    for rank, outcome in enumerate(outcomes):
        phases = outcome[run, True]["_phases"]
        for phase, account in phases["accounts"].items():
            is_last = layout.pipeline == 1 or rank == 1
            assert account["head"] == (head_bytes if is_last else 0), phase
            assert (account["teacher"] > 0) == (phase == "teacher"), phase
            assert (account["weights"] > 0) == (phase != "rollout"), phase
            assert (account["gradients"] > 0) == (phase == "student"), phase
            assert (account["optimizer"] > 0) == (phase == "student"), phase
            cache = phases["cache"] if phase == "student" else 0
            assert account["other"] == (cache if cache > SMALL_BYTES else 0), phase


@pytest.mark.parametrize("run", RUNS)
def test_without_offload_all_of_it_is_alive(outcomes: list[dict[Any, Any]], run: str) -> None:
    """The counting sees what it looks for."""
    for outcome in outcomes:
        for phase, account in outcome[run, False]["_phases"]["accounts"].items():
            for owner in ("teacher", "weights", "gradients", "optimizer"):
                assert account[owner] > 0, (phase, owner)
            wanted = outcome[run, True]["_phases"]["accounts"]["student"]
            for owner in ("weights", "gradients", "optimizer"):
                assert account[owner] == wanted[owner], (phase, owner)


@pytest.mark.parametrize("run", RUNS)
def test_no_tensor_of_tokens_by_vocabulary(outcomes: list[dict[Any, Any]], run: str) -> None:
    shard_rows = VOCAB_SIZE // RUNS[run][3].tensor
    for outcome in outcomes:
        for offload in (False, True):
            assert outcome[run, offload]["_phases"]["largest"] < LOSS_TOKENS * shard_rows
        assert outcome["whole"]["_phases"]["largest"] == LOSS_TOKENS * SHARD_ROWS  # it is seen


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputation_changes_no_bit(outcomes: list[dict[Any, Any]], recompute: str) -> None:
    for outcome in outcomes:
        assert outcome[recompute]["_train"] == outcome["fp32", False]["_train"]
        assert outcome[recompute]["_weights"] == outcome["none"]["_weights"]


def test_recomputation_keeps_less_for_the_backward_pass(outcomes: list[dict[Any, Any]]) -> None:
    for outcome in outcomes:
        none, selective, full = (outcome[name]["_saved_bytes"] for name in RECOMPUTE)
        assert none > selective > full
        assert full < none / 5
