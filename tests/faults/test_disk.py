"""Saves that cannot be written: said within seconds, and what was there before stays as it was."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from megaopd.storage.steps import step_directory
from tests.faults.conftest import Report
from tests.faults.course import Attempt, attempt, contents, difference, run
from tests.helpers.runs import make_run

pytestmark = pytest.mark.slow

LENGTH = "train.num_steps=4"
# How long after a fault there must be a word of it.
WORD_S = 30.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def unbroken(config: Path) -> Path:
    done = run(config, config.parent / "unbroken", LENGTH)
    assert done.status == 0, done.said
    return config.parent / "unbroken"


def half_run(unbroken: Path, run_dir: Path) -> dict[str, str]:
    """A run that has come to the checkpoint of step 2; returns what is in that."""
    done = step_directory(unbroken / "checkpoints", 4)
    shutil.copytree(unbroken, run_dir, ignore=shutil.ignore_patterns(done.name))
    old = contents(step_directory(run_dir / "checkpoints", 2))
    assert old
    return old


def ended_as_it_should(started: Attempt, status: int, old: dict[str, str]) -> None:
    """With a line of each kind, the old checkpoint as it was and nothing of the new one."""
    assert started.status == status, started.said
    assert started.statuses == [status, status], started.said
    lines = [line for line in started.said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, started.said
    assert "Traceback" not in started.said
    root = started.run_dir / "checkpoints"
    assert contents(step_directory(root, 2)) == old
    assert sorted(p.name for p in root.iterdir() if "iter_" in p.name) == ["iter_0000002"]


@contextmanager
def file_system(directory: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of its own, of a size."""
    if os.geteuid() != 0:
        pytest.skip("a file system of its own takes root")
    directory.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system of its own can be mounted: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_disk_is_full(
    config: Path, unbroken: Path, tmp_path: Path, report: Report, known: bool
) -> None:
    """There is room for one checkpoint and half of another. It is known before anything is written,
    or, where there is a quota say, met on the way."""
    size = sum(
        path.stat().st_size
        for path in step_directory(unbroken / "checkpoints", 4).rglob("*")
        if path.is_file()
    )
    fault: dict[str, Any] | None = None if known else {"kind": "room_that_is_not_there"}
    with file_system(tmp_path / "small", size + size // 2) as small:
        run_dir = small / "run"
        old = half_run(unbroken, run_dir)
        started = run(config, run_dir, LENGTH, fault=fault)
        ended_as_it_should(started, 5, old)
        line = re.search(r"error: (\S+): no space left.*", started.said)
        assert line, started.said
        numbers = re.search(r"needs (\d+) bytes, (\d+) are free", line[0])
        assert numbers, line[0]
        needed, free = map(int, numbers.groups())
        assert str(small) in line[1]
        assert 0.9 * size < needed < 2 * size
        assert free < needed
        # Where there is room it goes on.
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(small)], check=True)
        done = run(config, run_dir, LENGTH)
        assert done.status == 0, done.said
        assert done.resumed == 2
        assert difference(run_dir, unbroken) == ""
    how = (
        "seen before the first byte" if known else "met by the writer, the system having said more"
    )
    report(
        f"a disk with room for half of a checkpoint beside the old one ({how})",
        f"exit status 5 on both ranks: {_anonymous(line[0], small)}; the old checkpoint is the "
        "same to the byte; with room the run goes on to the unbroken one's end",
    )


def _anonymous(line: str, directory: Path) -> str:
    return "`" + line.replace(str(directory), "DIR") + "`"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"kind": "write_error", "rank": 1, "at": 100, "errno": "EIO"}, "Input/output error"),
        pytest.param(
            {"kind": "writer_dies", "rank": 0, "at": 100}, "SystemExit", marks=pytest.mark.long
        ),
    ],
    ids=["error", "dead"],
)
def test_the_writer_fails(
    config: Path,
    unbroken: Path,
    tmp_path: Path,
    report: Report,
    kind: dict[str, Any],
    words: str,
) -> None:
    run_dir = tmp_path / "run"
    old = half_run(unbroken, run_dir)
    with attempt(config, run_dir, LENGTH, fault=kind) as started:
        started.finish()
        ended = time.time()
    ended_as_it_should(started, 4, old)
    assert words in started.said
    injected = float(re.findall(r"injected on rank \d: .* at ([\d.]+)", started.said)[-1])
    assert ended - injected < WORD_S
    done = run(config, run_dir, LENGTH)
    assert done.status == 0, done.said
    assert done.resumed == 2
    assert difference(run_dir, unbroken) == ""
    line = re.findall("error: .*", started.said)[0]
    what = f"a write of rank {kind['rank']}'s fails (EIO)"
    if kind["kind"] == "writer_dies":
        what = f"the thread that writes on rank {kind['rank']} ends"
    report(
        f"{what} in the middle of a save",
        f"after {ended - injected:.1f} s exit status 4 on both ranks: "
        f"{_anonymous(line, run_dir)}; the old checkpoint is the same to the byte; the next start "
        "goes on to the unbroken run's end",
    )


@pytest.mark.long
def test_the_background_export_is_killed(config: Path, tmp_path: Path, report: Report) -> None:
    """A run goes on without it, and says so."""
    run_dir = tmp_path / "run"
    words = ("train.num_steps=2", "checkpoint.export_hf=true")
    with attempt(config, run_dir, *words) as started:

        def children() -> list[psutil.Process]:
            parent = psutil.Process(started.ranks.pids[0])
            return [c for c in parent.children(recursive=True) if "megatron-to-hf" in c.cmdline()]

        started.wait_until(lambda: bool(children()))
        for child in children():
            child.kill()
        killed = time.time()
        started.finish()
        said_s = time.time() - killed
    assert started.status == 0, started.said
    assert "was not written: killed by signal 9" in started.said
    assert said_s < WORD_S
    step = step_directory(run_dir / "checkpoints", 2)
    assert contents(step)
    assert not (run_dir / "hf_steps" / "iter_0000002").exists()
    done = run(config, run_dir, "train.num_steps=4")
    assert (done.status, done.resumed) == (0, 2), done.said
    report(
        "SIGKILL of the process that makes a Hugging Face directory of a checkpoint",
        f"a warning within {said_s:.1f} s (`was not written: killed by signal 9`); the run ends "
        "with status 0, nothing half made has the export's name, the checkpoint is whole",
    )
