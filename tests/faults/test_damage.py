"""Checkpoints that are not what was written: named, never used, and never a start from step 0."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megaopd.checkpoint.resumable import find_resumable
from megaopd.errors import CheckpointError
from megaopd.storage.steps import POINTER, step_directory
from tests.faults.conftest import Report
from tests.faults.course import contents, difference, run
from tests.helpers.runs import make_run

pytestmark = pytest.mark.slow

OLDER, NEWEST = 4, 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def saved(config: Path) -> Path:
    """A run of 6 steps, with the checkpoints of steps 4 and 6; not to be changed."""
    done = run(config, config.parent / "saved", "train.num_steps=6")
    assert done.status == 0, done.said
    return config.parent / "saved"


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoints."""
    return Path(shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints"))


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """What a run does on all ranks, this process does as the only one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Warnings(logging.Handler):
    """What the package warns of while this is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Warnings:
        logging.getLogger("megaopd").addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("megaopd").removeHandler(self)


def refused_by_name(root: Path, name: str) -> bool:
    """Whether the older checkpoint is found, with a warning that names a file of the newest."""
    with Warnings() as warnings:
        found = find_resumable(root, "auto")
    assert found is not None
    if found.step == NEWEST:
        return False
    assert found.step == OLDER
    newest = step_directory(root, NEWEST)
    return any(str(newest) in line and name in line for line in warnings.lines)


def test_nothing_is_refused_without_damage(root: Path) -> None:
    assert not refused_by_name(root, "")
    found = find_resumable(root, "auto")
    assert found is not None
    assert found.step == NEWEST


@pytest.mark.parametrize(
    "flips",
    [pytest.param(20, id="short"), pytest.param(200, id="long", marks=pytest.mark.long)],
)
def test_flipped_bits(root: Path, rng: random.Random, report: Report, flips: int) -> None:
    newest = step_directory(root, NEWEST)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    # Every file in turn, for most of the bytes are in two of them.
    for number in range(flips):
        path = files[number % len(files)]
        data = bytearray(path.read_bytes())
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        assert refused_by_name(root, path.name), f"{path}: byte {place}, bit {bit}"
        data[place] ^= bit
        path.write_bytes(data)
    assert not refused_by_name(root, "")
    report(
        f"a flipped bit in a file of the newest checkpoint, {flips} times ({len(files)} files in "
        "turn, the manifest among them)",
        f"{flips} times refused by the file's name, and the checkpoint before it taken",
    )


def test_files_cut_grown_removed_added(root: Path, report: Report) -> None:
    newest = step_directory(root, NEWEST)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    count = 0
    for path in files:
        data = path.read_bytes()
        for damaged in (b"", data[: len(data) // 2], data[:-1], data + b"\0"):
            path.write_bytes(damaged)
            assert refused_by_name(root, path.name), f"{path}: {len(damaged)} of {len(data)} bytes"
            count += 1
        path.unlink()
        if path.name == "SHA256SUMS":  # then the directory is none that is complete
            assert refused_by_name(root, newest.name)
        else:
            assert refused_by_name(root, path.name) or refused_by_name(root, newest.name)
        count += 1
        path.write_bytes(data)
    (newest / "more.distcp").write_bytes(b"x")
    assert refused_by_name(root, "more.distcp")
    (newest / "more.distcp").unlink()
    assert not refused_by_name(root, "")
    report(
        f"each of {len(files)} files of the newest checkpoint empty, cut in half, a byte shorter, "
        "a byte longer, removed; one more file",
        f"{count + 1} times refused by name, and the checkpoint before it taken",
    )


POINTERS = {
    "empty": b"",
    "garbage": b"\xff\x00garbage\n",
    "of a step that is not there": b"99",
    "of an older step": b"4",
    "a negative number": b"-1",
    "missing": None,
}


def test_the_pointer_lies(root: Path, report: Report) -> None:
    for name, content in POINTERS.items():
        (root / POINTER).unlink(missing_ok=True)
        if content is not None:
            (root / POINTER).write_bytes(content)
        found = find_resumable(root, "auto")
        assert found is not None, name
        assert found.step == NEWEST, name
    # What is left of checkpoints that somebody removed is no reason to start anew.
    shutil.rmtree(step_directory(root, NEWEST))
    shutil.rmtree(step_directory(root, OLDER))
    (root / POINTER).write_bytes(b"6")
    with pytest.raises(CheckpointError, match="none is whole"):
        find_resumable(root, "auto")
    report(
        f"the pointer file {', '.join(POINTERS)}; a pointer without checkpoints",
        "the newest whole checkpoint is taken each time; without one exit status 4, no start "
        "from step 0",
    )


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_whole_run_meets_a_flipped_bit(
    config: Path, saved: Path, tmp_path: Path, report: Report
) -> None:
    """It warns, goes on from the one before, and comes to the same end; the pointer is garbage."""
    run_dir = Path(shutil.copytree(saved, tmp_path / "run"))
    newest = step_directory(run_dir / "checkpoints", NEWEST)
    file = next(newest.glob("*.distcp"))
    _flip(file)
    (run_dir / "checkpoints" / POINTER).write_bytes(b"garbage")
    done = run(config, run_dir, "train.num_steps=6")
    assert done.status == 0, done.said
    assert done.resumed == OLDER
    assert f"{file} SHA-256 differs from SHA256SUMS: it is not used" in done.said
    assert difference(run_dir, saved) == ""
    report(
        "a flipped bit in the tensors of the newest checkpoint, and garbage in the pointer; then "
        "the run is started",
        f"it names the file, goes on from step {OLDER}, and comes to the unbroken run's end to "
        "the bit",
    )


def test_a_whole_run_without_a_whole_checkpoint(
    config: Path, saved: Path, tmp_path: Path, report: Report
) -> None:
    run_dir = Path(shutil.copytree(saved, tmp_path / "run"))
    for step in (OLDER, NEWEST):
        _flip(next(step_directory(run_dir / "checkpoints", step).glob("*.distcp")))
    before = contents(run_dir)
    done = run(config, run_dir, "train.num_steps=6")
    assert done.status == 4, done.said
    assert "has checkpoints, and none is whole" in done.said
    assert "SHA-256 differs" in done.said
    # Nothing was begun anew.
    assert contents(run_dir / "checkpoints") == {
        name.removeprefix("checkpoints/"): digest
        for name, digest in before.items()
        if name.startswith("checkpoints/")
    }
    assert contents(run_dir)["metrics.jsonl"] == before["metrics.jsonl"]
    report(
        "a flipped bit in the tensors of every checkpoint; then the run is started",
        "exit status 4, the files named; checkpoints and metrics are as they were",
    )
