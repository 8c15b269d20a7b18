"""Metrics on disk, the phase timer, and the line on the console."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaopd.config import Config
from megaopd.errors import DataError, EnvironmentFault
from megaopd.logger import Progress, format_duration, get_logger, setup_logging
from megaopd.metrics import MetricsWriter, PhaseTimer, read_metrics


def make_config(**log: object) -> Config:
    config = Config()
    log = {"tensorboard": False, **log}
    return replace(
        config,
        log=replace(config.log, **log),
        train=replace(config.train, num_steps=120),
        run=replace(config.run, name="run"),
    )


@pytest.fixture
def log() -> Iterator[None]:
    """Leaves the package's logger as it found it."""
    logger = logging.getLogger("megaopd")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    for handler in logger.handlers:
        if handler not in before[0]:
            handler.close()
    logger.handlers, logger.level, logger.propagate = before


def test_each_write_is_one_line_that_reads_back(tmp_path: Path) -> None:
    values = {
        "a/third": 1 / 3,
        "b/nan": math.nan,
        "b/inf": math.inf,
        "b/neg": -math.inf,
        "c/tensor": torch.tensor(0.25),
        "d/flag": True,
        "e/count": 12345678,
    }
    with MetricsWriter(tmp_path / "run", make_config()) as writer:
        writer.write(0, {"eval/accuracy": 0.5})
        writer.write(1, values)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # flushed already
    assert json.loads(lines[0]) == {"step": 0, "eval/accuracy": 0.5}

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    row = json.loads(lines[1], parse_constant=refuse)
    assert row == {
        "step": 1,
        "a/third": 1 / 3,
        "b/nan": "NaN",
        "b/inf": "Infinity",
        "b/neg": "-Infinity",
        "c/tensor": 0.25,
        "d/flag": 1,
        "e/count": 12345678,
    }
    read = read_metrics(tmp_path / "run" / "metrics.jsonl")[1]
    assert math.isnan(read.pop("b/nan"))
    expected = {k: float(v) for k, v in values.items() if k != "b/nan"}
    assert read == {"step": 1, **expected}


def test_a_rank_that_is_not_enabled_writes_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", make_config(tensorboard=True), enabled=False) as writer:
        writer.write(1, {"a": 1.0})
    assert not (tmp_path / "run").exists()


def test_a_new_run_starts_a_new_file_and_a_resumed_one_continues(tmp_path: Path) -> None:
    def run(steps: range, resume_step: int | None) -> list[tuple[int, float]]:
        with MetricsWriter(tmp_path, make_config(), resume_step=resume_step) as writer:
            for step in steps:
                writer.write(step, {"a": step + (0.5 if resume_step else 0)})
        return [(row["step"], row["a"]) for row in read_metrics(tmp_path / "metrics.jsonl")]

    assert run(range(1, 5), None) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert run(range(3, 5), 2) == [(1, 1), (2, 2), (3, 3.5), (4, 4.5)]
    assert run(range(1, 2), None) == [(1, 1)]


def test_a_half_written_last_line_is_dropped_and_others_are_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    assert read_metrics(file) == [{"step": 1, "a": 2.0}]
    file.write_text('{"a": 2}\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not a line of metrics"):
        read_metrics(file)
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        read_metrics(tmp_path / "none.jsonl")


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second run replaces the first
        with MetricsWriter(tmp_path, make_config(tensorboard=True)) as writer:
            writer.write(1, {"loss/divergence": 2.0})
            writer.write(2, {"loss/divergence": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(e.step, e.value) for e in events.Scalars("loss/divergence")]
    assert found == [(1, 2.0), (2, 1.5)]


def test_without_tensorboard_there_is_a_warning_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, log: None
) -> None:
    logging.getLogger("megaopd").propagate = True
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with MetricsWriter(tmp_path, make_config(tensorboard=True)) as writer:
        writer.write(1, {"a": 1.0})
    assert "tensorboard is not installed" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]


FAKE_WANDB = """
import json

class Run:
    def __init__(self, **about):
        self.file = open(about["dir"] + "/wandb.txt", "w")
        self.file.write(f"{about['project']} {about['name']} {about['config']['loss']['kind']}\\n")
    def log(self, metrics, step):
        self.file.write(f"{step} {json.dumps(metrics)}\\n")
    def finish(self):
        self.file.close()

init = Run
"""


def test_weights_and_biases_gets_the_configuration_and_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with MetricsWriter(tmp_path, make_config(wandb_project="proj")) as writer:
        writer.write(3, {"a": 1.0})
    sys.modules.pop("wandb")
    assert (tmp_path / "wandb.txt").read_text() == 'proj run reverse_kl\n3 {"a": 1.0}\n'


@pytest.mark.parametrize("enabled", [True, False])
def test_a_missing_wandb_is_one_line_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        EnvironmentFault, match=r"log\.wandb_project: 'proj', and the package wandb"
    ):
        MetricsWriter(tmp_path, make_config(wandb_project="proj"), enabled)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    for seconds in (1.0, 2.0):
        with timer.phase("rollout"):
            clock.now += seconds
            with timer.phase("inner"):
                clock.now += 0.5
        clock.now += 4
    with suppress(KeyError), timer.phase("failed"):
        clock.now += 8
        raise KeyError
    assert timer.metrics() == {"time/rollout_s": 4.0, "time/inner_s": 1.0, "time/failed_s": 8.0}
    assert timer.total_s == 20.0


def test_the_line_of_a_step() -> None:
    clock = Clock()
    progress = Progress(120, clock=clock)
    clock.now += 50  # an evaluation before the first step does not count
    assert progress.line(0, {"eval/accuracy": 0.125, "eval/reverse_kl": 2.5, "time/eval_s": 9}) == (
        "eval   0/120 | acc 0.125 | reverse KL 2.5000 | 9.00 s"
    )
    clock.now += 2
    metrics = {
        "loss/divergence": 1.23456,
        "train/lr": 2e-4,
        "train/grad_norm": 3.5,
        "perf/tokens_per_s": 12345.6,
    }
    assert progress.line(1, metrics) == (
        "step   1/120 | loss 1.2346 | acc 0.125 | lr 2.00e-04 | grad 3.500 | 12,346 tok/s | "
        "2.00 s/step | ETA 3m58s"
    )
    clock.now += 4
    line = progress.line(2, {"loss/divergence": math.nan, "train/skipped": 1.0, "time/step_s": 3.0})
    assert line == (
        "step   2/120 | loss nan | acc 0.125 | 3.00 s/step | ETA 5m54s | SKIPPED: not finite"
    )


def test_the_estimate_follows_the_last_steps() -> None:
    clock = Clock()
    progress = Progress(100, window=2, clock=clock)
    for step, seconds in enumerate([100, 100, 1, 1], start=1):
        clock.now += seconds
        line = progress.line(step, {"loss/divergence": 1.0})
    assert line.endswith("ETA 1m36s")


def test_what_comes_before_the_first_step_is_no_part_of_the_estimate() -> None:
    clock = Clock()
    progress = Progress(100, clock=clock)
    clock.now += 600  # models are loaded
    assert "ETA 16m30s" in progress.line(1, {"loss/divergence": 1.0, "time/step_s": 10.0})
    clock.now += 30
    assert "ETA 32m40s" in progress.line(2, {"loss/divergence": 1.0, "time/step_s": 30.0})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (7500, "2h05m"), (360000, "4d04h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_rank_0_says_everything_and_the_others_errors_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], log: None
) -> None:
    for rank in (0, 1):
        setup_logging(rank, file=tmp_path / f"rank{rank}.log")
        get_logger("megaopd.part").info("info of %d", rank)
        get_logger().error("error of %d", rank)
    printed = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in printed] == [
        "I info of 0",
        "E error of 0",
        "E rank 1 error of 1",
    ]
    assert (tmp_path / "rank0.log").read_text().splitlines() == printed[:2]
    assert not (tmp_path / "rank1.log").exists()


def test_steps_reach_the_console_through_the_writer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], log: None
) -> None:
    setup_logging(0)
    with MetricsWriter(tmp_path, make_config()) as writer:
        writer.write(7, {"loss/divergence": 0.5})
    assert "I step   7/120 | loss 0.5000 | " in capsys.readouterr().err
