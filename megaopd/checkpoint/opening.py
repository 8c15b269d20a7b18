"""The weights at a path, whichever format they have."""

from __future__ import annotations

from pathlib import Path

from megaopd.checkpoint.reader import MegatronReader
from megaopd.models.hf_io import HFReader
from megaopd.models.hf_io.source import WeightSource
from megaopd.storage.steps import is_megatron


def open_weights(path: str | Path, step: int | None = None) -> WeightSource:
    """Opens a model's weights: a Megatron checkpoint or a Hugging Face directory.

    Args:
        step: of a Megatron checkpoint; None is the newest complete one.

    Raises:
        CheckpointError: it is neither, or damaged as far as is seen without reading a weight.
    """
    if is_megatron(path):
        return MegatronReader(path, step)
    return HFReader(path)
