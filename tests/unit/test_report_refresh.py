"""report.html of a run that goes on: what there is so far, and little time for it."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path

import pytest

from megaopd.config import Config, LogConfig, RunConfig, TrainConfig
from megaopd.metrics import MetricsWriter
from megaopd.metrics_file import json_line
from megaopd.report import CHARTS
from megaopd.report_refresh import MOST_ROWS, RefreshedReport, figures_so_far


def make_config(**log: object) -> Config:
    return Config(
        run=RunConfig(name="r"),
        train=TrainConfig(num_steps=200),
        log=LogConfig(tensorboard=False, **log),
    )


def state_of(run_dir: Path) -> str:
    found = re.search(
        r'<p class="state">(.*?), \d{4}-\d\d-\d\d ', (run_dir / "report.html").read_text()
    )
    assert found is not None
    return found[1]


def answers(run_dir: Path, when: str, text: str, correct: bool) -> None:
    rows = [
        {"prompt_id": f"p{i}", "index": n, "prompt_text": f"<prompt {i}>", "answer": "a"}
        | {"response_text": f"{text} {i} {n}", "correct": correct}
        for i in range(30)
        for n in range(2)
    ]
    (run_dir / f"eval_{when}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Clock:
    """A clock that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_page_is_written_as_the_run_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaopd.report_refresh.PAUSE_PER_SECOND", 0.0)
    with MetricsWriter(tmp_path, make_config(report_interval=10)) as writer:
        writer.write(0, {"eval/accuracy": 0.25, "eval/reverse_kl": 2.0})
        assert state_of(tmp_path) == "running, step 0 of 200"
        for step in range(1, 20):
            writer.write(step, {"loss/divergence": 1 / step, "time/step_s": 2.0})
        assert state_of(tmp_path) == "running, step 10 of 200"
        answers(tmp_path, "before", "first", False)
        writer.write(19, {"eval/accuracy": 0.75, "eval/reverse_kl": 0.5})
        assert state_of(tmp_path) == "running, step 19 of 200"
        text = (tmp_path / "report.html").read_text()
        assert "<small>0.25 &rarr; </small>0.75" in text
        assert "<small>2 &rarr; </small>0.5" in text
        assert text.count("&lt;prompt ") == 8
        assert "first 7 0" in text
        assert "first 8 0" not in text
        assert "first 0 1" not in text
        answers(tmp_path, "after", "last", True)
    text = (tmp_path / "report.html").read_text()
    assert state_of(tmp_path) == "ended at step 19 of 200"
    assert "last 7 0" in text
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_no_interval_writes_no_page(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, make_config(report_interval=0)) as writer:
        writer.write(10, {"loss/divergence": 1.0})
    assert not (tmp_path / "report.html").exists()


def test_answers_of_another_run_are_not_shown(tmp_path: Path) -> None:
    answers(tmp_path, "before", "stale", False)
    os.utime(tmp_path / "eval_before.jsonl", (1.0, 1.0))
    (tmp_path / "config.yaml").write_text("")
    for resume_step, shown in ((None, False), (0, True)):
        with MetricsWriter(tmp_path, make_config(), resume_step=resume_step) as writer:
            writer.write(1, {"loss/divergence": 1.0})
        assert ("stale 0 0" in (tmp_path / "report.html").read_text()) is shown


def test_what_cannot_be_written_or_read_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megaopd"), "propagate", True)
    monkeypatch.setattr("megaopd.report_refresh.PAUSE_PER_SECOND", 0.0)
    (tmp_path / "report.html").mkdir()  # nothing can take its place
    (tmp_path / "eval_before.jsonl").write_text("[1]\n")
    with MetricsWriter(tmp_path, make_config(report_interval=1)) as writer:
        for step in range(1, 4):
            writer.write(step, {"loss/divergence": 1.0})
    found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len([line for line in found if line.startswith("report.html is not refreshed: ")]) == 1
    assert "eval_before.jsonl: not answers of an evaluation" in found[0]


def write_long_run(run_dir: Path, num_steps: int) -> None:
    names = [name for chart in CHARTS for name in chart.series] + [f"more/{i}" for i in range(30)]
    times = {f"time/{phase}_s": 1.25 for phase in ("rollout", "teacher", "student", "step")}
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            row = {name: step / 7 for name in names if not name.startswith("eval/")} | times
            file.write(json_line(step, row))
            if step % 100 == 0:
                file.write(json_line(step, {"eval/accuracy": step / num_steps}))


def test_a_refresh_is_cheap_and_paid_for_by_a_pause(tmp_path: Path) -> None:
    """2,000 steps took 0.3 s of one core, 20,000 took 0.6 s: the file is read, few lines parsed."""
    write_long_run(tmp_path, 5_000)
    report = RefreshedReport(tmp_path, 9_000, interval=1, num_samples=0)
    started = time.process_time()
    report.write(5_000, {"loss/divergence": 1.0})
    assert time.process_time() - started < 3.0
    text = (tmp_path / "report.html").read_text()
    assert "step 5000" in text
    assert "<b>1</b>" in text or "&rarr; </small>1</b>" in text  # the last evaluation is there
    assert len(text) < 3_000_000
    # It took some time, and the next step is too soon.
    (tmp_path / "report.html").unlink()
    report.write(5_001, {"loss/divergence": 1.0})
    assert not (tmp_path / "report.html").exists()


def test_the_pause_is_a_hundred_times_the_refresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, pages = Clock(), []

    def write_page(
        run_dir: Path, figures: object, samples: object, state: str, rows: object
    ) -> None:
        pages.append(state.split(",")[1])
        clock.now += 0.5

    monkeypatch.setattr("megaopd.report_refresh.write_report", write_page)
    (tmp_path / "metrics.jsonl").write_text(json_line(1, {"loss/divergence": 1.0}))
    report = RefreshedReport(tmp_path, 9, interval=1, num_samples=0, clock=clock)
    for step, now in ((1, 10.0), (2, 60.4), (3, 60.6)):
        clock.now = now
        report.write(step, {"loss/divergence": 1.0})
    assert pages == [" step 1 of 9", " step 3 of 9"]


def test_figures_so_far() -> None:
    rows = [
        {"step": 0, "eval/teacher_accuracy": 0.9},
        {"step": 0, "eval/accuracy": 0.1, "eval/reverse_kl_lower_bound": 3.0},
        {"step": 1, "loss/divergence": 1.0, "time/step_s": 2.0, "rollout/mismatch_kl": 1e-3},
        {"step": 2, "loss/divergence": 1.0, "time/step_s": 4.0, "rollout/mismatch_kl": 1e-4},
        {"step": 2, "eval/accuracy": 0.5, "eval/reverse_kl_lower_bound": 1.0},
    ]
    assert figures_so_far(rows) == {
        "teacher_accuracy": 0.9,
        "student_accuracy_before": 0.1,
        "student_accuracy_after": 0.5,
        "reverse_kl_before": 3.0,
        "reverse_kl_after": 1.0,
        "num_steps": 2,
        "train_wall_s": 6.0,
        "mismatch_kl_max": 1e-3,
    }
    assert set(figures_so_far([]).values()) == {None, 0}
    assert MOST_ROWS == 2000
