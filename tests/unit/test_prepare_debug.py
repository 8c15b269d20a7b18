"""The models and prompts of the debug run: the same every time, complete or not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaopd.config import load
from megaopd.errors import CheckpointError, ConfigError
from megaopd.inputs import read_inputs
from tools.prepare_debug import MARKER, NUM_PROMPTS, VOCAB_SIZE, main, prepare


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("made") / "debug"
    assert prepare(target)
    return target


def test_it_is_what_the_configuration_needs(made, monkeypatch, tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/debug").symlink_to(made)
    monkeypatch.chdir(tmp_path)
    inputs = read_inputs(load(["conf=debug"]))
    assert len(inputs.train_prompts) == NUM_PROMPTS["train"]
    assert len(inputs.eval_prompts) == NUM_PROMPTS["eval"]
    assert inputs.num_overlong == 0
    assert inputs.vocab_size == VOCAB_SIZE
    assert len(inputs.tokenizer) == VOCAB_SIZE


def test_no_embedding_is_zero(made):
    for name in ("teacher", "student"):
        weights = load_file(made / name / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.linalg.vector_norm(weights, dim=1).min() > 0.3


def test_the_same_files_every_time(made, tmp_path):
    assert prepare(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(made)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_what_is_there_is_left_alone(made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    main(["--out", str(made)])
    assert capsys.readouterr().out == f"{made}: is there already\n"
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_another_recipe_is_replaced_and_a_foreign_directory_is_not(tmp_path):
    target = tmp_path / "debug"
    target.mkdir()
    (target / "mine.txt").touch()
    with pytest.raises(ConfigError, match="is not this tool's; name another directory"):
        prepare(target)
    (target / MARKER).write_text(json.dumps({"version": 0}))
    assert prepare(target)
    assert not (target / "mine.txt").exists()


def test_a_run_without_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such file; run python tools/prepare_debug\.py$"):
        read_inputs(load(["conf=debug"]))
