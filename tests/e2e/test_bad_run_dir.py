"""A directory of a run that cannot be one: one line, an exit status, no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.runs import make_run, run_training

pytestmark = pytest.mark.slow


def _a_file(run_dir: Path) -> None:
    run_dir.write_text("x")


def _below_a_file(run_dir: Path) -> None:
    run_dir.parent.rmdir()
    run_dir.parent.write_text("x")


def _checkpoints_are_a_file(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("x")


def _an_empty_checkpoint(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "iter_0000001").mkdir(parents=True)


def _a_directory(name: str) -> Callable[[Path], None]:
    return lambda run_dir: (run_dir / name).mkdir(parents=True)


# What is there, the status, what the line says.
DIRECTORIES = {
    "a file": (_a_file, 2, "run.dir: "),
    "below a file": (_below_a_file, 2, "cannot be written (Not a directory); choose another"),
    "checkpoints are a file": (_checkpoints_are_a_file, 4, "/checkpoints: cannot be written"),
    "an empty checkpoint": (_an_empty_checkpoint, 4, "has checkpoints, and none is whole (the"),
    "config.yaml is a directory": (_a_directory("config.yaml"), 2, "run.dir: "),
    "metrics.jsonl is a directory": (_a_directory("metrics.jsonl"), 5, "/metrics.tmp: cannot be"),
    "the lock is a directory": (_a_directory(".lock"), 5, "/.lock: cannot be written (Is a"),
    "summary.json is a directory": (_a_directory("summary.json"), 5, "/summary.json: cannot be"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("name", DIRECTORIES)
def test_one_line_and_status(config: Path, tmp_path: Path, name: str) -> None:
    make, status, says = DIRECTORIES[name]
    run_dir = tmp_path / "parent" / "run"
    run_dir.parent.mkdir()
    make(run_dir)
    done = run_training(
        config,
        1,
        *(f"run.dir={run_dir}", "train.num_steps=1", "data.eval=", "checkpoint.interval=1"),
    )
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert says in lines[0]
    assert ";" in lines[0]
    assert "Traceback" not in done.stderr
