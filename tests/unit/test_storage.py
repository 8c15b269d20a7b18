"""Directories that are complete or not there, and manifests that find every changed bit."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megaopd.errors import CheckpointError, ConfigError, EnvironmentFault
from megaopd.storage import staged as staged_module
from megaopd.storage.manifest import (
    MANIFEST,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from megaopd.storage.staged import StagedDirectory

ROOT = Path(__file__).resolve().parents[2]
FILES = {"weights.bin": bytes(range(256)) * 20, "hf/config.json": b"{}\n", ".metadata": b"m" * 300}


def _fill(directory: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def _write(
    dst: Path,
    files: dict[str, bytes] = FILES,
    error: BaseException | None = None,
    overwrite: bool = False,
) -> None:
    with StagedDirectory(dst, overwrite=overwrite) as staged:
        _fill(staged.path, files)
        if error is not None:
            raise error


@pytest.fixture
def directory(tmp_path):
    write_manifest(_fill(tmp_path / "made"))
    return tmp_path / "made"


def test_manifest_is_what_sha256sum_reads(directory):
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", MANIFEST], cwd=directory, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name}: OK" for name in sorted(FILES)]
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert read_manifest(directory) == expected
    verify_manifest(directory)


def test_given_digests_are_not_computed_again(tmp_path):
    _fill(tmp_path)
    write_manifest(tmp_path, {"weights.bin": "0" * 64})
    assert read_manifest(tmp_path)["weights.bin"] == "0" * 64
    with pytest.raises(CheckpointError, match=r"weights.bin: SHA-256 differs from SHA256SUMS"):
        verify_manifest(tmp_path)
    verify_manifest(tmp_path, ["hf/config.json"])  # the others are not read
    with pytest.raises(CheckpointError, match=r"gone: is missing, though it was written"):
        write_manifest(tmp_path, {"gone": "0" * 64})


def test_progress_counts_every_byte(directory):
    counts: list[int] = []
    verify_manifest(directory, progress=counts.append)
    assert sum(counts) == sum(map(len, FILES.values()))


def test_200_flipped_bits_are_200_refusals_that_name_the_file(directory):
    rng = random.Random(0)
    names = [*FILES, MANIFEST]
    for i in range(200):
        name = names[i % len(names)]
        file = directory / name
        content = file.read_bytes()
        place = rng.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            verify_manifest(directory)
        assert str(caught.value).startswith(f"{file}: "), place
        file.write_bytes(content)
    verify_manifest(directory)


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage", b"\xff\xfe", b"# SHA-256\n"])
def test_what_is_no_manifest(directory, content):
    (directory / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{MANIFEST}: was changed"):
        read_manifest(directory)


def test_truncated_missing_and_additional_files(directory):
    file = directory / "weights.bin"
    file.write_bytes(FILES["weights.bin"][:-1])
    with pytest.raises(CheckpointError, match="weights.bin: SHA-256 differs"):
        verify_manifest(directory)
    file.unlink()
    with pytest.raises(CheckpointError, match="weights.bin: is missing, though SHA256SUMS lists"):
        verify_manifest(directory)
    _fill(directory)
    (directory / "hf/more.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="hf/more.json: is not listed in SHA256SUMS"):
        verify_manifest(directory)
    with pytest.raises(CheckpointError, match="hf/more.json: is not listed in SHA256SUMS"):
        verify_manifest(directory, ["hf/more.json"])
    (directory / "hf/more.json").unlink()
    (directory / ".cache").mkdir()
    (directory / ".cache/download.lock").write_bytes(b"")
    verify_manifest(directory)
    (directory / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="SHA256SUMS: is missing"):
        verify_manifest(directory)


@pytest.mark.parametrize("name", ["weights.bin", "hf"])
def test_links_are_refused(directory, tmp_path, name):
    """What they lead to can be changed after the check, and lie anywhere."""
    (directory / name).rename(tmp_path / "outside")
    (directory / name).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=f"{name}: is not a regular file"):
        verify_manifest(directory)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a//b", "./weights.bin"])
def test_manifest_that_names_what_lies_outside(directory, name):
    line = f"{'0' * 64}  {name}\n"
    last = f"# SHA-256 of the lines above: {hashlib.sha256(line.encode()).hexdigest()}\n"
    (directory / MANIFEST).write_text(line + last)
    with pytest.raises(CheckpointError, match="SHA256SUMS: lists .* which cannot be"):
        verify_manifest(directory)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\u2028b"])
def test_names_that_no_manifest_can_hold(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="has a name that SHA256SUMS cannot hold"):
        write_manifest(tmp_path)


def test_directory_appears_when_it_is_complete(tmp_path):
    dst = tmp_path / "deep" / "dst"
    with StagedDirectory(dst) as staged:
        _fill(staged.path)
        assert not dst.exists()
    verify_manifest(dst)
    assert os.listdir(dst.parent) == ["dst"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="mine"):
        _write(tmp_path / "dst", error=ValueError("mine"))
    assert os.listdir(tmp_path) == []


def test_existing_destination(tmp_path):
    dst = tmp_path / "dst"
    dst.mkdir()
    with StagedDirectory(dst) as staged:  # an empty directory is none
        _fill(staged.path)
    with pytest.raises(ConfigError, match=r"dst: exists; .* --overwrite"):
        StagedDirectory(dst).__enter__()
    with pytest.raises(ConfigError, match=r"dst: is not a directory of the kind"):
        StagedDirectory(dst, overwrite=True, replaceable=lambda path: False).__enter__()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"file: is not a directory;"):
        StagedDirectory(tmp_path / "file", overwrite=True).__enter__()
    verify_manifest(dst)
    assert sorted(os.listdir(tmp_path)) == ["dst", "file"]


def test_overwriting_replaces_all_or_nothing(tmp_path):
    dst = tmp_path / "dst"
    _write(dst, {"old": b"1"})
    with pytest.raises(KeyboardInterrupt):
        _write(dst, error=KeyboardInterrupt(), overwrite=True)
    assert (dst / "old").read_bytes() == b"1"
    with StagedDirectory(dst, overwrite=True) as staged:
        _fill(staged.path)
        assert (dst / "old").exists()
    verify_manifest(dst)
    assert not (dst / "old").exists()
    assert os.listdir(tmp_path) == ["dst"]


def test_a_link_to_the_destination_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with StagedDirectory(tmp_path / "link") as staged:
        _fill(staged.path)
    assert (tmp_path / "link").is_symlink()
    verify_manifest(tmp_path / "real")


def test_killed_between_the_two_renames(tmp_path):
    """The old directory is found again where the new one never took its place."""
    _fill(tmp_path / ".dst.replaced", {"old": b"1"})
    with pytest.raises(ConfigError, match="exists"):
        StagedDirectory(tmp_path / "dst").__enter__()
    assert (tmp_path / "dst" / "old").read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["dst"]


_WRITER = """
import sys, time
from pathlib import Path
from megaopd.errors import run_cli
from megaopd.storage.staged import StagedDirectory

def main(argv):
    with StagedDirectory(argv[0]) as staged:
        (staged.path / "half").write_bytes(b"x" * 100_000)
        print("writing", flush=True)
        time.sleep(60)

run_cli(main, sys.argv[1:])
"""


def test_killed_and_second_writers(tmp_path):
    """A killed writer leaves nothing that looks complete; while it lives nobody else may write."""
    dst = tmp_path / "dst"
    command = [sys.executable, "-c", _WRITER, str(dst)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"writing\n"
        second = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
        assert second.returncode == 2
        assert "dst: is being written by another process" in second.stderr
        assert (tmp_path / ".dst.partial" / "half").exists()
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        first.stdout.close()
    assert not dst.exists()
    assert (tmp_path / ".dst.partial" / "half").exists()
    with StagedDirectory(dst) as staged:
        assert os.listdir(staged.path) == []
        _fill(staged.path)
    verify_manifest(dst)
    assert os.listdir(tmp_path) == ["dst"]


def test_not_enough_room_is_said_before_anything_is_written(tmp_path):
    needed = 1 << 60
    with pytest.raises(EnvironmentFault, match=rf"needs {needed} bytes, \d+ are free"):
        StagedDirectory(tmp_path / "dst", needed_bytes=needed).__enter__()
    assert os.listdir(tmp_path) == []


_FULL_DISK = """
import resource, sys
from megaopd.errors import run_cli
from megaopd.storage.staged import StagedDirectory

def main(argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    with StagedDirectory(argv[0], needed_bytes=60_000) as staged:
        (staged.path / "large").write_bytes(b"x" * 60_000)

run_cli(main, sys.argv[1:])
"""


def test_a_file_that_the_system_refuses_to_hold(tmp_path):
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path / "dst")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert done.returncode == 5, done.stderr
    assert "no space left" in done.stderr
    assert "needs 60000 bytes" in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_while_the_names_are_synced(tmp_path, monkeypatch, number):
    """Delayed allocation and quotas say so only now."""

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(staged_module.os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"no space left .* \d+ are free"):
        _write(tmp_path / "dst")
    assert os.listdir(tmp_path) == []


def test_other_refusals_of_the_file_system(tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "file").write_bytes(b"")
        dst, reason = tmp_path / "file" / "dst", "(Not a directory|File exists)"
    else:
        tmp_path.chmod(0o500)
        dst, reason = tmp_path / "dst", "Permission denied"
    with pytest.raises(CheckpointError, match=rf"cannot be written \({reason}\)"):
        StagedDirectory(dst).__enter__()
    tmp_path.chmod(0o700)


def test_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(staged_module.fcntl, "flock", no_locks)
    with StagedDirectory(tmp_path / "dst") as staged:
        _fill(staged.path)
    assert os.listdir(tmp_path) == ["dst"]
