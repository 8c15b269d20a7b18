"""Checks the weights of a source, then fills a rank's shards from them.

Everything is checked by name, shape and dtype before a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megaopd.errors import CheckpointError
from megaopd.models.arch import ModelArch
from megaopd.models.families import EMBEDDING, OUTPUT_LAYER, hf_shapes, param_mappings
from megaopd.models.hf_io.header import COPY_AGAIN
from megaopd.models.hf_io.source import WeightSource
from megaopd.models.mapping import Partition, Shape, Vocab

# Where a tied model's directory may repeat the embedding; rows that are compared at a time.
_HEAD, _HEAD_ROWS = "lm_head.weight", 4096

_OTHER_CONFIG = "check that config.json belongs to these weights"


def check_weights(source: WeightSource, arch: ModelArch) -> None:
    """Checks every name, shape and dtype without reading a value.

    Rotary frequency buffers are ignored. A tied model may also store its head if it equals the
    embedding; both are then read.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or no floating-point
            weight; it names the first and says how many more there are.
    """
    expected = hf_shapes(arch)
    found = {name for name in source.names() if not name.endswith("rotary_emb.inv_freq")}
    tied_head = arch.tied and _HEAD in found
    if tied_head:
        expected[_HEAD] = (arch.vocab_size, arch.hidden_size)
    problems = list(_problems(source, arch, expected, found))
    if problems:
        name, what, remedy = problems[0]
        more = f", and {len(problems) - 1} more tensors are wrong" if len(problems) > 1 else ""
        raise CheckpointError(source.where(name), what + more, remedy)
    for name in expected:
        source.dtype(name)  # refuses what is not a floating-point weight
    if tied_head:
        _check_tied_head(source, arch)


def _problems(
    source: WeightSource, arch: ModelArch, expected: dict[str, Shape], found: set[str]
) -> Iterator[tuple[str, str, str]]:
    """Yields (tensor, what is wrong with it, what to do) in the order of the network."""
    for name, shape in expected.items():
        if name not in found:
            yield name, f"missing, though {arch.family} has it", COPY_AGAIN
        elif source.shape(name) != shape:
            yield (
                name,
                f"has shape {list(source.shape(name))}, config.json says {list(shape)}",
                _OTHER_CONFIG,
            )
    for name in sorted(found - expected.keys()):
        unexpected = f"unexpected; {arch.family} of this config.json has no such tensor"
        yield name, unexpected, _OTHER_CONFIG


def _check_tied_head(source: WeightSource, arch: ModelArch) -> None:
    (embedding,) = param_mappings(arch)[EMBEDDING].hf
    for start in range(0, arch.vocab_size, _HEAD_ROWS):
        rows = slice(start, min(start + _HEAD_ROWS, arch.vocab_size))
        differs = (source.read(_HEAD, rows) != source.read(embedding, rows)).any(dim=1)
        if differs.any():
            raise CheckpointError(
                source.where(_HEAD),
                f"row {start + int(differs.int().argmax())} is not the embedding's, though "
                "config.json ties them",
                "set tie_word_embeddings to false in config.json, or remove the tensor",
            )


def load_into(
    params: Mapping[str, Tensor],
    arch: ModelArch,
    source: WeightSource,
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
    check_weights(source, arch)
    mappings = param_mappings(arch)
    for name, param in params.items():
        if name not in mappings:
            raise CheckpointError(
                str(source.path),
                f"holds nothing for the model's parameter {name}",
                f"enter it in megaopd.models.families for {arch.family}",
            )
        mapping = mappings[name]
        place = part if mapping.expert is None else expert_part or part
        shard = mapping.layout.load(source.reader_of(mapping), place)
        if shard.shape != param.shape:
            raise CheckpointError(
                source.where(mapping.hf[0]),
                f"gives rank {place.tp_rank} a shard {list(shard.shape)} for {name}, which is "
                f"{list(param.shape)}",
                "check the model's layout against megaopd.models.families",
            )
        with torch.no_grad():
            param.copy_(shard)


def load_vocab_rows(source: WeightSource, arch: ModelArch, row_start: int, row_stop: int) -> Tensor:
    """Returns rows [row_start, row_stop) of the LM head, in the stored dtype.

    With tied embeddings they are the embedding's; rows past the vocabulary are 0.
    """
    mapping = param_mappings(arch)[EMBEDDING if arch.tied else OUTPUT_LAYER]
    assert isinstance(mapping.layout, Vocab)
    return mapping.layout.load_rows(source.reader_of(mapping), slice(row_start, row_stop))
