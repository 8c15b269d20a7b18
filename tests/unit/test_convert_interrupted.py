"""Conversions that are killed: what they leave cannot be taken for a model, and is cleaned up."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from megaopd.convert import cli
from megaopd.convert.to_hf import convert_to_hf
from megaopd.convert.to_megatron import convert_to_megatron
from megaopd.errors import CheckpointError
from megaopd.models.hf_io import HFReader
from megaopd.storage.steps import complete_steps, find_checkpoint
from tests.helpers.tiny_models import make_tiny_model
from tests.unit.test_convert_round_trip import assert_same_model, files_in

pytestmark = pytest.mark.slow

KILLS = 6

# Its server has imported everything before it forks: a process starts in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["megaopd.convert.to_hf", "megaopd.convert.to_megatron"])


def convert_slowly(argv: list[str], seconds_a_write: float) -> None:
    """Runs the command line in a process of its own, on a slow disk."""
    from megaopd.storage import streamed

    write = streamed.StreamedFile.write

    def slow(self, data):
        time.sleep(seconds_a_write)
        return write(self, data)

    streamed.StreamedFile.write = slow
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # A test run in a shell's background was started with the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.run(argv)


def start(argv: list[str], seconds_a_write: float):
    process = CONTEXT.Process(target=convert_slowly, args=(argv, seconds_a_write))
    process.start()
    return process


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "hf", vocab_size=509, max_shard_size="200KB")
    convert_to_megatron(folder / "hf", folder / "megatron")
    return folder


def is_complete(direction: str, dst: Path) -> bool:
    """Whether `dst` is read; what is not complete must be refused."""
    try:
        if direction == "hf-to-megatron":
            find_checkpoint(dst)
        else:
            HFReader(dst)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_killed_at_random_moments(tmp_path, models, direction):
    src = models / ("hf" if direction == "hf-to-megatron" else "megatron")
    dst = tmp_path / "dst"
    argv = [direction, str(src), str(dst)]
    process = start(argv, 0.001)  # takes the server's start out of the time
    process.join(60)
    assert process.exitcode == 0
    started = time.monotonic()
    process = start([*argv, "--overwrite"], 0.001)
    process.join(60)
    whole_s = time.monotonic() - started
    assert process.exitcode == 0

    rng = random.Random(0)
    interrupted = 0
    for number in range(KILLS):
        dst = tmp_path / f"dst{number}"
        process = start([direction, str(src), str(dst)], 0.001)
        time.sleep(rng.uniform(0.1, 1.0) * whole_s)
        process.kill()
        process.join(60)
        if is_complete(direction, dst):
            continue
        interrupted += 1
        assert not complete_steps(dst)
        if direction == "hf-to-megatron":
            convert_to_megatron(src, dst)
            assert {name for name in files_in(dst) if name.startswith(".")} == set()
            convert_to_hf(dst, tmp_path / "back", overwrite=True)
            assert_same_model(tmp_path / "back", models / "hf")
        else:
            convert_to_hf(src, dst)
            assert_same_model(dst, models / "hf")
    assert interrupted > 0  # how many depends on the machine's load
    assert {name for name in files_in(tmp_path) if name.startswith(".")} == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_polite_end_leaves_nothing(tmp_path, models, direction, number):
    src = models / ("hf" if direction == "hf-to-megatron" else "megatron")
    process = start([direction, str(src), str(tmp_path / "dst")], 0.05)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.distcp")) + list(tmp_path.rglob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert files_in(tmp_path) == set()


def test_two_conversions_to_one_destination(tmp_path, models):
    """The second is refused while the first lives, and does not disturb it."""
    dst = tmp_path / "dst"
    process = start(["megatron-to-hf", str(models / "megatron"), str(dst)], 0.05)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = start(["megatron-to-hf", str(models / "megatron"), str(dst)], 0.0)
    second.join(60)
    assert second.exitcode == 2
    process.join(60)
    assert process.exitcode == 0
    assert_same_model(dst, models / "hf")
