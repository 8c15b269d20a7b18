"""From a path to the weights of a running model, whichever format the path has; collective."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megaopd.checkpoint.opening import open_weights
from megaopd.models import weights
from megaopd.models.arch import ModelArch
from megaopd.models.build import HiddenGPTModel
from megaopd.parallel.agreement import agreed
from megaopd.storage.manifest import MANIFEST, check_listing, read_manifest, verify_manifest


def verify_together(directory: Path) -> None:
    """Compares a directory with its manifest, its files shared out over all ranks; collective.

    The directory is one that all ranks see. A Hugging Face directory may have no manifest; then
    there is nothing to compare with.

    Raises:
        CheckpointError: on every rank alike, what one of them found first.
    """
    with agreed():
        if (directory / MANIFEST).exists():
            listed = read_manifest(directory)
            check_listing(directory, listed)
            mine = _share(directory, sorted(listed), dist.get_rank(), dist.get_world_size())
            verify_manifest(directory, mine)


def _share(directory: Path, names: list[str], rank: int, world_size: int) -> list[str]:
    """This rank's files: the largest first, each to the rank with the fewest bytes so far."""
    sizes = {name: (directory / name).stat().st_size for name in names}
    loads = [0] * world_size
    mine = []
    for name in sorted(names, key=lambda name: (-sizes[name], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[name]
        if lightest == rank:
            mine.append(name)
    return mine


def load_model(chunks: Sequence[HiddenGPTModel], arch: ModelArch, path: str | Path) -> None:
    """Fills a model from either format, after every file has been verified; collective.

    Each rank reads only its slices. Padding rows of the vocabulary are zero whatever the
    checkpoint has in them.

    Raises:
        CheckpointError: a file is not what was written; or see `load_weights`.
        ConfigError: tensor parallelism does not divide a dimension.
    """
    with agreed():
        source = open_weights(path)
    verify_together(source.path)
    weights.load_weights(chunks, arch, source)
