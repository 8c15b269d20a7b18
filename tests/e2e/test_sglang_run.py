"""Whole runs whose samples come from real SGLang servers, beside the embedded engine's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.runs import make_run, metrics_of, run_training
from tests.helpers.sglang import sglang_python

pytestmark = pytest.mark.slow

NUM_STEPS = 4
# Two tensor-parallel ranks, and enough tokens in a step for its figures to be steady. Without
# clipping: the tiny models' embedding of the pad token is 0, and the norm above it makes a gradient
# of hundreds where that token is sampled.
COMMON = (
    *("parallel.tensor=2", f"train.num_steps={NUM_STEPS}", "train.global_batch_size=16"),
    *("eval.teacher=false", "eval.interval=2", "optimizer.clip_grad=0"),
)


def train(directory: Path, name: str, *words: str, status: int = 0) -> tuple[Path, str]:
    """Runs with two ranks into directory/name; returns it and what was said on stderr."""
    out = directory / name
    done = run_training(directory / "run.yaml", 2, *COMMON, f"run.dir={out}", *words, timeout_s=400)
    assert done.returncode == status, done.stderr
    return out, done.stderr


def launch(**keys: object) -> tuple[str, ...]:
    """The words of a run that starts a server."""
    words = ["+rollout=sglang", f"rollout.sglang.python={sglang_python()}"]
    return (*words, *(f"rollout.{key}={value}" for key, value in keys.items()))


def answers(out: Path, name: str) -> list[list[int]]:
    rows = map(json.loads, (out / f"eval_{name}.jsonl").read_text().splitlines())
    return [row["response_ids"] for row in rows]


def running(out: Path) -> list[str]:
    """Processes that were started by the run of `out`: its servers have its model on their command
    line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(out.parent).encode() in entry.with_name("cmdline").read_bytes():
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sglang_run")
    make_run(path)
    return path


@pytest.fixture(scope="module")
def embedded(directory: Path) -> Path:
    return train(directory, "embedded")[0]


@pytest.fixture(scope="module")
def on_policy(directory: Path) -> Path:
    recording = directory / "rollouts.jsonl"
    return train(directory, "on_policy", *launch(), f"rollout.record={recording}")[0]


def test_the_figures_are_those_of_the_embedded_engine(embedded: Path, on_policy: Path) -> None:
    """The same prompts, other random numbers: greedy answers are equal, means differ by noise."""
    assert answers(on_policy, "before") == answers(embedded, "before")
    assert metrics_of(on_policy, "loss/divergence") == pytest.approx(
        metrics_of(embedded, "loss/divergence"), rel=0.1
    )
    assert metrics_of(on_policy, "eval/reverse_kl") == pytest.approx(
        metrics_of(embedded, "eval/reverse_kl"), rel=0.1
    )
    summary = json.loads((on_policy / "summary.json").read_text())
    assert (summary["rollout"], summary["max_staleness"]) == ("sglang", 0)
    assert summary["reverse_kl_after"] < summary["reverse_kl_before"]


def test_the_servers_have_the_weights_of_every_step(on_policy: Path) -> None:
    """fp32: what the servers sampled with is what the trainer computes with, to rounding."""
    assert len(metrics_of(on_policy, "rollout/mismatch_kl")) == NUM_STEPS
    assert max(metrics_of(on_policy, "rollout/mismatch_kl")) < 1e-8
    assert max(metrics_of(on_policy, "rollout/mismatch_max")) < 1e-4
    assert metrics_of(on_policy, "rollout/staleness_max") == [0] * NUM_STEPS
    assert metrics_of(on_policy, "rollout/retries") == [0] * NUM_STEPS
    assert metrics_of(on_policy, "rollout/set_aside") == [0] * NUM_STEPS


def test_nothing_is_left_behind(on_policy: Path) -> None:
    assert running(on_policy) == []
    assert (on_policy / "servers/sglang_0.log").stat().st_size > 0


def test_a_recording_replays_to_the_bit(directory: Path, on_policy: Path) -> None:
    replay, _ = train(
        directory,
        "replay",
        *("rollout.kind=recorded", f"rollout.path={directory}/rollouts.jsonl"),
        *("data.eval=", "eval.interval=0"),
    )
    for name in ("loss/divergence", "train/grad_norm", "rollout/mismatch_kl"):
        assert metrics_of(replay, name) == metrics_of(on_policy, name)


def test_one_step_off(directory: Path, embedded: Path) -> None:
    """The next batch is sampled while this one trains: one update old, which the mismatch shows,
    and no more."""
    out, _ = train(directory, "one_step_off", *launch(max_staleness=1))
    assert metrics_of(out, "rollout/staleness_max") == [0, 1, 1, 1]
    staleness = metrics_of(out, "rollout/staleness_mean")
    assert staleness[0] == 0
    assert all(0 < mean <= 1 for mean in staleness[1:])
    mismatch = metrics_of(out, "rollout/mismatch_kl")
    assert mismatch[0] < 1e-8
    assert all(1e-8 < kl < 0.05 for kl in mismatch[1:])
    assert metrics_of(out, "eval/reverse_kl") == pytest.approx(
        metrics_of(embedded, "eval/reverse_kl"), rel=0.15
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rollout.urls=['http://127.0.0.1:9']",), "http://127.0.0.1:9: no answer ("),
        (
            ("rollout.launch=true", "rollout.sglang.python=/no/such/python"),
            "rollout.sglang.python: /no/such/python cannot be run ",
        ),
    ],
)
def test_servers_that_cannot_be_used(directory: Path, words: tuple[str, ...], message: str) -> None:
    """One line, from one of the ranks."""
    words = ("rollout.kind=sglang", "train.export=true", *words)
    _, said = train(directory, "refused", *words, status=1)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert lines[0].startswith(f"error: {message}")
    assert "exitcode  : 7" in said
