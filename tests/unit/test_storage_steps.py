"""Which step of a run's checkpoints is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megaopd.errors import CheckpointError
from megaopd.storage import steps
from megaopd.storage.manifest import MANIFEST, write_manifest
from megaopd.storage.steps import (
    complete_steps,
    find_checkpoint,
    hf_directory,
    is_megatron,
    remove_leftovers,
    step_directory,
    write_pointer,
)


def _step(root: Path, step: int) -> Path:
    directory = step_directory(root, step)
    for name in (".metadata", "__0_0.distcp", "hf/config.json"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(name.encode())
    write_manifest(directory)
    return directory


@pytest.fixture
def root(tmp_path):
    steps._warn.cache_clear()
    for step in (0, 10, 200):
        _step(tmp_path, step)
    write_pointer(tmp_path, 10)
    return tmp_path


def test_names(root):
    assert step_directory(root, 0).name == "iter_0000000"
    assert step_directory(root, 12_345_678).name == "iter_12345678"
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert complete_steps(root) == [0, 10, 200]
    assert [name for name in os.listdir(root) if name.startswith(".")] == []


def test_newest_step_whatever_the_pointer_says(root):
    assert find_checkpoint(root) == root / "iter_0000200"
    assert find_checkpoint(str(root), 10) == root / "iter_0000010"
    assert find_checkpoint(root / "iter_0000010") == root / "iter_0000010"
    assert find_checkpoint(root / "iter_0000010", 10) == root / "iter_0000010"


def test_a_step_under_another_name(root):
    (root / "iter_0000010").rename(root / "mine")
    assert find_checkpoint(root / "mine") == root / "mine"
    assert hf_directory(root / "mine") == root / "mine" / "hf"


def test_hidden_leftovers_are_no_steps(root):
    (root / "iter_0000200").rename(root / ".iter_0000200.partial")
    assert find_checkpoint(root) == root / "iter_0000010"


def test_hidden_leftovers_are_removed_and_nothing_else(root):
    (root / "iter_0000200").rename(root / ".iter_0000200.removed")
    (root / ".iter_0000300.partial" / "hf").mkdir(parents=True)
    (root / ".iter_0000300.partial.lock").touch()
    (root / ".mine").touch()
    kept = {path.name for path in root.iterdir() if not path.name.startswith(".iter_")}
    remove_leftovers(root)
    assert {path.name for path in root.iterdir()} == kept
    remove_leftovers(root / "nowhere")


@pytest.mark.parametrize(
    "damage", [MANIFEST, ".metadata", "__0_0.distcp", "hf/config.json"], ids=str
)
def test_incomplete_newest_step(root, damage, capfd):
    (root / "iter_0000200" / damage).unlink()
    assert complete_steps(root) == [0, 10]
    for _ in range(3):
        assert find_checkpoint(root) == root / "iter_0000010"
    warning = capfd.readouterr().err
    assert warning == f"warning: {root}/iter_0000200 is incomplete; using step 10\n"
    for ask in (lambda: find_checkpoint(root, 200), lambda: find_checkpoint(root / "iter_0000200")):
        with pytest.raises(CheckpointError, match="use step 10, the last good one") as caught:
            ask()
        assert f"iter_0000200: is incomplete ({damage} is missing" in str(caught.value)


def test_missing_steps(root, tmp_path):
    with pytest.raises(CheckpointError, match=r"iter_0000011: no such step; use step 200"):
        find_checkpoint(root, 11)
    with pytest.raises(CheckpointError, match=r"is step 10, not 200"):
        find_checkpoint(root / "iter_0000010", 200)
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory"):
        find_checkpoint(root / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: has no iter_\* directory"):
        find_checkpoint(tmp_path / "empty")


def test_no_complete_step(root):
    for step in complete_steps(root):
        (step_directory(root, step) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000200: is incomplete .* no other step"):
        find_checkpoint(root)
    with pytest.raises(CheckpointError, match=r"copy or convert it again"):
        find_checkpoint(root, 10)


def test_hf_directory(root, tmp_path):
    assert hf_directory(root) == root / "iter_0000200" / "hf"
    assert hf_directory(root, 10) == root / "iter_0000010" / "hf"
    assert hf_directory(root / "iter_0000010") == root / "iter_0000010" / "hf"
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    assert hf_directory(str(hf)) == hf
    assert hf_directory(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_what_is_a_megatron_checkpoint(root, tmp_path):
    assert is_megatron(root)
    assert is_megatron(str(root / "iter_0000010"))
    (tmp_path / "hf").mkdir()
    assert not is_megatron(tmp_path / "hf")
    assert not is_megatron(tmp_path / "nowhere")
