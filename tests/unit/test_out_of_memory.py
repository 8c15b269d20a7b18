"""Memory that is not enough: one line, with phase, amounts and what the plan would change."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaopd.config import Config, load
from megaopd.errors import EnvironmentFault, run_cli
from megaopd.out_of_memory import OutOfMemory, is_out_of_memory
from megaopd.plan.memory import plan_memory
from megaopd.plan.presets import find_arch
from megaopd.plan.workload import Workload
from tests.helpers.processes import process_context

STUDENT, TEACHER = find_arch("Qwen3-8B", "student"), find_arch("Qwen3-32B", "teacher")
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of "
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has 138.60 GiB memory in "
    "use. Of the allocated memory 120.00 GiB is allocated by PyTorch, and {} is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting ..."
)
OLD_CUDA = "CUDA out of memory. Tried to allocate 512.00 MiB (GPU 0; 79.15 GiB total capacity; ...)"


def config_of(**train: Any) -> Config:
    config = load(["conf=opd_32b_to_8b"])
    return replace(config, train=replace(config.train, **train))


def told(error: BaseException, phase: str = "student", step: int = 12, **options: Any) -> str:
    watch = OutOfMemory(config_of(), STUDENT, TEACHER, 16, **options).watch
    with pytest.raises(EnvironmentFault) as raised, watch(phase, step):
        raise error
    assert raised.value.exit_status == 5
    assert not raised.value.agreed
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("error", "amounts"),
    [
        (
            torch.OutOfMemoryError(CUDA.format("1.00 GiB")),
            " (tried to allocate 2.0 GiB of 139.8 GiB)",
        ),
        (torch.OutOfMemoryError(OLD_CUDA), " (tried to allocate 0.5 GiB of 79.2 GiB)"),
        (torch.OutOfMemoryError("unknown"), ""),
        (MemoryError(), ""),
        (RuntimeError("CUDA error: out of memory"), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), ""),
        (OSError(12, "Cannot allocate memory"), ""),
    ],
)
def test_what_says_that_memory_is_not_enough(error: BaseException, amounts: str) -> None:
    line = told(error)
    assert line.startswith(f"phase student of step 12 on rank 0: out of memory{amounts}; megaopd.")


def test_what_torch_and_numpy_say_themselves() -> None:
    watch = OutOfMemory(Config(), STUDENT, TEACHER, 1).watch
    with pytest.raises(EnvironmentFault) as raised, watch("start", 0):
        torch.empty(2**50, dtype=torch.float32)
    assert str(raised.value).startswith("phase start: out of memory (tried to allocate 4096.0 TiB)")
    with pytest.raises(EnvironmentFault) as raised, watch("pack", 3):
        np.ones(2**49)
    assert "phase pack of step 3: out of memory (tried to allocate 4096.0 TiB); " in str(
        raised.value
    )


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), OSError(28, "No space left on device"), ValueError("x")],
)
def test_other_errors_are_left_alone(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    watch = OutOfMemory(Config(), STUDENT, TEACHER, 1).watch
    with pytest.raises(type(error)) as raised, watch("student", 1):
        raise error
    assert raised.value is error


def peak(config: Config, *phases: str) -> float:
    work = Workload.of(config, STUDENT, TEACHER, 16)
    return max(rank.total(phase) for rank in plan_memory(work) for phase in phases) / 2**30


def test_the_advice_is_what_the_plan_counts() -> None:
    config = config_of()
    advice = OutOfMemory(config, STUDENT, TEACHER, 16).advice
    student, teacher = advice("student"), advice("teacher")
    now = peak(config, "student", "optimizer")
    fewer = peak(config_of(max_tokens_per_micro_batch=10240), "student", "optimizer")
    full = peak(config_of(recompute="full"), "student", "optimizer")
    assert now > fewer > full
    wanted = (
        f"megaopd.plan counts {now:.1f} GiB in this phase: "
        f"train.max_tokens_per_micro_batch=10240 makes it {fewer:.1f} GiB, "
        f"train.recompute=full makes it {full:.1f} GiB, teacher.offload=true makes it "
    )
    assert student.startswith(wanted)
    # What the teacher's phase does not need is out of its way; its own budget is at its least.
    offloaded = peak(config_of(offload=True), "teacher")
    assert teacher.startswith(
        f"megaopd.plan counts {peak(config, 'teacher'):.1f} GiB in this phase: "
        f"train.offload=true makes it {offloaded:.1f} GiB, parallel.tensor=4 makes it "
    )
    assert "teacher.parallel.tensor=8" in teacher


def test_only_what_can_be_set_is_advised() -> None:
    """10240 tokens hold the longest sequence; 32 heads and 8 KV heads are not divided by 16."""
    config = config_of(max_tokens_per_micro_batch=10240, recompute="full", offload=True)
    config = replace(
        config,
        teacher=replace(config.teacher, offload=True, max_tokens_per_micro_batch=10240),
        parallel=replace(config.parallel, tensor=8),
        rollout=replace(config.rollout, batch_size=1),
    )
    memory = OutOfMemory(config, STUDENT, TEACHER, 16)
    assert memory.advice("student") == ""
    wanted = "; lower train.max_tokens_per_micro_batch, or use more devices"
    with pytest.raises(EnvironmentFault, match=wanted), memory.watch("student", 1):
        raise MemoryError
    served = replace(config, teacher=replace(config.teacher, kind="sglang", offload=False))
    assert "teacher" not in OutOfMemory(served, STUDENT, STUDENT, 16).advice("student")


def test_samples_in_a_micro_batch_are_the_first_to_go() -> None:
    config = config_of(max_tokens_per_micro_batch=None, micro_batch_size=4)
    found = OutOfMemory(config, STUDENT, TEACHER, 16).advice("student")
    assert ": train.micro_batch_size=1 makes it " in found


def test_memory_in_pieces_is_named() -> None:
    line = told(torch.OutOfMemoryError(CUDA.format("9.00 GiB")), rank=5)
    assert line.startswith(
        "phase student of step 12 on rank 5: out of memory (tried to allocate 2.0 GiB of 139.8 "
        "GiB); set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or: megaopd.plan counts "
    )


def _allocates_too_much(stderr: str) -> None:
    file = os.open(stderr, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (256 << 20),) * 2)

    def main(argv: list[str]) -> None:
        with OutOfMemory(config_of(), STUDENT, TEACHER, 16, rank=3).watch("student", 12):
            torch.ones(1 << 30, dtype=torch.uint8)

    run_cli(main, sys.argv[1:])


@pytest.mark.slow
def test_a_process_that_gets_no_more_memory_ends_in_one_line(tmp_path: Path) -> None:
    stderr = tmp_path / "stderr"
    process = process_context().Process(target=_allocates_too_much, args=(str(stderr),))
    process.start()
    process.join(timeout=150)
    process.kill()
    assert process.exitcode == 5
    assert stderr.read_text().startswith(
        "error: phase student of step 12 on rank 3: out of memory (tried to allocate 1.0 GiB); "
        "megaopd.plan counts 100.8 GiB in this phase: train.max_tokens_per_micro_batch=10240 makes "
    )
    assert stderr.read_text().count("\n") == 1
