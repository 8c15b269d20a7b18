"""Runs that end before their time and go on: exactly, at their own layout and at another."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

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


def run(folder: Path, name: str, *overrides: str, **killing: Any) -> Any:
    directory = folder / name
    return run_training(
        folder / "run.yaml", 2, f"run.dir={directory}", *OPTIONS, *overrides, **killing
    )


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


@pytest.mark.parametrize(("name", "layout"), [("dp2", ()), ("pp2", ("parallel.pipeline=2",))])
def test_another_layout_goes_on_to_rounding(folder, unbroken, name, layout):
    assert run(folder, name, "train.num_steps=4").returncode == 0
    assert weights(folder / name, 4).keys() == weights(unbroken, 6).keys()
    done = run(folder, name, "train.num_steps=6", "parallel.tensor=1", *layout)
    assert done.returncode == 0, done.stderr
    losses = metrics_of(folder / name, "loss/divergence")
    assert losses == pytest.approx(metrics_of(unbroken, "loss/divergence"), rel=1e-5)


# What else a run keeps: pass rates and the stage of a schedule; adapters; a moving average.
KINDS = {
    "paced": (
        *("credit.weights=paced", "credit.paced_memory=0.5", "rollout.n=2", "data.shuffle=true"),
        *("eval.reward=format_length", "loss.schedule.first.until_step=3"),
        *("loss.schedule.first.kind=forward_kl", "train.max_tokens_per_micro_batch=96"),
    ),
    "lora": ("student.lora.rank=4", "teacher.kind=base", "teacher.path=", "loss.entropy_coef=0.01"),
    "ema": ("teacher.kind=ema", "teacher.path=", "teacher.ema_decay=0.5", "train.offload=true"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_a_run_keeps_goes_on(folder, kind):
    """Without it the second half would be another one."""
    options = ("eval.interval=0", "data.eval=", *KINDS[kind])
    if kind == "paced":
        reward = folder / "rewards.py"
        reward.write_text("def even(response, answer):\n    return float(len(response) % 2)\n")
        options = tuple(o.replace("format_length", f"{reward}:even") for o in options)
        # Prompts of the first half come again in the second, with their pass rates.
        rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)[:8]
        (folder / "few.jsonl").write_text("".join(rows))
        options += (f"data.train={folder}/few.jsonl",)
    else:
        # Student and teacher differ by their prompts.
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        lines = (json.dumps(row | {"hint": "y" + row["prompt"]}) + "\n" for row in rows)
        (folder / "hints.jsonl").write_text("".join(lines))
        options += (f"data.train={folder}/hints.jsonl", "data.teacher_prompt_column=hint")
    for name, steps in (("whole", (4,)), ("halves", (2, 4))):
        for num_steps in steps:
            done = run(folder, f"{kind}_{name}", f"train.num_steps={num_steps}", *options)
            assert done.returncode == 0, done.stderr
    whole, halves = folder / f"{kind}_whole", folder / f"{kind}_halves"
    for name in ("loss/divergence", "train/grad_norm"):
        assert metrics_of(whole, name) == metrics_of(halves, name)
    was, now = weights(whole, 4), weights(halves, 4)
    assert was.keys() == now.keys()
    assert all(was[key].equal(now[key]) for key in was)
    prefix = {"lora": "adapter.", "ema": "ema_teacher.", "paced": "decoder."}[kind]
    assert any(key.startswith(prefix) for key in was)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_a_checkpoint_and_status_75(folder, unbroken, number):
    """Whatever the run is doing; started again it comes to the same end."""
    name = number.name
    metrics = folder / name / "metrics.jsonl"

    def begun() -> bool:
        return metrics.exists() and metrics.read_text().count("\n") >= 3

    options = ("checkpoint.interval=0", "train.num_steps=6")
    done = run(folder, name, *options, kill_when=begun, kill_with=number)
    assert done.returncode == 75, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"stopped: run: {number.name}"), done.stderr
    assert "is complete; start the same command again to go on" in line
    assert done.stderr.count("stopped: ") == 1
    assert len(list((folder / name / "checkpoints").glob("iter_*"))) == 1
    done = run(folder, name, *options)
    assert done.returncode == 0, done.stderr
    assert figures(folder / name) == figures(unbroken)


def test_no_time_at_all(folder):
    done = run(folder, "no_time", 'train.max_wall_time="00:00:01"')
    assert done.returncode == 75, done.stderr
    assert "stopped: run: train.max_wall_time 00:00:01" in done.stderr


def test_a_run_that_is_done_is_not_run_again(folder, unbroken):
    before = figures(unbroken)
    done = run(folder, "unbroken", "train.num_steps=6")
    assert done.returncode == 0
    assert "step 6/6" not in done.stderr
    assert figures(unbroken) == before


def test_what_is_kept_and_exported(folder):
    """Every checkpoint becomes a Hugging Face directory beside the run; the last one is the run's
    own export."""
    options = ("checkpoint.keep_last=1", "checkpoint.export_hf=true", "train.export=true")
    options += ("train.num_steps=3",)
    done = run(folder, "kept", *options, "eval.interval=0", "data.eval=")
    assert done.returncode == 0, done.stderr
    out = folder / "kept"
    kept = [p.name for p in sorted((out / "checkpoints").glob("iter_*"))]
    assert kept == ["iter_0000003"]
    assert (out / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "3"
    assert not list((out / "checkpoints").glob(".iter_*"))
    exports = sorted((out / "hf_steps").iterdir())
    assert [p.name for p in exports] == ["iter_0000002", "iter_0000003"]
    exported, own = (load_file(p / "model.safetensors") for p in (exports[-1], out / "hf"))
    assert exported.keys() == own.keys()
    assert all(exported[name].equal(own[name]) for name in own)


@pytest.mark.parametrize(
    ("options", "status", "line"),
    [
        (("checkpoint.resume=never",), 2, "error: checkpoint.resume: never, and "),
        (("student.dtype=bf16",), 2, "error: student.dtype: 'bf16', and the checkpoint's run"),
        (("run.seed=7",), 4, "error: position in data.train: run.seed changed since"),
    ],
)
def test_what_cannot_go_on(folder, unbroken, options, status, line):
    done = run(folder, "unbroken", "train.num_steps=8", *options)
    assert done.returncode == status, done.stderr
    assert line in done.stderr
