"""SIGKILL of a rank at random moments, again and again: the run comes to the unbroken one's end."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Report
from tests.faults.course import attempt, difference, figures, run
from tests.helpers.runs import make_run

pytestmark = pytest.mark.slow

INTERVAL = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize(
    ("times", "num_steps"),
    [pytest.param(2, 8, id="short"), pytest.param(20, 80, id="long", marks=pytest.mark.long)],
)
@pytest.mark.timeout(1200)
def test_killed_at_random_steps(
    config: Path, tmp_path: Path, rng: random.Random, report: Report, times: int, num_steps: int
) -> None:
    length = f"train.num_steps={num_steps}"
    unbroken = run(config, tmp_path / "unbroken", length)
    assert unbroken.status == 0, unbroken.said
    whole, killed = figures(unbroken.run_dir), tmp_path / "killed"
    newest, done, resumed_from, lost, ended_s = 0, 2, [], [], []
    ranks = [0, 0]
    for number in range(times):
        # A step that none before it has done: what is repeated has happened by then.
        assert done < num_steps - 1, "choose more steps"
        rank = rng.randrange(2)
        with attempt(config, killed, length) as started:
            started.wait_until(
                lambda d=done: max(figures(killed), default=0) > d and _newest(killed) > 0
            )
            time.sleep(rng.uniform(0, 0.4))
            started.kill(rank)
            started.finish()
        assert -9 in started.statuses, started.said
        assert None not in started.statuses, started.said
        if number:
            resumed_from.append(started.resumed)
            assert started.resumed == newest, "not the newest checkpoint"
        ranks[rank] += 1
        ended_s.append(started.ended_s)
        # What it has done so far is what the unbroken run did.
        so_far = figures(killed)
        assert so_far == {step: whole[step] for step in so_far}
        newest, done = _newest(killed), started.done
        lost.append(started.done - newest)
        # The checkpoint under way, and the steps since.
        assert newest >= started.done // INTERVAL * INTERVAL - INTERVAL
    last = run(config, killed, length)
    assert last.status == 0, last.said
    resumed_from.append(last.resumed)
    assert last.resumed == newest > 0
    assert difference(killed, unbroken.run_dir) == ""
    report(
        f"SIGKILL of a rank at a random moment, {times} times (rank 0 {ranks[0]} times, rank 1 "
        f"{ranks[1]} times; checkpoints every {INTERVAL} steps of {num_steps})",
        f"{len(resumed_from)} exact resumes, from steps {', '.join(map(str, resumed_from))}; at "
        f"most {max(lost)} steps lost; the other rank ended at most {max(ended_s):.1f} s later; "
        "losses, gradient norms and the final weights are the unbroken run's to the bit",
    )


def _newest(run_dir: Path) -> int:
    from megaopd.storage.steps import complete_steps

    return max(complete_steps(run_dir / "checkpoints"), default=0)


@pytest.mark.parametrize("what", ["moments", "data position", "one bit of a weight"])
@pytest.mark.long
def test_a_resume_that_forgets_something_is_seen(
    config: Path, tmp_path: Path, report: Report, what: str
) -> None:
    """What the comparison is worth."""
    unbroken = run(config, tmp_path / "unbroken", "train.num_steps=6")
    assert unbroken.status == 0, unbroken.said
    run_dir = tmp_path / "forgetful"
    with attempt(config, run_dir, "train.num_steps=6") as started:
        started.wait_until(lambda: len(figures(run_dir)) >= 3 and _newest(run_dir) > 0)
        started.kill(0)
        started.finish()
    last = run(config, run_dir, "train.num_steps=6", fault={"kind": "wrong_resume", "what": what})
    assert last.status == 0, last.said
    assert last.resumed > 0
    found = difference(run_dir, unbroken.run_dir)
    assert found
    report(f"a resume that forgets its {what}", f"seen as not exact: {found.split(':')[0]} differs")
