"""One whole run: on-policy with the embedded engine, evaluated, exported, reported."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from megaopd.status.snapshot import take_snapshot
from tests.helpers.runs import make_run, metrics_of, run_command, torchrun_training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = make_run(directory, "Qwen3ForCausalLM", vocab_size=509)
    done = torchrun_training(
        config,
        2,
        "parallel.tensor=2",
        "rollout.n=2",
        "train.export=true",
        "log.tensorboard=true",
        "eval.interval=2",
    )
    assert done.returncode == 0, done.stderr
    return directory / "out", done


def test_summary(finished):
    out, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_steps"] == 3
    assert summary["num_eval_prompts"] == 6
    assert summary["tensor_parallel_size"] == 2
    assert 0 < summary["mismatch_kl_max"] < 1e-4
    assert summary["reverse_kl_after"] < summary["reverse_kl_before"]
    assert summary["train_wall_s"] > 0


def test_metrics(finished):
    out, _ = finished
    assert metrics_of(out, "loss/divergence")[-1] > 0
    assert len(metrics_of(out, "eval/accuracy")) == 3  # before, after step 2, after
    assert max(metrics_of(out, "rollout/mismatch_max")) < 1e-3
    for phase in ("rollout", "pack", "teacher", "student", "weight_sync", "step"):
        assert min(metrics_of(out, f"time/{phase}_s")) > 0
    assert min(metrics_of(out, "perf/tflops_per_gpu") + metrics_of(out, "perf/teacher_tflops")) > 0
    assert metrics_of(out, "perf/mfu") == []  # a CPU has no peak to compare with
    summary = json.loads((out / "summary.json").read_text())
    assert metrics_of(out, "eval/teacher_accuracy") == [summary["teacher_accuracy"]]
    assert list((out / "tensorboard").glob("events.*"))


def test_the_status_is_that_of_a_finished_run(finished):
    out, _ = finished
    snapshot = take_snapshot(out)
    assert (snapshot["state"], snapshot["step"], snapshot["num_steps"]) == ("finished", 3, 3)
    assert snapshot["layout"].startswith("2 ranks on cpu; student TP2")
    assert snapshot["counts"]["skipped"] == snapshot["unreadable_lines"] == 0
    phases = {"rollout", "pack", "teacher", "credit", "student", "weight_sync", "other"}
    assert set(snapshot["phases"]) == phases


def test_report_is_self_contained(finished):
    out, _ = finished
    html = (out / "report.html").read_text()
    assert "<svg" in html
    assert "src=" not in html
    assert "://" not in html.replace("http://www.w3.org", "")


def test_console_has_one_line_per_step(finished):
    _, done = finished
    lines = [line for line in done.stderr.splitlines() if " step " in line]
    assert len(lines) == 3
    assert all("ETA" in line for line in lines)


def test_export_is_the_trained_model(finished):
    """transformers loads it, and its greedy generations are those of the evaluation."""
    out, _ = finished
    done = run_command([sys.executable, "tools/check_export.py", str(out)])
    assert done.returncode == 0, done.stderr
    assert "6 of 6 greedy generations are token-identical" in done.stdout
    before = AutoModelForCausalLM.from_pretrained(out.parent / "student")
    after = AutoModelForCausalLM.from_pretrained(out / "hf")
    moved = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert all(moved)
