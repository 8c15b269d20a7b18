"""Several layouts in one process: their groups, Megatron's globals, and nothing left behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaopd.config import ParallelConfig
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.slow

STUDENT = ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2)
TEACHERS = {
    "cp2": ParallelConfig(context=2),
    "tp4": ParallelConfig(tensor=4),
    "tp2_ep2": ParallelConfig(tensor=2, expert=4, expert_tensor=1),
}


def _globals() -> dict[str, Any]:
    """What Megatron's globals say of the layout."""
    from megatron.core import parallel_state as mpu

    if not mpu.model_parallel_is_initialized():
        return {}
    return {
        "tp": mpu.get_tensor_model_parallel_world_size(),
        "pp": mpu.get_pipeline_model_parallel_world_size(),
        "vp": mpu.get_virtual_pipeline_model_parallel_world_size(),
        "cp": mpu.get_context_parallel_world_size(),
        "dp": mpu.get_data_parallel_world_size(),
        "ep": mpu.get_expert_model_parallel_world_size(),
        "expt_tp": mpu.get_expert_tensor_parallel_world_size(),
        "ranks": dist.get_process_group_ranks(mpu.get_tensor_model_parallel_group()),
    }


def _place(groups: Any) -> dict[str, Any]:
    """What the groups say, and what the layout's arithmetic says of the same."""
    at = groups.layout.coordinates(groups.rank)
    ranks = [
        sorted(dist.get_process_group_ranks(group))
        for group in (groups.tp, groups.cp, groups.dp, groups.pp)
    ]
    wanted = [
        sorted(
            r
            for r in range(groups.world_size)
            if all(
                getattr(groups.layout.coordinates(r), other) == getattr(at, other)
                for other in ("tp", "cp", "dp", "pp")
                if other != name
            )
        )
        for name in ("tp", "cp", "dp", "pp")
    ]
    return {
        "groups": [groups.tp.rank(), groups.cp.rank(), groups.dp.rank(), groups.pp.rank()],
        "layout": [at.tp, at.cp, at.dp, at.pp],
        "ranks": ranks,
        "wanted_ranks": wanted,
        "place": (groups.place.dp_rank, groups.place.cp_rank),
        "sizes": (groups.dp_cp.size(), groups.ep.size(), groups.expt_tp.size()),
    }


def _work(rank: int, world_size: int) -> dict[str, Any]:
    from torch.distributed.distributed_c10d import _world

    from megaopd.parallel import groups as parallel_groups

    device = torch.device("cpu")
    before = len(_world.pg_map)
    found: dict[str, Any] = {"rounds": []}
    for _ in range(2):
        student = parallel_groups.initialize(STUDENT, device, seed=1)
        found["first"] = _globals()
        teachers = {n: parallel_groups.initialize(p, device, 1) for n, p in TEACHERS.items()}
        seen: dict[str, Any] = {"after": _globals(), "places": [_place(student)]}
        for name, teacher in teachers.items():
            seen["places"].append(_place(teacher))
            with teacher.active():
                seen[name] = _globals()
                with student.active():
                    seen["inside"] = _globals()
                seen[f"{name} again"] = _globals()
        try:
            with teachers["cp2"].active():
                raise KeyError
        except KeyError:
            seen["after error"] = _globals()
        same = parallel_groups.initialize(ParallelConfig(context=2), device, seed=1)
        seen["shared"] = same is teachers["cp2"]
        # All groups of a layout work beside those of another.
        number = torch.tensor(rank)
        for group in (student.tp, teachers["cp2"].cp, teachers["tp2_ep2"].ep):
            dist.all_reduce(number, group=group)
        seen["number"] = int(number)
        parallel_groups.release()
        seen["released"] = _globals()
        seen["left"] = len(_world.pg_map) - before
        found["rounds"].append(seen)
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return run_distributed(_work, 4, timeout_s=120)


def test_globals_follow_the_active_layout(by_rank):
    for rank, found in enumerate(by_rank):
        first, second = found["rounds"]
        assert first == second  # after release() all can be built anew
        student = found["first"]
        assert student == {
            "tp": 2, "pp": 2, "vp": 2, "cp": 1, "dp": 1, "ep": 1, "expt_tp": 2,
            "ranks": [rank - rank % 2, rank - rank % 2 + 1],
        }  # fmt: skip
        assert first["after"] == first["inside"] == first["after error"] == student
        for name in TEACHERS:
            assert first[name] == first[f"{name} again"] != student
        assert (first["cp2"]["cp"], first["cp2"]["vp"]) == (2, None)
        assert (first["tp2_ep2"]["ep"], first["tp2_ep2"]["expt_tp"]) == (4, 1)
        assert first["tp4"]["ranks"] == [0, 1, 2, 3]


def test_layouts_number_ranks_as_megatron_does(by_rank):
    for place in (p for found in by_rank for p in found["rounds"][0]["places"]):
        assert place["groups"] == place["layout"]
        assert place["ranks"] == place["wanted_ranks"]
        assert place["place"] == (place["layout"][2], place["layout"][1])
    sizes = [place["sizes"] for place in by_rank[0]["rounds"][0]["places"]]
    assert sizes == [(1, 1, 2), (4, 1, 1), (1, 1, 4), (2, 4, 1)]


def test_equal_layouts_share_groups_and_release_leaves_none(by_rank):
    for found in by_rank:
        for seen in found["rounds"]:
            assert seen["shared"]
            assert seen["released"] == {}
            assert seen["left"] == 0
    # (0 + 1), (2 + 3) in pairs, then pairs of pairs, then all four.
    assert {found["rounds"][0]["number"] for found in by_rank} == {24}


def _threads_that_poll(rank: int, world_size: int) -> tuple[int, int, bool]:
    """Of gloo's devices, with two dozen groups and after them; whether torch knows the groups."""
    from megaopd.parallel import groups as parallel_groups

    def count() -> int:
        names = [p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")]
        return names.count("gloo_tcp_loop")

    groups = parallel_groups.initialize(ParallelConfig(tensor=2), torch.device("cpu"), seed=1)
    with_groups = count()
    gc.collect()  # of a group that C++ alone holds, the class is what C++ says
    backend = groups.tp._get_backend(torch.device("cpu"))
    known = isinstance(backend, dist.ProcessGroupGloo)
    parallel_groups.release()
    return with_groups, count(), known


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads have names on Linux")
def test_gloo_polls_with_one_thread():
    assert run_distributed(_threads_that_poll, 2) == [(1, 1, True)] * 2
