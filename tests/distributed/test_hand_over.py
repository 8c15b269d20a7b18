"""Labelled rows moved between real processes, from the teacher's layout to the student's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaopd.batch import Sample
from megaopd.config import ParallelConfig
from megaopd.data.packing import Batching, Packing
from megaopd.parallel.layout import Layout
from megaopd.teacher.hand_over import HandOver, host_empty
from tests.helpers.distributed import run_distributed
from tests.helpers.random_batches import random_batching, random_samples

pytestmark = pytest.mark.slow

H = 6
P = ParallelConfig
# (teacher's layout and packing, student's layout and packing), by world size.
PAIRS: dict[int, dict[str, tuple[P, Packing, P, Packing]]] = {
    2: {
        "tp2_to_dp2": (P(tensor=2), Packing(2), P(), Packing(1)),
        "dp2_to_tp2": (P(), Packing(1), P(tensor=2), Packing(3)),
        "pp2_to_tp2": (P(pipeline=2), Packing(2), P(tensor=2), Packing(1, 60)),
        "tp2_to_pp2": (P(tensor=2), Packing(2), P(pipeline=2), Packing(2)),
        "dp2_to_cp2": (P(), Packing(1, 50), P(context=2), Packing(2)),
        "cp2_to_tp2": (P(context=2), Packing(2), P(tensor=2), Packing(1)),
        "other_packing": (P(), Packing(1), P(), Packing(4)),
        "equal": (P(), Packing(2), P(), Packing(2)),
    },
    4: {
        "tp4_to_dp2tp2": (P(tensor=4), Packing(2), P(tensor=2), Packing(1)),
        "dp2tp2_to_tp4": (P(tensor=2), Packing(2), P(tensor=4), Packing(1, 60)),
        "pp2tp2_to_cp2": (P(pipeline=2, tensor=2), Packing(2), P(context=2), Packing(2)),
        "cp2tp2_to_pp4": (P(context=2, tensor=2), Packing(1), P(pipeline=4), Packing(3)),
        "cp4_to_cp2": (P(context=4), Packing(2), P(context=2), Packing(2)),
    },
}


def _hidden(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A hidden state that says which row it is: its number's digits to the base of 100."""
    digits = [(rows // 100**k) % 100 for k in range(H)]
    return torch.stack(digits, dim=1).to(dtype)


def _loss_rows(samples: list[Sample], side: Batching, rank: int) -> list[torch.Tensor]:
    batches = side.micro_batches(samples, side.assign(samples), rank)
    if side.layout.coordinates(rank).pp < side.layout.parallel.pipeline - 1:
        return [torch.zeros(0, dtype=torch.int64) for _ in batches]
    return [b.rows_T[b.loss_mask_T] for b in batches]


def _move(
    samples: list[Sample], teacher: Batching, student: Batching, dtype: torch.dtype
) -> dict[str, Any]:
    rank = dist.get_rank()
    assignments = teacher.assign(samples), student.assign(samples)
    hand_over = HandOver(samples, teacher, assignments[0], student, assignments[1], rank)
    held = torch.cat([*_loss_rows(samples, teacher, rank), torch.zeros(0, dtype=torch.int64)])
    assert len(held) == hand_over.num_held
    cache = host_empty(len(held), H, dtype)
    cache[:] = _hidden(held, dtype)
    handed = hand_over.run(cache, torch.device("cpu"))
    wanted = _loss_rows(samples, student, rank)
    return {
        "right": [h.equal(_hidden(w, dtype)) for h, w in zip(handed, wanted, strict=True)],
        "num_rows": sum(len(h) for h in handed),
        "bytes_sent": hand_over.bytes_sent,
        "total_rows_sent": hand_over.total_rows_sent,
        "views": all(
            h.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
            for h in handed
            if len(h)
        ),
    }


def _work(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    samples = random_samples(random.Random(world_size), 11, privileged=True)
    for name, (theirs, their_packing, ours, our_packing) in PAIRS[world_size].items():
        teacher = Batching(Layout(theirs, world_size), their_packing, "teacher")
        student = Batching(Layout(ours, world_size), our_packing)
        found[name] = _move(samples, teacher, student, torch.bfloat16)
    plain = random_samples(random.Random(7), 11)
    rng = random.Random(world_size)
    for index in range(10):
        teacher = random_batching(rng, world_size, "teacher")
        student = random_batching(rng, world_size)
        found[f"random{index}"] = _move(plain, teacher, student, torch.float32)
    equal = random_batching(rng, world_size)
    found["same"] = _move(plain, equal, equal, torch.bfloat16)
    return found


@pytest.mark.parametrize("world_size", PAIRS)
def test_rows_arrive(world_size: int) -> None:
    by_rank = run_distributed(_work, world_size, timeout_s=120)
    for name in by_rank[0]:
        outcomes = [found[name] for found in by_rank]
        assert all(all(o["right"]) for o in outcomes), name
        assert sum(o["num_rows"] for o in outcomes) > 50, name
        # Every rank knows the total; the bytes are those of the rows, and of nothing else.
        (total,) = {o["total_rows_sent"] for o in outcomes}
        item_size = 4 if name.startswith("random") else 2
        assert sum(o["bytes_sent"] for o in outcomes) == total * H * item_size, name
        if name in ("tp2_to_dp2", "tp4_to_dp2tp2", "tp2_to_pp2", "same"):
            assert total == 0, name
        if name in ("dp2_to_tp2", "pp2_to_tp2", "pp2tp2_to_cp2"):
            assert total > 0, name
        if name == "same":
            assert all(o["views"] for o in outcomes)  # not even a copy
