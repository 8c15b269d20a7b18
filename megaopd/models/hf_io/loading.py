"""Checks the weights of a directory, then fills a rank's shards from them.

Everything is checked by name, shape and dtype, from the files' headers, before a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megaopd.errors import CheckpointError
from megaopd.models.arch import ModelArch
from megaopd.models.families import EMBEDDING, OUTPUT_LAYER, hf_shapes, param_mappings
from megaopd.models.hf_io.reader import COPY_AGAIN, HFReader
from megaopd.models.mapping import Partition, Vocab

# Where a tied model's directory may repeat the embedding; rows that are compared at a time.
_HEAD, _HEAD_ROWS = "lm_head.weight", 4096


def check_weights(reader: HFReader, arch: ModelArch) -> None:
    """Checks every file, name, shape and dtype, reading headers only.

    Rotary frequency buffers are ignored. A tied model may also store its head if it equals the
    embedding; both are then read.

    Raises:
        CheckpointError: a file or tensor is missing, truncated, unexpected or of another shape.
    """
    expected = hf_shapes(arch)
    found = {name for name in reader.names() if not name.endswith("rotary_emb.inv_freq")}
    for name in expected:
        if name not in found:
            raise CheckpointError(
                reader.where(name), f"missing, though {arch.family} has it", COPY_AGAIN
            )
    tied_head = arch.tied and _HEAD in found
    for name in sorted(found - expected.keys() - ({_HEAD} if tied_head else set())):
        raise CheckpointError(
            reader.where(name),
            f"unexpected; {arch.family} of this config.json has no such tensor",
            "check that config.json belongs to these weights",
        )
    if tied_head:
        expected[_HEAD] = (arch.vocab_size, arch.hidden_size)
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise CheckpointError(
                reader.where(name),
                f"has shape {list(reader.shape(name))}, config.json says {list(shape)}",
                "check that config.json belongs to these weights",
            )
        reader.dtype(name)  # refuses what is not a floating-point weight
    if tied_head:
        _check_tied_head(reader, arch)


def _check_tied_head(reader: HFReader, arch: ModelArch) -> None:
    (embedding,) = param_mappings(arch)[EMBEDDING].hf
    for start in range(0, arch.vocab_size, _HEAD_ROWS):
        rows = slice(start, min(start + _HEAD_ROWS, arch.vocab_size))
        differs = (reader.read(_HEAD, rows) != reader.read(embedding, rows)).any(dim=1)
        if differs.any():
            raise CheckpointError(
                reader.where(_HEAD),
                f"row {start + int(differs.int().argmax())} is not the embedding's, though "
                "config.json ties them",
                "set tie_word_embeddings to false in config.json, or remove the tensor",
            )


def load_into(
    params: Mapping[str, Tensor],
    arch: ModelArch,
    reader: HFReader,
    part: Partition,
    expert_part: Partition | None = None,
) -> None:
    """Fills this rank's parameters in place, casting to their dtype, after `check_weights`.

    Args:
        params: canonical global name -> local shard; any subset of the model, such as one stage's
            or one expert-parallel rank's.
        part: the rank's place among its tensor-parallel ranks.
        expert_part: its place among those that share an expert; None is `part`.

    Raises:
        CheckpointError: see `check_weights`; or a parameter has no mapping or another shape.
        ConfigError: the ranks do not divide a dimension.
    """
    check_weights(reader, arch)
    mappings = param_mappings(arch)
    for name, param in params.items():
        if name not in mappings:
            raise CheckpointError(
                str(reader.path),
                f"holds nothing for the model's parameter {name}",
                f"enter it in megaopd.models.families for {arch.family}",
            )
        mapping = mappings[name]
        place = part if mapping.expert is None else expert_part or part
        shard = mapping.layout.load(reader.reader_of(mapping), place)
        if shard.shape != param.shape:
            raise CheckpointError(
                reader.where(mapping.hf[0]),
                f"gives rank {place.tp_rank} a shard {list(shard.shape)} for {name}, which is "
                f"{list(param.shape)}",
                "check the model's layout against megaopd.models.families",
            )
        with torch.no_grad():
            param.copy_(shard)


def load_vocab_rows(reader: HFReader, arch: ModelArch, row_start: int, row_stop: int) -> Tensor:
    """Returns rows [row_start, row_stop) of the LM head, in the stored dtype.

    With tied embeddings they are the embedding's; rows past the vocabulary are 0.
    """
    mapping = param_mappings(arch)[EMBEDDING if arch.tied else OUTPUT_LAYER]
    assert isinstance(mapping.layout, Vocab)
    return mapping.layout.load_rows(reader.reader_of(mapping), slice(row_start, row_stop))
