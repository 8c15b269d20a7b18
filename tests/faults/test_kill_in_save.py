"""SIGKILL at random points of a save: what is there is whole, and none is lost but the one."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.faults.conftest import Report
from tests.faults.course import Attempt, attempt, difference, run
from tests.helpers.runs import make_run

pytestmark = pytest.mark.slow

EVERY_STEP = "checkpoint.interval=1"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("saves"))


def kill(config: Path, run_dir: Path, *words: str, rank: int, save: int, point: int) -> Attempt:
    """A start that is killed at a point of one of its saves; 0 is none."""
    fault = {"kind": "kill_in_save", "rank": rank, "save": save, "point": point}
    with attempt(config, run_dir, *words, fault=fault) as started:
        started.finish()
    return started


@pytest.mark.parametrize(
    ("times", "num_steps"),
    [pytest.param(2, 6, id="short"), pytest.param(20, 48, id="long", marks=pytest.mark.long)],
)
@pytest.mark.timeout(1200)
def test_killed_at_random_points_of_a_save(
    config: Path, tmp_path: Path, rng: random.Random, report: Report, times: int, num_steps: int
) -> None:
    words = (EVERY_STEP, f"train.num_steps={num_steps}")
    # The third save is the first that removes an old checkpoint too.
    unbroken = kill(config, tmp_path / "unbroken", *words, rank=0, save=3, point=0)
    assert unbroken.status == 0, unbroken.said
    points = {int(r): int(n) for r, n in re.findall(r"rank (\d): (\d+) points", unbroken.said)}
    assert points[0] > 30
    assert points[1] > 3

    killed = tmp_path / "killed"
    newest, kept, before = 0, [], []
    for number in range(times):
        rank = 0 if rng.random() < 0.7 else 1
        # The very first one has none before it to fall back to.
        save = rng.randint(1, 2) if number else 2
        # Renaming, the pointer and the removal of old checkpoints come last, and are few.
        first = rng.choice((1, max(1, points[rank] - 15)))
        point = rng.randint(first, points[rank])
        started = kill(config, killed, *words, rank=rank, save=save, point=point)
        assert -9 in started.statuses, started.said
        assert None not in started.statuses, started.said
        assert started.resumed >= newest
        saved = int(re.findall(r"in the save of step (\d+)", started.said)[-1])
        point_name = re.findall(r"SIGKILL before: (.+)", started.said)[-1]
        before.append(_without_paths(point_name))
        newest = saved - 1
        kept.append(_is_kept(killed, saved))
    last = run(config, killed, *words)
    assert last.status == 0, last.said
    assert last.resumed >= newest
    assert difference(killed, unbroken.run_dir) == ""
    leftovers = [p.name for p in (killed / "checkpoints").iterdir() if p.name.startswith(".")]
    assert leftovers == []
    report(
        f"SIGKILL at a random point of a save, {times} times (of {points[0]} points on rank 0 and "
        f"{points[1]} on rank 1; before {', '.join(sorted(set(before)))})",
        f"{times} times resumed from a whole checkpoint: {sum(kept)} times the one that was being "
        f"saved, {times - sum(kept)} times the one before it, no worse; nothing half written is "
        "left; the end is the unbroken run's to the bit",
    )


def _is_kept(run_dir: Path, step: int) -> bool:
    return (run_dir / "checkpoints" / f"iter_{step:07d}").exists()


def _without_paths(name: str) -> str:
    """The point in a word or two: `rename`, `open SHA256SUMS`."""
    operation, *paths = name.split()
    operation = operation.removeprefix("os.").removeprefix("shutil.")
    if operation in ("half", "fsync", "the"):
        return name
    return f"{operation} {re.sub(r'[0-9]+', 'N', Path(paths[0]).name)}" if paths else operation
