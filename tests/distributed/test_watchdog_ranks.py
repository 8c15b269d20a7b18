"""Ranks that hang, stop, die and fail, with a watchdog around all of them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from megaopd.config_reliability import DeadlineConfig
from megaopd.errors import DataError, NumericError, run_cli
from megaopd.watchdog import Watchdog
from tests.helpers.processes import process_context

pytestmark = pytest.mark.slow

NUM_RANKS = 3
# Longer than a healthy thread waits for a core on a machine that is busy with these tests.
DEADLINES = DeadlineConfig(student_s=3.0, silence_s=8.0)
TIMEOUT_S = 90.0


# What the ranks do, all at once.


def meet() -> None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))


def asleep_forever() -> None:
    time.sleep(1e6)


def hang(dog: Watchdog, rank: int) -> None:
    with dog.phase("rollout", 6):
        meet()
    with dog.phase("student", 7):
        if rank == 1:
            asleep_forever()
        meet()


def hang_alone(dog: Watchdog, rank: int) -> None:
    with dog.phase("student", 1):
        asleep_forever()


def stop(dog: Watchdog, rank: int) -> None:
    with dog.phase("rollout", 4):
        time.sleep(1.0)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        meet()


def stop_rank_0(dog: Watchdog, rank: int) -> None:
    with dog.phase("teacher", 4):
        meet()
        time.sleep(2.5)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        meet()


def die(dog: Watchdog, rank: int) -> None:
    with dog.phase("weight_sync", 2):
        time.sleep(1.0)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        meet()


def die_as_rank_0(dog: Watchdog, rank: int) -> None:
    with dog.phase("eval", 8):
        meet()
        time.sleep(2.5)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        meet()


def hold_the_lock(dog: Watchdog, rank: int) -> None:
    with dog.phase("rollout", 5):
        time.sleep(1.0)
        if rank == 1:
            # Python's lock is not given up for the call.
            ctypes.PyDLL(None).sleep(1000)
        meet()


def fail_alone(dog: Watchdog, rank: int) -> None:
    with dog.phase("rollout", 3):
        if rank == 2:
            raise DataError("data.jsonl:3", "no prompt", "correct it")
        meet()


def fail_together(dog: Watchdog, rank: int) -> None:
    with dog.phase("checkpoint", 3):
        meet()
        if rank == 0:  # it has more to write
            time.sleep(4.0)
        raise NumericError("step 3", "not finite", "lower it")


def have_a_bug(dog: Watchdog, rank: int) -> None:
    if rank == 0:
        raise KeyError("a bug")
    meet()


def finish(dog: Watchdog, rank: int) -> None:
    for step in range(1, 200):
        with dog.phase("student", step):
            meet()
    time.sleep(rank)


@dataclass
class Outcome:
    """Of a scenario.

    Attributes:
        statuses: of all ranks, None of one that is still there when all others have ended.
        said: what each rank wrote to stderr.
        seconds: between the fault, 1 s at least after the start of the first rank's watch, and the
            end of the last one that ended by itself.
        folder: run.dir.
    """

    statuses: list[int | None]
    said: list[str]
    seconds: float
    folder: Path

    def stacks(self, rank: int) -> str:
        return (self.folder / "stacks" / f"rank_{rank}.txt").read_text()

    def told(self) -> list[str]:
        """What somebody was told of the end."""
        return [path.read_text() for path in self.folder.glob("told_*")]

    def errors(self) -> list[str]:
        lines = [line for text in self.said for line in text.splitlines()]
        return [line for line in lines if line.startswith("error: ")]


Ranks = list[Any]

SCENARIOS: dict[Callable[[Watchdog, int], None], int] = {
    hang: NUM_RANKS,
    hang_alone: 1,
    stop: NUM_RANKS,
    stop_rank_0: NUM_RANKS,
    die: NUM_RANKS,
    die_as_rank_0: NUM_RANKS,
    hold_the_lock: NUM_RANKS,
    fail_alone: NUM_RANKS,
    fail_together: NUM_RANKS,
    have_a_bug: NUM_RANKS,
    finish: NUM_RANKS,
}


def run_rank(
    scenario: Callable[[Watchdog, int], None], rank: int, world_size: int, folder: Path
) -> None:
    os.setsid()
    file = os.open(folder / f"stderr_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(world_size))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)

    def main(argv: list[str]) -> None:
        told = (folder / f"told_{rank}").write_text
        with Watchdog(DEADLINES, folder, rank, world_size, on_end=told) as dog:
            (folder / f"began_{rank}").touch()
            scenario(dog, rank)

    run_cli(main, [])
    dist.destroy_process_group()


def wait_for(ranks: Ranks, until: float) -> None:
    """Until all have ended, but one that is stopped."""
    left = {process.sentinel: process for process in ranks}
    while left and time.monotonic() < until:
        for sentinel in wait(list(left), timeout=0.1):
            left.pop(sentinel).join()
        if all(_is_stopped(process.pid) for process in left.values()):
            return


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Iterator[dict[str, Outcome]]:
    """All scenarios, side by side: most of their time is waiting."""
    context = process_context()
    # What all processes are forked from takes its time, which is not theirs.
    first = context.Process(target=int)
    first.start()
    first.join()
    until = time.monotonic() + TIMEOUT_S
    started: dict[str, tuple[Ranks, Path]] = {}
    found: dict[str, Outcome] = {}
    try:
        for scenario, world_size in SCENARIOS.items():
            folder = tmp_path_factory.mktemp(scenario.__name__)
            ranks = [
                context.Process(target=run_rank, args=(scenario, rank, world_size, folder))
                for rank in range(world_size)
            ]
            started[scenario.__name__] = ranks, folder
            for process in ranks:
                process.start()
        for name, (ranks, folder) in started.items():
            wait_for(ranks, until)
            print(name, time.monotonic() - until + TIMEOUT_S)
            began = max(path.stat().st_mtime for path in folder.glob("began_*"))
            statuses = [process.exitcode for process in ranks]
            for process in ranks:
                if process.exitcode is None and _is_stopped(process.pid):
                    os.kill(process.pid, signal.SIGCONT)
                    process.join(10)
            said = [(folder / f"stderr_{rank}").read_text() for rank in range(len(ranks))]
            found[name] = Outcome(statuses, said, time.time() - began, folder)
            print(name, statuses, *said, sep="\n")
        yield found
    finally:
        for ranks, _ in started.values():
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def test_a_rank_that_sleeps_in_a_phase(outcomes):
    outcome = outcomes["hang"]
    assert outcome.statuses == [5, 5, 5]
    (error,) = outcome.errors()
    assert error.startswith("error: rank 1: ")
    assert " s in phase student of step 7, and deadline.student_s is 3; it is at " in error
    assert "called from" not in error
    assert " asleep_forever and ranks 0, 2 wait for others; look at " in error
    assert error in outcome.said[0]
    assert outcome.told() == [error.removeprefix("error: ")]
    for rank, function in enumerate(("all_reduce", "asleep_forever", "all_reduce")):
        head, verdict, *stacks = outcome.stacks(rank).splitlines()
        assert head.startswith(f"rank {rank}: ")
        assert head.endswith(" s in phase student of step 7")
        assert verdict.startswith("verdict on rank ")
        main = "\n".join(stacks).split("MainThread:\n")[1].split("\n\n")[0]
        assert f" {function}" in main
        assert " hang\n" in main
        assert f"in phase student of step 7: {main.splitlines()[-1].strip()}" in outcome.said[rank]


def test_a_rank_alone(outcomes):
    outcome = outcomes["hang_alone"]
    assert outcome.statuses == [5]
    (error,) = outcome.errors()
    assert error.startswith("error: rank 0: ")
    assert " asleep_forever; look at " in error
    assert " asleep_forever\n" in outcome.stacks(0)


def test_a_rank_that_is_stopped(outcomes):
    outcome = outcomes["stop"]
    assert outcome.statuses == [5, 5, None]
    (error,) = outcome.errors()
    assert error.startswith("error: rank 2: no sign of life for 8 s in phase rollout of step 4; ")
    for rank in (0, 1):
        assert "phase rollout of step 4\n" in outcome.stacks(rank)
        assert " meet\n" in outcome.stacks(rank)
    # It leaves when it goes on, and not without its stacks.
    assert "stop" in outcome.stacks(2)


def test_rank_0_is_stopped(outcomes):
    outcome = outcomes["stop_rank_0"]
    assert outcome.statuses == [None, 5, 5]
    (error,) = outcome.errors()
    assert error.startswith("error: rank 0: no sign of life for 8 s in phase teacher of step 4; ")
    assert error in outcome.said[1]
    for rank in (1, 2):
        assert "phase teacher of step 4\n" in outcome.stacks(rank)


@pytest.mark.parametrize(
    ("name", "dead", "phase"),
    [("die", 1, "phase weight_sync of step 2"), ("die_as_rank_0", 0, "phase eval of step 8")],
)
def test_a_rank_that_is_killed(outcomes, name, dead, phase):
    outcome = outcomes[name]
    assert outcome.statuses == [-9 if rank == dead else 5 for rank in range(NUM_RANKS)]
    (error,) = outcome.errors()
    assert error.startswith(
        f"error: rank {dead}: died, last seen in {phase}; look at its log, and at "
    )
    for rank in {0, 1, 2} - {dead}:
        stacks = outcome.stacks(rank)
        assert f"verdict on rank {dead}: died, last seen in {phase}" in stacks
        # The collective has ended; where it was called is told by its error.
        assert "in meet" in stacks
        assert "RuntimeError: " in stacks
        assert "Traceback" not in outcome.said[rank]


def test_a_rank_that_no_thread_of_python_can_watch(outcomes):
    outcome = outcomes["hold_the_lock"]
    assert outcome.statuses[::2] == [5, 5]
    assert outcome.statuses[1] == 1
    (error,) = outcome.errors()
    assert error.startswith("error: rank 1: ")
    assert "phase rollout of step 5" in error
    assert "hold_the_lock" in outcome.stacks(1)


def test_an_error_of_one_rank_is_all_that_is_said(outcomes):
    outcome = outcomes["fail_alone"]
    assert outcome.statuses == [3, 3, 3]
    assert outcome.errors() == ["error: data.jsonl:3: no prompt; correct it"]
    assert outcome.said[:2] == ["", ""]
    assert outcome.told()[0].startswith("rank 2: failed in phase rollout of step 3; look at its")


def test_an_error_that_the_ranks_agree_on_hurries_nobody(outcomes):
    outcome = outcomes["fail_together"]
    assert outcome.statuses == [6, 6, 6]
    assert outcome.errors() == ["error: step 3: not finite; lower it"]


def test_a_bug_keeps_its_traceback(outcomes):
    outcome = outcomes["have_a_bug"]
    assert outcome.statuses == [1, 1, 1]
    assert outcome.said[0].splitlines()[-1] == "KeyError: 'a bug'"
    assert outcome.said[1:] == ["", ""]


def test_ranks_that_finish_one_after_the_other(outcomes):
    outcome = outcomes["finish"]
    assert outcome.statuses == [0, 0, 0]
    assert outcome.said == ["", "", ""]
    assert outcome.told() == []
    assert not (outcome.folder / "stacks").exists()


def test_all_of_it_in_time(outcomes):
    assert max(outcome.seconds for outcome in outcomes.values()) < 60
