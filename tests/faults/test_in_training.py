"""Ranks that hang, and numbers and samples that no step should be made of."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from megaopd.storage.steps import step_directory
from tests.faults.conftest import Report
from tests.faults.course import NOTICED_S, attempt, difference, figures, run
from tests.helpers.checkpoints import stored_tensors
from tests.helpers.runs import make_run, metrics_of
from tests.helpers.tiny_models import TINY_CONFIG

pytestmark = pytest.mark.slow

LENGTH = "train.num_steps=6"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def unbroken(config: Path) -> Path:
    done = run(config, config.parent / "unbroken", LENGTH)
    assert done.status == 0, done.said
    return config.parent / "unbroken"


def stacks(run_dir: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((run_dir / "stacks").iterdir())}


@pytest.mark.parametrize(
    ("phase", "rank"),
    [
        ("student", 1),
        pytest.param("teacher", 0, marks=pytest.mark.long),
        pytest.param("rollout", 1, marks=pytest.mark.long),
    ],
)
def test_a_rank_asleep_for_ever(
    config: Path, unbroken: Path, tmp_path: Path, report: Report, phase: str, rank: int
) -> None:
    run_dir, deadline_s = tmp_path / "run", 10
    fault = {"kind": "asleep", "rank": rank, "phase": phase, "step": 5}
    words = (LENGTH, f"deadline.{phase}_s={deadline_s}")
    with attempt(config, run_dir, *words, fault=fault) as started:
        started.finish()
        ended = time.time()
    injected = float(re.findall(r"asleep in .* at ([\d.]+)", started.said)[0])
    assert started.status == 5, started.said
    assert None not in started.statuses
    assert ended - injected < deadline_s + NOTICED_S
    lines = [line for line in started.said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, started.said
    assert f"rank {rank}" in lines[0]
    assert phase in lines[0]
    found = stacks(run_dir)
    assert set(found) >= {"rank_0.txt", "rank_1.txt"}
    assert "sleeping" in found[f"rank_{rank}.txt"]
    done = run(config, run_dir, LENGTH)
    # The checkpoint of step 4 may have been under way.
    assert done.status == 0, done.said
    assert done.resumed in (2, 4)
    assert difference(run_dir, unbroken) == ""
    line = re.sub(r"\S*/stacks", "DIR/stacks", lines[0])
    report(
        f"rank {rank} asleep for ever in the phase `{phase}` (deadline {deadline_s} s)",
        f"{ended - injected:.0f} s later exit status 5 on all ranks: `{line}`; the stacks of all "
        "ranks are there; the next start goes on to the unbroken run's end",
    )


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_stopped(
    config: Path, unbroken: Path, tmp_path: Path, report: Report, rank: int
) -> None:
    run_dir, silence_s = tmp_path / "run", 15
    with attempt(config, run_dir, LENGTH, f"deadline.silence_s={silence_s}") as started:
        started.wait_until(lambda: len(figures(run_dir)) >= 3)
        os.kill(started.ranks.pids[rank], signal.SIGSTOP)
        stopped = time.time()
        # The one that is stopped can only be ended from outside, as torchrun and Slurm do.
        other = 1 - rank
        while started.ranks.statuses[other] is None:
            assert time.time() - stopped < silence_s + NOTICED_S, started.ranks.said()[1]
            time.sleep(0.1)
        noticed_s = time.time() - stopped
        status, said = started.ranks.statuses[other], started.ranks.said()[1]
    assert status == 5, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert f"rank {rank}" in lines[0]
    done = run(config, run_dir, LENGTH)
    assert done.status == 0, done.said
    assert done.resumed >= 2
    assert difference(run_dir, unbroken) == ""
    line = re.sub(r"\S*/stacks", "DIR/stacks", lines[0])
    report(
        f"SIGSTOP of rank {rank} (deadline.silence_s {silence_s})",
        f"{noticed_s:.0f} s later exit status 5 on the other rank: `{line}`; the next start goes "
        "on to the unbroken run's end",
    )


def all_finite(run_dir: Path, step: int) -> bool:
    tensors = stored_tensors(
        step_directory(run_dir / "checkpoints", step), TINY_CONFIG["vocab_size"]
    )
    return all(torch.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("nan_in_the_teachers_signal", "NaN in one row of the teacher's signal on rank 1"),
        ("nan_gradient", "NaN in one element of rank 1's gradient, before the ranks add theirs up"),
    ],
)
def test_a_number_that_is_none(
    config: Path, unbroken: Path, tmp_path: Path, report: Report, kind: str, what: str
) -> None:
    run_dir = tmp_path / "run"
    done = run(config, run_dir, LENGTH, fault={"kind": kind, "rank": 1, "step": 2})
    assert done.status == 0, done.said
    assert metrics_of(run_dir, "train/skipped") == [0, 1, 0, 0, 0, 0]
    assert "step 2 skipped: loss or gradient is not finite" in done.said
    whole, found = figures(unbroken), figures(run_dir)
    assert found[1] == whole[1]
    assert all(math.isfinite(x) for step in range(3, 7) for x in found[step])
    assert all_finite(run_dir, 6)
    report(
        f"{what}, at step 2 of 6",
        "the step is skipped on all ranks and named with its samples; weights and moments stay "
        "finite; the run goes on and ends with status 0",
    )


@pytest.mark.long
def test_three_in_a_row(config: Path, tmp_path: Path, report: Report) -> None:
    run_dir = tmp_path / "run"
    fault = {"kind": "nan_gradient", "rank": 1, "step": 2, "last": 9}
    done = run(config, run_dir, "train.num_steps=9", fault=fault)
    assert done.status == 6, done.said
    assert "error: step 4: loss or gradient not finite 3 steps in a row" in done.said
    report(
        "NaN in one element of rank 1's gradient at every step from 2 on",
        "exit status 6 after step 4: three in a row",
    )


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), id="padded"),
        pytest.param(("train.max_tokens_per_micro_batch=80",), id="packed", marks=pytest.mark.long),
    ],
)
def test_no_token_counts(
    config: Path, unbroken: Path, tmp_path: Path, report: Report, words: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    done = run(config, run_dir, LENGTH, *words, fault={"kind": "no_tokens", "rank": 0, "step": 2})
    assert done.status == 0, done.said
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["train/loss_tokens"] == 0
    assert rows[1]["train/grad_norm"] == 0
    assert all(math.isfinite(float(x)) for row in rows for x in row.values())
    assert all_finite(run_dir, 6)
    report(
        f"no token of step 2 counts on any rank{' (packed by length)' if words else ''}",
        "a step with gradient 0; every number stays finite, the run ends with status 0",
    )


@pytest.mark.long
def test_every_response_is_cut(config: Path, tmp_path: Path, report: Report) -> None:
    """One token a response: none ends by itself, but for those whose first token is the end."""
    run_dir = tmp_path / "run"
    done = run(config, run_dir, LENGTH, "rollout.max_new_tokens=1")
    assert done.status == 0, done.said
    cut = metrics_of(run_dir, "rollout/truncated_fraction")
    assert all(fraction > 0.8 for fraction in cut)
    assert all(math.isfinite(x) for pair in figures(run_dir).values() for x in pair)
    report(
        "every response cut after one token (`rollout.max_new_tokens=1`)",
        f"`rollout/truncated_fraction` says so ({min(cut):g} to {max(cut):g}); the run ends with "
        "status 0",
    )
