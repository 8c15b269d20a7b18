"""Megatron checkpoint -> Hugging Face directory, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megaopd.checkpoint.reader import MegatronReader
from megaopd.convert.finite import check_finite
from megaopd.convert.output import check_apart, write_together
from megaopd.convert.progress import Progress
from megaopd.convert.ranks import Ranks
from megaopd.models.arch import read_arch
from megaopd.models.families import hf_shapes
from megaopd.models.hf_io import check_weights
from megaopd.models.hf_io.companions import companion_bytes
from megaopd.models.hf_io.writer import (
    MAX_SHARD_BYTES,
    ShardFile,
    complete_directory,
    is_hf_directory,
    nbytes,
    plan_shards,
)
from megaopd.storage.staged import StagedDirectory
from megaopd.storage.steps import hf_directory


class ToHF:
    """The export of one checkpoint, planned from its metadata.

    Args:
        src: Megatron checkpoint: the directory of all steps or of one.
        step: which one; None is the newest complete step.
        dtype: of all tensors; None keeps what is stored.
        max_shard_bytes: a safetensors file is closed before it exceeds this.

    Attributes:
        shards: the files to write.

    Raises:
        CheckpointError: the checkpoint is incomplete, or not of the model that its hf/config.json
            describes.
    """

    def __init__(
        self,
        src: str | Path,
        step: int | None = None,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.dtype = dtype
        self.source = MegatronReader(src, step)
        self.companions = hf_directory(self.source.path)
        arch = read_arch(self.companions)
        check_weights(self.source, arch)
        shapes = hf_shapes(arch)
        dtypes = {name: dtype or self.source.dtype(name) for name in shapes}
        self.shards = plan_shards(shapes, dtypes, max_shard_bytes)
        self.num_bytes = sum(shard.nbytes for shard in self.shards)

    def rows(self) -> Iterator[tuple[str, str, str, int, str]]:
        """Yields (name, shape, dtype, bytes, file) of every tensor."""
        for shard in self.shards:
            for name, (dtype, shape) in shard.tensors.items():
                shown = str(dtype).removeprefix("torch.")
                yield name, str(list(shape)), shown, nbytes(dtype, shape), shard.file

    def run(self, dst: str | Path, *, overwrite: bool = False, ranks: Ranks | None = None) -> Path:
        """Writes the directory; collective over the ranks, which share out its files.

        Returns:
            `dst`.

        Raises:
            CheckpointError: a file of the checkpoint does not match its manifest, or a value is
                not finite.
            ConfigError: `dst` exists.
            EnvironmentFault: the disk has no room, or another rank has ended.
        """
        ranks = ranks or Ranks()
        dst = Path(dst)
        with ranks.together():
            check_apart(self.source.path, dst)
        staged = StagedDirectory(
            dst,
            overwrite=overwrite,
            needed_bytes=self.num_bytes + companion_bytes(self.companions),
            replaceable=is_hf_directory,
        )

        def finish(parts: list[dict[str, str]]) -> None:
            for digests in parts:
                for file, digest in digests.items():
                    staged.digest(file, digest)
            complete_directory(staged.path, self.companions, self.shards, self.dtype)

        write_together(
            ranks, self.source.path, staged, lambda path: self._write(path, ranks), finish
        )
        return dst

    def _write(self, path: Path, ranks: Ranks) -> dict[str, str]:
        """Writes this rank's files; returns their SHA-256 by name."""
        mine = ranks.share(self.shards, lambda shard: shard.nbytes)
        digests = {}
        with Progress("writing", sum(shard.nbytes for shard in mine), ranks) as progress:
            for shard in mine:
                with ShardFile(path, shard) as file:
                    for name, (dtype, _) in shard.tensors.items():
                        tensor = check_finite(self.source.read(name), self.source.where(name))
                        if tensor.dtype != dtype:
                            # A finite fp32 value may lie beyond the narrower dtype's range.
                            tensor = check_finite(tensor.to(dtype), f"{name} as {dtype}")
                        file.add(name, tensor)
                        progress(tensor.nbytes)
                digests[shard.file] = file.hexdigest()
        return digests


def convert_to_hf(
    src: str | Path,
    dst: str | Path,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> Path:
    """Plans and runs `ToHF`; collective over the ranks."""
    ranks = ranks or Ranks()
    with ranks.together():
        conversion = ToHF(src, step, dtype, max_shard_bytes)
    return conversion.run(dst, overwrite=overwrite, ranks=ranks)
