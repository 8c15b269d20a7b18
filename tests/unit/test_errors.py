"""What a person sees of an error: one line on rank 0 and the class's exit status."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megaopd import errors
from megaopd.errors import MegaOPDError
from megaopd.losses import LossArgumentError

ROOT = Path(__file__).resolve().parents[2]

EXIT_STATUS = {
    "MegaOPDError": 1,
    "ConfigError": 2,
    "DataError": 3,
    "CheckpointError": 4,
    "EnvironmentFault": 5,
    "NumericError": 6,
    "RolloutError": 7,
    "StopRequested": 75,
}

SCRIPT = """
import sys
from megaopd import errors

def main(argv):
    print("argv", argv)
    sys.stdout.write("no newline")
    if argv[0] == "bug":
        raise KeyError("a bug")
    if argv[0] != "fine":
        raise getattr(errors, argv[0])("loss.kind", "no 'revers_kl'", "choose reverse_kl")

errors.run_cli(main, sys.argv[1:])
print("|returned")
"""


# As rank 1 of a run whose process group exists; a child for every class, for each ends its process.
IN_A_GROUP = """
import os, sys
import torch.distributed as dist
from megaopd import errors

def main(argv):
    raise getattr(errors, argv[0])(argv[0], "found", "remedy")

for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        errors.run_cli(main, [name])
    _, status = os.waitpid(child, 0)
    print(f"{name}={os.waitstatus_to_exitcode(status)}", flush=True)
"""


def _python(code: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
    )


def _run(*argv: str, rank: str | None = None) -> subprocess.CompletedProcess[str]:
    return _python(SCRIPT, *argv, **({} if rank is None else {"RANK": rank}))


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))


def test_every_class_has_a_status_of_its_own():
    classes = {c for c in _subclasses(MegaOPDError) if c.__module__ == errors.__name__}
    assert {c.__name__: c.exit_status for c in classes} == EXIT_STATUS
    assert len(set(EXIT_STATUS.values())) == len(EXIT_STATUS)


@pytest.mark.parametrize("name", EXIT_STATUS)
def test_one_line_and_the_status(name):
    done = _run(name, "x=1")
    assert done.returncode == EXIT_STATUS[name]
    kind = "stopped" if name == "StopRequested" else "error"
    assert done.stderr == f"{kind}: loss.kind: no 'revers_kl'; choose reverse_kl\n"
    assert done.stdout == f"argv ['{name}', 'x=1']\nno newline"  # nothing of stdout is lost


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), ("11", 0)])
def test_before_the_ranks_have_joined_rank_0_alone_speaks(rank, lines):
    done = _run("DataError", rank=rank)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == lines


def test_ranks_with_logs_of_their_own_all_speak():
    done = _python(SCRIPT, "DataError", RANK="1", MEGAOPD_RANK_LOGS="1")
    assert len(done.stderr.splitlines()) == 1


def test_afterwards_a_rank_says_what_it_met_by_itself():
    """What the ranks agree on first, rank 0 alone says then too."""
    done = _python(IN_A_GROUP, *EXIT_STATUS, RANK="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{n}={status}" for n, status in EXIT_STATUS.items()]
    agreed = {"NumericError", "RolloutError", "StopRequested"}
    spoke = [name for name in EXIT_STATUS if name not in agreed]
    assert done.stderr.splitlines() == [f"error: {name}: found; remedy" for name in spoke]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_debug_lets_the_traceback_through(rank):
    done = _run("ConfigError", "--debug", rank=rank)
    assert done.returncode == 1  # Python's own, for an exception that nobody caught
    assert done.stderr.startswith("Traceback")
    last = "megaopd.errors.ConfigError: loss.kind: no 'revers_kl'; choose reverse_kl"
    assert done.stderr.splitlines()[-1] == last
    assert "argv ['ConfigError']" in done.stdout  # main never sees --debug


def test_a_bug_keeps_its_traceback():
    done = _run("bug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == "KeyError: 'a bug'"


def test_success_returns():
    done = _run("fine", "--debug")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "argv ['fine']\nno newline|returned\n"


@pytest.mark.parametrize(
    "cls", sorted(_subclasses(MegaOPDError), key=lambda c: c.__name__), ids=lambda c: c.__name__
)
def test_an_error_travels_between_processes(cls):
    error = pickle.loads(pickle.dumps(cls("a", "b", "c")))
    assert type(error) is cls
    assert str(error) == "a: b; c"


def test_a_loss_argument_is_a_configuration_error_and_a_value_error():
    assert issubclass(LossArgumentError, ValueError)
    assert LossArgumentError.exit_status == EXIT_STATUS["ConfigError"]
