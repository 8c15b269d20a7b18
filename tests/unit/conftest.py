"""Fixtures of several files of unit tests."""

from pathlib import Path

import pytest

from tests.helpers.checkpoints import VOCAB_SIZE, params_of, write_checkpoint
from tests.helpers.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a Hugging Face directory; not to be changed."""
    return make_tiny_model(tmp_path_factory.mktemp("hf") / "model", vocab_size=VOCAB_SIZE)


@pytest.fixture
def step(tmp_path: Path, hf: Path) -> Path:
    """The same model as a step of Megatron checkpoints, for one test."""
    return write_checkpoint(tmp_path / "root", hf, params_of(hf))
