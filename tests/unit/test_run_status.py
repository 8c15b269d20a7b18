"""status.json: written in time, seldom, and in one go; what fails ends no run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaopd import run_status
from megaopd.errors import EnvironmentFault, StopRequested
from megaopd.logger import get_logger
from megaopd.run_status import MAX_WARNINGS, RunStatus


def read(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_phase_is_on_disk_a_moment_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_status, "LEAST_S", 0.05)
    environ = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"}
    before = time.time()
    with RunStatus(tmp_path, 24, 4, device="H200", step=12, environ=environ) as status:
        first = read(tmp_path)
        assert before <= first["started"] <= first["updated"] <= time.time()
        assert {k: first[k] for k in ("state", "phase", "step", "num_steps", "resumed_from")} == {
            "state": "running",
            "phase": "start",
            "step": 12,
            "num_steps": 24,
            "resumed_from": 12,
        }
        assert (first["world_size"], first["device"]) == (4, "H200")
        assert (first["slurm_job_id"], first["slurm_restarts"]) == ("17", "2")
        status.phase("teacher", 13)
        status.phase("student", 13)
        wait_for(lambda: read(tmp_path)["phase"] == "student")
        assert read(tmp_path)["phase_since"] >= first["started"]
        status.checkpoint(13, "checkpoints/iter_0000013")
        wait_for(lambda: read(tmp_path)["checkpoint"] is not None)
        assert read(tmp_path)["checkpoint"]["step"] == 13
    assert (read(tmp_path)["state"], read(tmp_path)["step"]) == ("finished", 13)
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_phase_costs_its_caller_nothing_and_the_disk_a_write_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []
    write = RunStatus._write
    monkeypatch.setattr(RunStatus, "_write", lambda self: (writes.append(1), write(self)))
    with RunStatus(tmp_path, 24, 1) as status:
        start = time.process_time()
        for step in range(10_000):
            status.phase("student", step)
        assert time.process_time() - start < 1.0  # 0.02 s of it were measured
        assert len(writes) <= 3


def test_it_is_written_when_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_status, "LEAST_S", 0.01)
    monkeypatch.setattr(run_status, "BEAT_S", 0.05)
    with RunStatus(tmp_path, 24, 1):
        first = read(tmp_path)["updated"]
        wait_for(lambda: read(tmp_path)["updated"] > first)


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (StopRequested("step 3", "SIGTERM", "start it again"), "stopped", "step 3: SIGTERM; start"),
        (EnvironmentFault("run.dir", "full\n", "make room"), "failed", "run.dir: full ; make room"),
        (ValueError("a bug"), "failed", "ValueError: a bug"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, error: BaseException, state: str, message: str) -> None:
    with pytest.raises(type(error)), RunStatus(tmp_path, 24, 1):
        raise error
    assert read(tmp_path)["state"] == state
    assert read(tmp_path)["message"].startswith(message)


def test_the_last_warnings_of_the_log_are_kept(tmp_path: Path) -> None:
    log = get_logger("megaopd.test")
    handlers = list(logging.getLogger("megaopd").handlers)
    with RunStatus(tmp_path, 24, 1) as status:
        for step in range(8):
            status.phase("student", step)
            log.warning("loss %d\nis high", step)
            log.info("nothing")
    found = read(tmp_path)["warnings"]
    assert [(w["step"], w["message"]) for w in found] == [
        (step, f"loss {step} is high") for step in range(8 - MAX_WARNINGS, 8)
    ]
    assert logging.getLogger("megaopd").handlers == handlers


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunStatus(tmp_path / "none", 24, 4, enabled=False) as status:
        status.phase("student", 1)
        status.warning("x")
    assert list(tmp_path.iterdir()) == []


def test_a_status_that_cannot_be_written_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megaopd"), "propagate", True)
    (tmp_path / "status.json").mkdir()
    with RunStatus(tmp_path, 24, 1) as status:
        status.state("running")
    found = [r.getMessage() for r in caplog.records if "status.json" in r.getMessage()]
    assert len(found) == 1
    assert "cannot be written" in found[0]
