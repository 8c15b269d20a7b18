"""How one Megatron-Core parameter corresponds to Hugging Face tensors, in both directions.

A `ParamMapping` joins a parameter's canonical global name, its Hugging Face names and a `Layout`.
The layout says which slices of the Hugging Face tensors a tensor-parallel rank holds and how the
shards of all ranks become those tensors again; nothing is computed, so both ways are exact to the
bit. Each expert has parameters of its own, whatever module computes them, shared out by the
tensor parallelism inside experts. Loading, export and weight sync all read this one
description. Knows torch, not Megatron, files or families.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megaopd.errors import ConfigError

Shape = tuple[int, ...]

_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..+)$")
# TransformerEngine keeps the norm before a linear layer inside that layer.
_FUSED_NORMS = {
    ".self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
    ".mlp.linear_fc1.layer_norm_weight": ".pre_mlp_layernorm.weight",
}
# Experts one after another (the local spec), or grouped in one module (TransformerEngine).
_EXPERTS = (
    re.compile(r"^\.mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>\w+)\.weight$"),
    re.compile(r"^\.mlp\.experts\.(?P<linear>\w+)\.weight(?P<expert>\d+)$"),
)


def canonical_name(name: str, layers: Sequence[int], first_expert: int = 0) -> str:
    """Returns the canonical global name of a `GPTModel` parameter.

    Args:
        name: as `named_parameters` gives it: the layer's index is local to the (virtual) pipeline
            stage, an expert's to the expert-parallel rank, and norms and experts have
            TransformerEngine's or the local spec's names.
        layers: global indices of the stage's layers.
        first_expert: global index of the rank's first expert.
    """
    match = _LAYER.match(name)
    if match is None:
        return name
    prefix, index, rest = match.groups()
    for pattern in _EXPERTS:
        if expert := pattern.match(rest):
            number = int(expert["expert"]) + first_expert
            rest = f".mlp.experts.{number}.{expert['linear']}.weight"
            break
    return f"{prefix}{layers[int(index)]}{_FUSED_NORMS.get(rest, rest)}"


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and head over all ranks: the next multiple of 128 x tp_size."""
    multiple = 128 * tp_size
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class Partition:
    """One rank's place among the tensor-parallel ranks that share a parameter.

    Attributes:
        padded_vocab_size: rows of embedding and head over all ranks, padding included.
        field: the configuration's name of tp_size, for an error message.
    """

    tp_rank: int
    tp_size: int
    padded_vocab_size: int
    field: str = "parallel.tensor"

    def share(self, size: int, what: str) -> slice:
        """Returns this rank's equal part of `size`.

        Raises:
            ConfigError: the ranks do not divide `size`.
        """
        if size % self.tp_size:
            raise ConfigError(
                self.field,
                f"{self.tp_size} ranks do not divide {size} {what}",
                "choose a tensor-parallel size that does",
            )
        part = size // self.tp_size
        return slice(self.tp_rank * part, (self.tp_rank + 1) * part)


class Read(Protocol):
    """Reads a slice of the mapping's `index`-th Hugging Face tensor; None takes the whole dim."""

    def __call__(
        self, index: int, rows: slice | None = None, cols: slice | None = None
    ) -> Tensor: ...


class Layout(Protocol):
    """The correspondence between Hugging Face tensors and the shards of one parameter."""

    def hf_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order of `ParamMapping.hf`."""
        ...

    def load(self, read: Read, part: Partition) -> Tensor:
        """Returns the rank's shard, asking `read` for nothing but what the rank holds.

        The dtype is the Hugging Face tensors'; the shard may share memory with what was read.
        """
        ...

    def export(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Returns the Hugging Face tensors from the shards of all ranks, in rank order.

        A result may share memory with a shard.
        """
        ...


@dataclass(frozen=True)
class ParamMapping:
    """One parameter and its Hugging Face tensors.

    Attributes:
        megatron: canonical global name: the local spec's names, the layer's global index.
        hf: names of the Hugging Face tensors, in the layout's order.
        expert: global index of the expert it belongs to; None is no expert's.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    expert: int | None = None


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every rank."""

    shape: Shape

    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    def load(self, read: Read, part: Partition) -> Tensor:
        return read(0)

    def export(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True)
class ColumnParallel:
    """A [rows, cols] weight whose rows (output features) the ranks share."""

    rows: int
    cols: int

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.rows, self.cols),)

    def load(self, read: Read, part: Partition) -> Tensor:
        return read(0, rows=part.share(self.rows, "output features"))

    def export(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards)),)


@dataclass(frozen=True)
class RowParallel:
    """A [rows, cols] weight whose columns (input features) the ranks share."""

    rows: int
    cols: int

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.rows, self.cols),)

    def load(self, read: Read, part: Partition) -> Tensor:
        return read(0, cols=part.share(self.cols, "input features"))

    def export(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards), dim=1),)


@dataclass(frozen=True)
class QKV:
    """Query, key and value projections in one tensor, ordered by KV group.

    Megatron's rows are, group after group, the group's query heads, its key head, its value head. A
    rank holds whole groups, so its part of each Hugging Face tensor is one run of rows.

    Attributes:
        cols: input features; None for the biases, which are 1-D.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    cols: int | None

    @property
    def group_rows(self) -> tuple[int, int, int]:
        """Rows of one group in the query, key and value tensor."""
        return self.num_heads // self.num_kv_heads * self.head_dim, self.head_dim, self.head_dim

    def hf_shapes(self) -> tuple[Shape, ...]:
        tail = () if self.cols is None else (self.cols,)
        return tuple((self.num_kv_heads * rows, *tail) for rows in self.group_rows)

    def load(self, read: Read, part: Partition) -> Tensor:
        groups = part.share(self.num_kv_heads, "KV heads")
        by_group = []
        for index, rows in enumerate(self.group_rows):
            run = read(index, rows=slice(groups.start * rows, groups.stop * rows))
            by_group.append(run.unflatten(0, (-1, rows)))
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def export(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        by_group = torch.cat(list(shards)).unflatten(0, (self.num_kv_heads, -1))
        return tuple(x.flatten(0, 1) for x in by_group.split(self.group_rows, dim=1))


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projections in one tensor: the rank's gate rows, then its up rows.

    Attributes:
        fused: Hugging Face has one tensor too: all gate rows, then all up rows.
    """

    ffn_size: int
    cols: int
    fused: bool = False

    def hf_shapes(self) -> tuple[Shape, ...]:
        if self.fused:
            return ((2 * self.ffn_size, self.cols),)
        return ((self.ffn_size, self.cols),) * 2

    def load(self, read: Read, part: Partition) -> Tensor:
        gate = part.share(self.ffn_size, "feed-forward features")
        if self.fused:
            up = slice(self.ffn_size + gate.start, self.ffn_size + gate.stop)
            return torch.cat([read(0, rows=gate), read(0, rows=up)])
        return torch.cat([read(0, rows=gate), read(1, rows=gate)])

    def export(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        if self.fused:
            return (torch.cat(gates + ups),)
        return torch.cat(gates), torch.cat(ups)


@dataclass(frozen=True)
class Vocab:
    """Embedding or head: rows shared out over the ranks after padding; padding rows are 0."""

    vocab_size: int
    hidden_size: int

    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.vocab_size, self.hidden_size),)

    def load(self, read: Read, part: Partition) -> Tensor:
        return self.load_rows(read, part.share(part.padded_vocab_size, "padded vocabulary rows"))

    def load_rows(self, read: Read, rows: slice) -> Tensor:
        """Returns rows [rows.start, rows.stop) in memory of their own; past the vocabulary 0."""
        real = slice(min(rows.start, self.vocab_size), min(rows.stop, self.vocab_size))
        found = read(0, rows=real)
        out = found.new_empty(rows.stop - rows.start, self.hidden_size)
        out[: len(found)] = found
        out[len(found) :] = 0
        return out

    def export(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards))[: self.vocab_size],)
