"""Checks in a worker process: its limits, what it refuses, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaopd.errors import EnvironmentFault
from megaopd.rewards import sandbox_worker
from megaopd.rewards.sandbox import Sandbox

HALF = ("0.5", "\\frac{1}{2}")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox("math", cpu_s=1.0)
    yield made
    made.close()


def pid_of(sandbox: Sandbox) -> int:
    assert sandbox._process is not None
    return sandbox._process.pid


def test_a_check_that_takes_too_long_scores_0_and_the_next_one_is_made(sandbox: Sandbox) -> None:
    assert sandbox.score(*HALF) == 1
    before, ended = pid_of(sandbox), sandbox.num_ended
    assert sandbox.score("9^{9^{9}}", "42") == 0
    assert sandbox.num_ended == ended + 1
    assert not Path(f"/proc/{before}").exists()
    assert sandbox.score(*HALF) == 1
    assert pid_of(sandbox) != before


def test_a_worker_that_died_between_checks_is_replaced(sandbox: Sandbox) -> None:
    sandbox.score(*HALF)
    ended = sandbox.num_ended
    os.kill(pid_of(sandbox), signal.SIGKILL)
    assert sandbox.score(*HALF) == 1
    assert sandbox.num_ended == ended


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_whole_job_ends_no_worker(sandbox: Sandbox, number: int) -> None:
    """The run finishes its step, with the scores that it would have had."""
    sandbox.score(*HALF)
    before = pid_of(sandbox)
    os.kill(before, number)
    time.sleep(0.05)
    assert sandbox.score(*HALF) == 1
    assert pid_of(sandbox) == before


def test_threads_share_a_worker(sandbox: Sandbox) -> None:
    scores: list[float] = []
    threads = [
        threading.Thread(target=lambda i=i: scores.append(sandbox.score(f"{i}/2", f"{i * 3}/6")))
        for i in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert scores == [1.0] * 8


def test_the_worker_has_none_of_our_secrets(sandbox: Sandbox) -> None:
    sandbox.score(*HALF)
    known = Path(f"/proc/{pid_of(sandbox)}/environ").read_bytes().split(b"\0")
    names = {entry.partition(b"=")[0].decode() for entry in known if entry}
    assert names <= {
        "PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "TMPDIR",
        "PYTHONHASHSEED", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS",
    }  # fmt: skip


def test_the_memory_and_files_of_the_worker_are_bounded(sandbox: Sandbox) -> None:
    sandbox.score(*HALF)
    limits = Path(f"/proc/{pid_of(sandbox)}/limits").read_text().splitlines()
    soft = {line[:26].strip(): line[26:].split()[0] for line in limits}
    assert soft["Max address space"] == str(2 << 30)
    assert soft["Max file size"] == "0"
    assert soft["Max core file size"] == "0"


def test_a_text_that_is_too_long_is_not_read() -> None:
    sandbox = Sandbox("math", max_chars=10)
    assert sandbox.score("1" * 11, "1" * 11) == 0
    assert sandbox._process is None


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaopd.rewards.sandbox._ENVIRONMENT", ())
    monkeypatch.setattr(sys, "executable", getattr(sys, "_base_executable", sys.executable))
    with pytest.raises(
        EnvironmentFault, match="reward math: its worker does not start .*; pip inst"
    ):
        Sandbox("math").score(*HALF)


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
@pytest.mark.slow
def test_no_worker_outlives_its_parent(end: str) -> None:
    program = f"""
import os, threading, time
from megaopd.rewards.sandbox import Sandbox
sandbox = Sandbox("math", cpu_s=600)
sandbox.score("0.5", "1/2")
threading.Thread(target=sandbox.score, args=("9^{{9^{{9}}}}", "42"), daemon=True).start()
time.sleep(0.5)
print(sandbox._process.pid, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    worker = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 10
    while worker.exists() and "State:\tZ" not in (worker / "status").read_text():
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


REFUSED = [
    "__import__('os').system('true')",
    "().__class__.__base__.__subclasses__()",
    "[c for c in ()]",
    "(lambda: 1)()",
    "open('/etc/passwd')",
    "Symbol.__init__.__globals__",
    "eval('1')",
]
ALLOWED = ["Integer(1) + 2 ** Float('3.5')", "[[1, 2], ['a', None]]", "sin(x) + C", "-1"]


@pytest.mark.parametrize("text", REFUSED)
def test_code_is_refused(text: str) -> None:
    with pytest.raises(sandbox_worker.Refused):
        sandbox_worker.refuse("exec", (compile(text, "<string>", "eval"),))


@pytest.mark.parametrize("text", ALLOWED)
def test_literals_and_arithmetic_are_not(text: str) -> None:
    sandbox_worker.refuse("exec", (compile(text, "<string>", "eval"),))


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("open", ("/tmp/x", "w", 0)),
        ("open", ("/tmp/x", "r+", 0)),
        ("open", ("/tmp/x", None, os.O_WRONLY | os.O_CREAT)),
        ("os.system", (b"true",)),
        ("subprocess.Popen", ("true", (), None, None)),
        ("socket.connect", (None, ("127.0.0.1", 1))),
        ("os.remove", ("/tmp/x", -1)),
    ],
)
def test_the_world_is_out_of_reach(event: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(sandbox_worker.Refused):
        sandbox_worker.refuse(event, arguments)


def test_modules_of_the_disk_may_be_read() -> None:
    code = compile("import os; os.getcwd()", "/lib/module.py", "exec")
    sandbox_worker.refuse("exec", (code,))
    sandbox_worker.refuse("open", ("/lib/module.py", "r", 0))


HOSTILE = [
    "9^{9^{9^{9}}}",
    "1000000000!",
    "(" * 1500 + "1" + ")" * 1500,
    "{" * 500 + "1" + "}" * 500,
    "\\frac{" * 200 + "1" + "}{2}" * 200,
    "\\sum_{n=1}^{10^{9}} \\frac{1}{n}",
    "\\prod_{i=1}^{10^8} i",
    "\\binom{10^{9}}{5\\cdot 10^{8}}",
    "2^{-10^{10}}",
    "1e999999999",
    "\\begin{pmatrix}" + "1&" * 1000 + "1\\end{pmatrix}",
    "\\operatorname{__import__}('os').system('true')",
    "\x00",
    "\ud800",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_score_0_in_bounded_time(sandbox: Sandbox, text: str) -> None:
    assert sandbox.score(text, "42") == 0
    assert sandbox.score(*HALF) == 1


@pytest.mark.slow
def test_a_task_that_evaluates_answers_evaluates_no_code(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    entry = '{"task": "binary_matrix", "answer": "0 1\\n1 0", "metadata": {}}'
    mark = tmp_path / "mark"
    attack = f"[[open({str(mark)!r}, 'w').close()]]"
    sandbox = Sandbox("reasoning_gym")
    assert sandbox.score(attack, entry) == 0
    # What the task asks `eval` for is literals, and those it gets.
    assert sandbox.score("[[0, 1], [1, 0]]", entry) == 0.1
    assert sandbox.num_ended == 0
    sandbox.close()
    assert not mark.exists()
    # It is an attack: the task itself runs it.
    sandbox_worker.reasoning_scorer()(attack, entry)
    assert mark.exists()
