"""Runs that end before their time and go on: exactly, at their own layout and at another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaopd.storage.steps import step_directory
from tests.helpers.checkpoints import stored_tensors
from tests.helpers.runs import make_run, metrics_of, run_training

pytestmark = pytest.mark.slow

NAMES = ("loss/divergence", "train/grad_norm", "train/lr", "eval/accuracy", "eval/reverse_kl")
OPTIONS = ("checkpoint.interval=2", "eval.interval=3", "parallel.tensor=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("resume")
    make_run(directory)
    return directory


def run(folder: Path, name: str, *overrides: str) -> Any:
    directory = folder / name
    return run_training(folder / "run.yaml", 2, f"run.dir={directory}", *OPTIONS, *overrides)


@pytest.fixture(scope="module")
def unbroken(folder) -> Path:
    done = run(folder, "unbroken", "train.num_steps=6")
    assert done.returncode == 0, done.stderr
    return folder / "unbroken"


def figures(run_dir: Path) -> dict[str, list[float]]:
    return {name: metrics_of(run_dir, name) for name in NAMES}


def weights(run_dir: Path, step: int) -> dict[str, Any]:
    return stored_tensors(step_directory(run_dir / "checkpoints", step), vocab_size=512)


def test_a_run_that_goes_on_is_the_unbroken_one(folder, unbroken):
    first = run(folder, "broken", "train.num_steps=4")
    assert first.returncode == 0, first.stderr
    second = run(folder, "broken", "train.num_steps=6")
    assert second.returncode == 0, second.stderr
    assert "step 4 is done" in second.stderr
    broken = figures(folder / "broken")
    # The shorter run evaluated at its own end too.
    for name in ("eval/accuracy", "eval/reverse_kl"):
        del broken[name][2]
    assert broken == figures(unbroken)
    was, now = weights(unbroken, 6), weights(folder / "broken", 6)
    assert was.keys() == now.keys()
    assert all(was[key].equal(now[key]) for key in was)
    summaries = [
        json.loads((folder / n / "summary.json").read_text()) for n in ("unbroken", "broken")
    ]
    for key in ("student_accuracy_before", "reverse_kl_before", "reverse_kl_after"):
        assert summaries[0][key] == summaries[1][key]
