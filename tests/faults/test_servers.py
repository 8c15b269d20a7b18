"""Servers that fail while a run trains on what they sample: nothing is lost, doubled or made up.

The server is `tests.helpers.fake_sglang`'s, whose answer to a prompt is always the same: a run
among faults is the one without them, to the bit. What real servers do is in
tests/distributed/test_sglang_faults.py, the end of a whole run in tests/e2e/test_sglang_run.py.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from megaopd.rollout.sglang.loop import EventLoopThread
from tests.faults.conftest import Report
from tests.faults.course import Attempt, attempt, difference, figures, run
from tests.helpers.fake_sglang import FakeServer
from tests.helpers.runs import make_run, metrics_of

pytestmark = pytest.mark.slow

NUM_STEPS = 6


class Updated(FakeServer):
    """Says, as a real one does, that it has the weights that it was given last."""

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        response = await super()._handle(request)
        for _, body in self.told:
            self.version = body.get("weight_version") or self.version
        return response


@contextmanager
def servers(count: int) -> Iterator[tuple[EventLoopThread, list[FakeServer]]]:
    loop = EventLoopThread("fake servers")
    fakes = [loop.run(Updated().start()) for _ in range(count)]
    try:
        yield loop, fakes
    finally:
        for fake in fakes:
            loop.run(fake.stop())
        loop.close()


def words(fakes: list[FakeServer]) -> tuple[str, ...]:
    urls = ",".join(f"'{fake.url}'" for fake in fakes)
    return (
        *("rollout.kind=sglang", f"rollout.urls=[{urls}]", f"train.num_steps={NUM_STEPS}"),
        *("rollout.sglang.progress_timeout_s=3", "rollout.sglang.health_interval_s=0.5"),
        # Its log-probabilities are no model's.
        *("guard.mismatch_kl=0", "checkpoint.interval=1"),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("servers"))


@pytest.fixture(scope="module")
def unbroken(config: Path) -> Path:
    with servers(1) as (_, fakes):
        done = run(config, config.parent / "unbroken", *words(fakes))
    assert done.status == 0, done.said
    assert len(figures(done.run_dir)) == NUM_STEPS
    assert all(math.isfinite(x) for pair in figures(done.run_dir).values() for x in pair)
    return config.parent / "unbroken"


def after_step(run_dir: Path, step: int, do: Callable[[], Any]) -> threading.Thread:
    def wait() -> None:
        while max(figures(run_dir), default=0) < step:
            time.sleep(0.05)
        do()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


PASSING = (
    *(500, "reset", "truncated", "abort", 503, 429, "abort first", "alien id", "extra_logprob"),
    "hang",
)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(PASSING[:4], id="short"),
        pytest.param(PASSING, id="long", marks=pytest.mark.long),
    ],
)
def test_faults_that_pass(
    config: Path, unbroken: Path, tmp_path: Path, report: Report, faults: tuple[Any, ...]
) -> None:
    run_dir = tmp_path / "run"
    with servers(1) as (_, (fake,)):
        after_step(run_dir, 2, lambda: fake.faults.extend(faults))
        done = run(config, run_dir, *words([fake]))
        asked = len(fake.requests)
    assert done.status == 0, done.said
    assert fake.faults == []
    assert asked > NUM_STEPS * 8
    assert difference(run_dir, unbroken) == ""
    report(
        "a server's answers in training: " + ", ".join(map(str, faults)),
        f"asked again ({asked} requests for {NUM_STEPS * 8} samples); the end is the one without "
        "faults to the bit",
    )


@pytest.mark.long
def test_an_answer_that_is_no_number(
    config: Path, unbroken: Path, tmp_path: Path, report: Report
) -> None:
    run_dir = tmp_path / "run"
    with servers(1) as (_, (fake,)):
        after_step(run_dir, 3, lambda: fake.faults.append("nan"))
        ended = run(config, run_dir, *words([fake]))
        assert ended.status == 7, ended.said
        assert "give non-finite probabilities" in ended.said
        done = run(config, run_dir, *words([fake]))
    assert done.status == 0, done.said
    assert done.resumed >= 2
    assert difference(run_dir, unbroken) == ""
    report(
        "a server's log-probability that is no number",
        "exit status 7, the version of the weights named; the next start goes on to the end "
        "without faults",
    )


@pytest.mark.long
def test_a_prompt_that_a_server_refuses(config: Path, tmp_path: Path, report: Report) -> None:
    run_dir = tmp_path / "run"
    with servers(1) as (_, (fake,)):
        after_step(run_dir, 2, lambda: fake.faults.append("error event"))
        done = run(config, run_dir, *words([fake]))
    assert done.status == 0, done.said
    assert sum(metrics_of(run_dir, "rollout/set_aside")) == 1
    report(
        "a server that refuses a prompt for good",
        "a warning with its id, `rollout/set_aside` counts it, the step trains on the others",
    )


@pytest.mark.long
def test_one_of_two_is_gone_and_comes_back(
    config: Path, unbroken: Path, tmp_path: Path, report: Report
) -> None:
    run_dir = tmp_path / "run"
    with servers(2) as (loop, fakes):
        after_step(run_dir, 2, lambda: loop.run(fakes[0].stop()))
        after_step(run_dir, 4, lambda: loop.run(fakes[0].start()))
        done = run(config, run_dir, *words(fakes))
    assert done.status == 0, done.said
    assert difference(run_dir, unbroken) == ""
    report(
        "one of two servers gone after step 2, and back after step 4",
        "the other one takes its work; the end is the one without faults to the bit",
    )


@pytest.mark.long
def test_all_are_gone(config: Path, unbroken: Path, tmp_path: Path, report: Report) -> None:
    run_dir = tmp_path / "run"
    with servers(1) as (loop, (fake,)):
        with attempt(config, run_dir, *words([fake])) as started:
            started.wait_until(lambda: len(figures(run_dir)) >= 3)
            loop.run(fake.stop())
            gone = time.monotonic()
            started.finish()
            ended_s = time.monotonic() - gone
        _ended_with(started, 7)
        assert ended_s < 60
        loop.run(fake.start())
        done = run(config, run_dir, *words([fake]))
    assert done.status == 0, done.said
    assert done.resumed >= 2
    assert difference(run_dir, unbroken) == ""
    report(
        "all servers gone after step 3",
        f"{ended_s:.0f} s later exit status 7 on all ranks, one line; with servers again the next "
        f"start goes on from step {done.resumed} to the end without faults, to the bit",
    )


def _ended_with(started: Attempt, status: int) -> None:
    assert started.status == status, started.said
    assert None not in started.statuses
    lines = [line for line in started.said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, started.said
    assert "rollout servers: all are down" in lines[0]
