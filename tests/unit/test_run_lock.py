"""One run at a time in a directory."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from megaopd.errors import ConfigError
from megaopd.storage.run_lock import run_lock


def test_the_second_is_told(tmp_path):
    said = r"run\.dir: .* is in use by another run; wait for it"
    with (
        run_lock(tmp_path),
        pytest.raises(ConfigError, match=said),
        run_lock(tmp_path, patience_s=0.3),
    ):
        raise AssertionError
    with run_lock(tmp_path, patience_s=0.0):
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    """The next one waits for its last moments."""
    code = (
        "import pathlib, sys, time\n"
        "from megaopd.storage.run_lock import run_lock\n"
        "with run_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError), run_lock(tmp_path, patience_s=0.0):
            raise AssertionError
        process.kill()
        started = time.monotonic()
        with run_lock(tmp_path, patience_s=10.0):
            assert time.monotonic() - started < 10
