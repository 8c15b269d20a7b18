"""What the file system refuses below a run's directory is one line and exit status 5."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megaopd.config import Config
from megaopd.errors import EnvironmentFault
from megaopd.metrics import MetricsWriter
from megaopd.storage.run_files import run_files


def test_a_directory_in_the_place_of_a_file(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(EnvironmentFault) as caught, run_files(tmp_path):
        MetricsWriter(tmp_path, Config())
    assert str(caught.value).startswith(f"{tmp_path}/metrics.")
    assert "cannot be written (Is a directory); make room, or move away" in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_a_file_that_is_open(tmp_path, number):
    """The error of a write has no name."""
    with (
        pytest.raises(EnvironmentFault, match=f"{tmp_path}: cannot be written"),
        run_files(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        FileNotFoundError(errno.ENOENT, "no such file", "/elsewhere"),
        TimeoutError(),
        ValueError("x"),
    ],
)
def test_what_is_not_the_runs_files_is_left_alone(tmp_path: Path, error: Exception):
    with pytest.raises(type(error)) as caught, run_files(tmp_path):
        raise error
    assert caught.value is error
