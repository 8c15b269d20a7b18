"""Whole runs whose samples come from real SGLang servers, beside the embedded engine's."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaopd.convert.to_megatron import convert_to_megatron
from megaopd.rollout.sglang.server import SGLangServer
from tests.helpers.runs import make_run, metrics_of, run_training, torchrun_training
from tests.helpers.sglang import make_fleet, sglang_python

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


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[SGLangServer]:
    """One that somebody else runs, with the student's first weights."""
    fleet = make_fleet(directory / "student", directory / "logs")
    fleet.start()
    yield fleet.servers[0]
    fleet.stop()


@pytest.fixture
def given(server: SGLangServer, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The words of a run that uses it."""
    monkeypatch.setenv("MEGAOPD_SGLANG_API_KEY", server.api_key)
    monkeypatch.setenv("MEGAOPD_SGLANG_ADMIN_KEY", server.admin_key)
    return ("rollout.kind=sglang", f"rollout.urls=['{server.url}']")


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
    """Its student, and with it the server, starts from a Megatron checkpoint."""
    recording, checkpoint = directory / "rollouts.jsonl", directory / "megatron"
    convert_to_megatron(directory / "student", checkpoint)
    words = (f"student.path={checkpoint}", f"rollout.record={recording}")
    return train(directory, "on_policy", *launch(), *words)[0]


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


@pytest.mark.long
def test_one_step_off(directory: Path, embedded: Path, given: tuple[str, ...]) -> None:
    """The next batch is sampled while this one trains: one update old, which the mismatch shows,
    and no more. Evaluations come in between, from the newest weights."""
    words = ("rollout.max_staleness=1", "rollout.sglang.sync=distributed")
    out, _ = train(directory, "one_step_off", *given, *words)
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


def test_all_servers_dead(directory: Path, server: SGLangServer, given: tuple[str, ...]) -> None:
    """The run ends with status 7 and one line, within a minute, and what it learned is saved."""
    out, kills = directory / "abandoned", list[float]()

    def kill_after_two_steps() -> None:
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("loss/divergence") < 2:
            time.sleep(0.2)
        os.killpg(server.pid, signal.SIGKILL)
        kills.append(time.monotonic())

    threading.Thread(target=kill_after_two_steps, daemon=True).start()
    endless = ("train.num_steps=1000", "eval.interval=0", "train.export=true")
    words = (*COMMON, f"run.dir={out}", *given, *endless, "rollout.max_staleness=1")
    # Under torchrun, which ends rank 0, saving and speaking, when another rank leaves before it.
    said = torchrun_training(directory / "run.yaml", 2, *words, timeout_s=400).stderr
    assert time.monotonic() - kills[0] < 60
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: rollout servers: all are down ({server.url}); look at their logs"]
    assert "exitcode  : 7" in said
    before = load_file(directory / "student/model.safetensors")
    after = load_file(out / "hf/model.safetensors")
    assert after.keys() == before.keys()
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.isfinite(after[name]).all()
    assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rollout.urls=['http://127.0.0.1:9']",), "http://127.0.0.1:9: no answer ("),
        (
            ("rollout.launch=true", f"rollout.sglang.python={sys.executable}"),
            "sglang server 0: ended with status 1 before it was ready (",
        ),
    ],
)
def test_servers_that_cannot_be_used(directory: Path, words: tuple[str, ...], message: str) -> None:
    """One line, from one of the ranks."""
    words = ("rollout.kind=sglang", "train.export=true", *words)
    _, said = train(directory, "refused", *words, status=7)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert lines[0].startswith(f"error: {message}")
