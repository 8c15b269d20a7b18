"""Hugging Face directory -> Megatron checkpoint, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaopd.checkpoint.keys import StoredParam, stored_params
from megaopd.checkpoint.torch_dist import ChunkFile, WrittenChunk, write_metadata
from megaopd.convert.finite import check_finite, finite_reader
from megaopd.convert.output import check_apart, write_together
from megaopd.convert.progress import Progress
from megaopd.convert.ranks import Ranks
from megaopd.errors import CheckpointError, ConfigError
from megaopd.models.arch import ModelArch, read_arch
from megaopd.models.families import param_mappings
from megaopd.models.hf_io import HFReader, check_weights
from megaopd.models.hf_io.companions import companion_bytes, copy_companions, set_config_dtype
from megaopd.models.hf_io.writer import nbytes
from megaopd.models.mapping import ParamMapping, Partition, padded_vocab_size
from megaopd.storage.manifest import MANIFEST
from megaopd.storage.staged import StagedDirectory
from megaopd.storage.steps import POINTER, step_directory, write_pointer

# The step of a model that has not been trained.
STEP = 0

# The size of a data file, about: files are verified side by side.
FILE_BYTES = 1_000_000_000

# Of .metadata for each parameter, and of the small files; more than they take.
_METADATA_BYTES = 2_000


@dataclass(frozen=True)
class Item:
    """A parameter: what it is made of, and where in the checkpoint it goes."""

    mapping: ParamMapping
    stored: StoredParam
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.stored.shape)


class ToMegatron:
    """The conversion of one directory, planned from its headers.

    Args:
        src: Hugging Face directory.
        dtype: of all weights; None keeps what they have.

    Attributes:
        items: every parameter, in the order of the network.

    Raises:
        CheckpointError: `src` is not a sound model, or its dtypes cannot be kept.
        ConfigError: its architecture is not supported.
    """

    def __init__(self, src: str | Path, dtype: torch.dtype | None = None) -> None:
        self.src, self.dtype = Path(src), dtype
        self.arch: ModelArch = read_arch(self.src)
        self.source = HFReader(self.src)
        check_weights(self.source, self.arch)
        stored = stored_params(self.arch)
        self.items = [
            Item(mapping, stored[name], self._dtype_of(mapping))
            for name, mapping in param_mappings(self.arch).items()
        ]
        self._check_dtypes()
        self.num_bytes = sum(item.nbytes for item in self.items)

    def _dtype_of(self, mapping: ParamMapping) -> torch.dtype:
        return self.dtype or self.source.dtype(mapping.hf[0])

    def _check_dtypes(self) -> None:
        """What becomes one tensor of the checkpoint has one dtype there."""
        if self.dtype is not None:
            return
        first: dict[str, str] = {}
        for item in self.items:
            for name in item.mapping.hf:
                other = first.setdefault(item.stored.key, name)
                found, due = self.source.dtype(name), self.source.dtype(other)
                if found != due:
                    raise CheckpointError(
                        self.source.where(name),
                        f"is {_shown(found)} while {other}, which Megatron stores in the same "
                        f"tensor, is {_shown(due)}",
                        "choose one dtype for all with --dtype bf16 or --dtype fp32",
                    )

    def rows(self) -> Iterator[tuple[str, str, str, int, str]]:
        """Yields (name, shape, dtype, bytes, what it is made of) of every parameter."""
        for item in self.items:
            place = "" if item.stored.shape == item.stored.global_shape else f"{item.stored.offset}"
            yield (
                f"{item.stored.key}{place}",
                str(list(item.stored.shape)),
                _shown(item.dtype),
                item.nbytes,
                " ".join(item.mapping.hf),
            )

    def run(self, dst: str | Path, *, overwrite: bool = False, ranks: Ranks | None = None) -> Path:
        """Writes the checkpoint; collective over the ranks.

        Returns:
            The step's directory.

        Raises:
            CheckpointError: a file of `src` does not match its manifest, or a value is not finite.
            ConfigError: `dst` exists.
            EnvironmentFault: the disk has no room, or another rank has ended.
        """
        ranks = ranks or Ranks()
        root = Path(dst)
        with ranks.together():
            check_apart(self.src, root)
            if ranks.is_main:
                _check_root(root, overwrite)
        staged = StagedDirectory(
            step_directory(root, STEP),
            overwrite=overwrite,
            needed_bytes=self.num_bytes
            + companion_bytes(self.src)
            + _METADATA_BYTES * len(self.items),
            replaceable=lambda path: (path / MANIFEST).is_file(),
        )

        def finish(parts: list[tuple[list[WrittenChunk], dict[str, str]]]) -> None:
            write_metadata(staged.path, [chunk for chunks, _ in parts for chunk in chunks])
            for _, digests in parts:
                for file, digest in digests.items():
                    staged.digest(file, digest)
            (staged.path / "hf").mkdir()
            copy_companions(self.src, staged.path / "hf")
            if self.dtype is not None:
                set_config_dtype(staged.path / "hf", self.dtype)
            # Before the directory has its name: Megatron's pointer alone is no checkpoint.
            write_pointer(root, STEP)

        write_together(
            ranks,
            self.src,
            staged,
            lambda path: self._write(path, ranks),
            finish,
            undo=lambda: _remove_empty_root(root),
        )
        return step_directory(root, STEP)

    def _write(self, path: Path, ranks: Ranks) -> tuple[list[WrittenChunk], dict[str, str]]:
        """Writes this rank's files; returns their chunks, and their SHA-256 by name."""
        mine = ranks.share(self.items, lambda item: item.nbytes)
        chunks: list[WrittenChunk] = []
        digests: dict[str, str] = {}
        with Progress("writing", sum(item.nbytes for item in mine), ranks) as progress:
            for number, items in enumerate(_by_file(mine)):
                with ChunkFile(path, ranks.rank, number) as file:
                    for item in items:
                        file.add(item.stored, self._load(item))
                        progress(item.nbytes)
                chunks += file.chunks
                digests[file.name] = file.hexdigest()
        return chunks, digests

    def _load(self, item: Item) -> Tensor:
        """The whole parameter as Megatron has it."""
        mapping = item.mapping
        whole = Partition(0, 1, padded_vocab_size(self.arch.vocab_size, 1))
        tensor = mapping.layout.load(finite_reader(self.source, mapping), whole)
        if tensor.dtype == item.dtype:
            return tensor
        # A finite fp32 value may lie beyond the narrower dtype's range.
        where = f"{self.source.where(mapping.hf[0])} as {_shown(item.dtype)}"
        return check_finite(tensor.to(item.dtype), where)


def _by_file(items: list[Item]) -> Iterator[list[Item]]:
    """Shares items out over files of `FILE_BYTES` or little more, in their order."""
    content: list[Item] = []
    size = 0
    for item in items:
        content.append(item)
        size += item.nbytes
        if size >= FILE_BYTES:
            yield content
            content, size = [], 0
    if content:
        yield content


def convert_to_megatron(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> Path:
    """Plans and runs `ToMegatron`; collective over the ranks.

    Returns:
        The step's directory, `dst`/iter_0000000.
    """
    ranks = ranks or Ranks()
    with ranks.together():
        conversion = ToMegatron(src, dtype)
    return conversion.run(dst, overwrite=overwrite, ranks=ranks)


def _check_root(root: Path, overwrite: bool) -> None:
    """A directory of checkpoints is replaced only if it holds nothing but a converted model."""
    if not root.is_dir():
        if root.exists():
            raise ConfigError(str(root), "is not a directory", "choose another destination")
        return
    own = {step_directory(root, STEP).name, POINTER}
    # Hidden ones are leftovers of interrupted conversions.
    others = sorted(e.name for e in root.iterdir() if e.name not in own and e.name[0] != ".")
    if others:
        raise ConfigError(str(root), f"exists and holds {others[0]}", "choose another destination")
    if step_directory(root, STEP).exists() and not overwrite:
        raise ConfigError(
            str(root), "holds a converted model", "choose another destination, or --overwrite"
        )


def _remove_empty_root(root: Path) -> None:
    """Removes the pointer to a step that is not there, and a directory that is then empty."""
    if root.is_dir() and {entry.name for entry in root.iterdir()} <= {POINTER}:
        (root / POINTER).unlink(missing_ok=True)
        root.rmdir()


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
