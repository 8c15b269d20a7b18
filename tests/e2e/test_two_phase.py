"""A run that keeps in host memory what no phase needs is the run that does not, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.runs import make_run, metrics_of, run_training

pytestmark = [pytest.mark.slow, pytest.mark.long]

PHASES = ("rollout", "pack", "teacher", "student", "weight_sync", "eval")


def test_offload_and_recomputation_change_no_metric(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    rows = {}
    for name, overrides in (
        ("plain", ()),
        ("moved", ("teacher.offload=true", "train.offload=true", "train.recompute=full")),
    ):
        out = tmp_path / name
        layout = ("parallel.tensor=2", "teacher.parallel.pipeline=2", "eval.teacher=false")
        done = run_training(config, 2, f"run.dir={out}", *layout, *overrides)
        assert done.returncode == 0, done.stderr
        for phase in PHASES:
            assert min(metrics_of(out, f"memory/{phase}_peak_gib")) > 0.05  # torch alone is more
        measured = ("time/", "memory/", "perf/tokens_per_s", "perf/tflops", "perf/teacher_tflops")
        rows[name] = [
            {key: value for key, value in json.loads(line).items() if not key.startswith(measured)}
            for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
    assert rows["moved"] == rows["plain"]
    assert len(rows["plain"]) == 5  # three steps, evaluation before and after
