"""What teachers say about the student's tokens, against transformers: two teachers of different
sizes and vocabularies, each in its own layout, one of them with a prompt that the student does not
see."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megaopd.batch import Prompt, Sample
from megaopd.config import ParallelConfig, TeacherConfig
from megaopd.data.packing import Batching, Packing
from megaopd.models.arch import read_arch
from megaopd.parallel.layout import Layout
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

P = ParallelConfig
VOCAB_SIZE = 509  # of the student; the teachers' are larger
TEACHERS = {
    "": ("Qwen3ForCausalLM", {"vocab_size": 509}),
    "b": ("LlamaForCausalLM", {"vocab_size": 640, "hidden_size": 32, "tie_word_embeddings": True}),
}
# Name -> (student's layout, layouts of the two teachers).
LAYOUTS = {
    "equal": (P(tensor=2), (P(tensor=2), P(tensor=2))),
    "student_tp2": (P(tensor=2), (P(), P(pipeline=2))),
    "student_dp2": (P(), (P(tensor=2, sequence_parallel=True), P(context=2))),
    "student_cp2": (P(context=2), (P(tensor=2), P())),
}


def _samples() -> list[Sample]:
    rng = random.Random(3)
    samples = []
    for i in range(7):
        prompt, response = (
            tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(2, 9))) for _ in range(2)
        )
        extra = tuple(rng.randrange(VOCAB_SIZE) for _ in range(11)) if i % 2 else None
        samples.append(
            Sample(
                Prompt(str(i), prompt, None, "b" if i % 3 == 1 else "", extra),
                0,
                response,
                (0.0,) * len(response),
                tuple(rng.random() < 0.8 for _ in response),
                "stop",
                0,
            )
        )
    return samples


def _score(folder: Path, layouts: tuple[P, tuple[P, P]]) -> dict[str, Any]:
    """This rank's columns of the teachers' logits, by row."""
    from megaopd.models.mapping import padded_vocab_size
    from megaopd.parallel import groups as parallel_groups
    from megaopd.teacher.head import HeadSlot, HostedHead
    from megaopd.teacher.megatron import MegatronTeacher
    from megaopd.teacher.routed import RoutedTeacher

    device = torch.device("cpu")
    groups = parallel_groups.initialize(layouts[0], device, seed=1)
    student = Batching(groups.layout, Packing(2, pad_to_multiple=layouts[0].tensor))
    slot = HeadSlot(device)
    rows = padded_vocab_size(VOCAB_SIZE, layouts[0].tensor)
    teachers = {}
    for name, parallel in zip(TEACHERS, layouts[1], strict=True):
        own = parallel_groups.initialize(parallel, device, seed=1)
        path = str(folder / f"teacher{name}")
        batching = Batching(own.layout, Packing(1, 60, parallel.tensor), "teacher")
        config = TeacherConfig(path=path, dtype="fp32")
        teachers[name] = MegatronTeacher(
            config, read_arch(path), own, batching, student, rows, name, slot
        )
    samples = _samples()
    teacher = RoutedTeacher(teachers, student, groups.rank)
    signals = teacher.score(samples)
    batches = student.micro_batches(samples, student.assign(samples), groups.rank)
    found: dict[int, torch.Tensor] = {}
    for batch, signal in zip(batches, signals, strict=True):
        logits = signal.hidden_LH @ signal.head.shard().T
        found.update(zip(batch.rows_T[batch.loss_mask_T].tolist(), logits, strict=True))
    hosted = [isinstance(t.head, HostedHead) for t in teachers.values()]
    parallel_groups.release()
    return {
        "logits": found,
        "hosted": hosted,
        "tp_rank": Layout(layouts[0], 2).coordinates(groups.rank).tp,
        "bytes": teacher.metrics["perf/hand_over_bytes"],
    }


def _work(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    return {name: _score(folder, layouts) for name, layouts in LAYOUTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teachers")
    for seed, (name, (family, sizes)) in enumerate(TEACHERS.items()):
        make_tiny_model(path / f"teacher{name}", family, seed=seed, **sizes)
    return path


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[str, Any]]:
    return run_distributed(_work, 2, folder, timeout_s=240)


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[int, torch.Tensor]:
    """transformers' logits of every loss token, each sample by itself, as its teacher sees it."""
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder / f"teacher{name}", dtype=torch.float32)
        for name in TEACHERS
    }
    found, row = {}, 0
    for sample in _samples():
        prompt = sample.prompt.teacher_token_ids or sample.prompt.token_ids
        with torch.no_grad():
            ids = torch.tensor([prompt + sample.response_ids])
            logits = models[sample.prompt.teacher](ids).logits[0]
        for r, counts in enumerate(sample.response_mask):
            if counts:
                found[row + r] = logits[len(prompt) - 1 + r, :VOCAB_SIZE]
        row += len(sample.response_ids)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_signals_are_the_teachers_own_words(
    outcomes: list[dict[str, Any]], reference: dict[int, torch.Tensor], layout: str
) -> None:
    tp_size = LAYOUTS[layout][0].tensor
    columns = [
        {
            row: logits
            for outcome in outcomes
            if outcome[layout]["tp_rank"] == tp_rank
            for row, logits in outcome[layout]["logits"].items()
        }
        for tp_rank in range(tp_size)
    ]
    assert all(set(part) == set(reference) for part in columns)
    for row, wanted in reference.items():
        found = torch.cat([part[row] for part in columns])
        torch.testing.assert_close(found[:VOCAB_SIZE], wanted, rtol=1e-4, atol=1e-4)


def test_a_head_is_read_again_only_where_the_model_has_it_elsewhere(
    outcomes: list[dict[str, Any]],
) -> None:
    # With 640 rows in all, 384 a rank, teacher b's are cut otherwise than the student's 256 a rank.
    assert [o["equal"]["hosted"] for o in outcomes] == [[False, False], [False, True]]
    assert [o["student_tp2"]["hosted"] for o in outcomes] == [[False, True], [False, False]]
    assert all(o["student_dp2"]["hosted"] == [True, False] for o in outcomes)
    assert all(o["student_cp2"]["hosted"] == [True, False] for o in outcomes)


def test_equal_layouts_hand_over_nothing_but_to_another_packing(
    outcomes: list[dict[str, Any]],
) -> None:
    assert {o["equal"]["bytes"] for o in outcomes} == {0.0}
    assert outcomes[0]["student_tp2"]["bytes"] == outcomes[1]["student_tp2"]["bytes"] > 0
