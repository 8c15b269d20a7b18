"""Megatron checkpoints of tiny models, without Megatron: any chunks under any keys."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from megaopd.checkpoint.chunks import ChunkReader
from megaopd.checkpoint.keys import StoredParam, stored_params
from megaopd.checkpoint.metadata import read_metadata
from megaopd.checkpoint.torch_dist import ChunkFile, write_metadata
from megaopd.models.arch import read_arch
from megaopd.models.families import param_mappings
from megaopd.models.hf_io import HFReader
from megaopd.models.hf_io.companions import copy_companions
from megaopd.models.mapping import Partition, Shape, padded_vocab_size
from megaopd.storage.manifest import write_manifest
from megaopd.storage.steps import step_directory

# Splits a block into (offset, shape) pairs, as the ranks of a layout might.
Split = Callable[[Shape], list[tuple[Shape, Shape]]]
Params = dict[str, tuple[StoredParam, Tensor]]

# Of the tests' models: neither a multiple of what Megatron pads to nor of two.
VOCAB_SIZE = 301


def params_of(hf: Path, vocab_rows: int | None = None) -> Params:
    """Every parameter of a Hugging Face directory, with its place; embedding and head padded."""
    arch, reader = read_arch(hf), HFReader(hf)
    whole = Partition(0, 1, vocab_rows or padded_vocab_size(arch.vocab_size, 1))
    return {
        name: (stored, param_mappings(arch)[name].layout.load(reader.reader_of(m), whole))
        for (name, stored), m in zip(
            stored_params(arch).items(), param_mappings(arch).values(), strict=True
        )
    }


def in_one(shape: Shape) -> list[tuple[Shape, Shape]]:
    return [((0,) * len(shape), shape)]


def at_random(seed: int) -> Split:
    """Cuts every dim in up to three parts."""
    rng = random.Random(seed)

    def split(shape: Shape) -> list[tuple[Shape, Shape]]:
        blocks: list[tuple[Shape, Shape]] = [((), ())]
        for size in shape:
            cuts = sorted({0, size, *(rng.randrange(size + 1) for _ in range(2))})
            parts = [(a, b - a) for a, b in pairwise(cuts)]
            blocks = [((*o, a), (*s, n)) for o, s in blocks for a, n in parts]
        rng.shuffle(blocks)
        return blocks

    return split


def write_checkpoint(root: Path, hf: Path, params: Params, split: Split = in_one) -> Path:
    """Writes a step from two 'ranks'; returns its directory."""
    step = step_directory(root, 0)
    step.mkdir(parents=True)
    files = [ChunkFile(step, rank, 0) for rank in range(2)]
    for index, (place, tensor) in enumerate(params.values()):
        shape = place.shape[: -tensor.dim()] + tuple(tensor.shape)
        sizes = place.global_shape[: place.num_axes] + tuple(tensor.shape)
        for n, (offset, size) in enumerate(split(tuple(tensor.shape))):
            block = tensor[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
            axes, ones = place.axes, shape[: place.num_axes]
            part = StoredParam(place.key, sizes, (*axes, *offset), (*ones, *size))
            files[(index + n) % 2].add(part, block)
    for file in files:
        file.__exit__(None)
    write_metadata(step, [chunk for file in files for chunk in file.chunks])
    (step / "hf").mkdir()
    copy_companions(hf, step / "hf")
    write_manifest(step)
    return step


def stored_tensors(directory: Path, vocab_size: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint by key, whole: no element is missing or there twice. Of a
    vocabulary's padding nothing remains; it is 0."""
    reader = ChunkReader(directory)
    found = {}
    for key, tensor in read_metadata(directory).items():
        whole = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)
        for chunk in tensor.chunks:
            at = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
            assert whole[at].isnan().all(), f"{key}: stored twice"
            reader.read(chunk, tensor.dtype, (0,) * len(chunk.shape), whole[at])
        assert not whole.isnan().any(), f"{key}: holes"
        if "embedding" in key or "output_layer" in key:
            assert not whole[vocab_size:].any()
            whole = whole[:vocab_size]
        found[key] = whole
    return found
