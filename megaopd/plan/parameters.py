"""Parameters of a rank: which layers, how many elements, how Megatron lays them out.

The shape of every shard comes from the layout that loads it (`models.mapping`), run on tensors
without memory; so the counts hold for any family, tensor-parallel padding included.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from megaopd.config import LoraConfig, ParallelConfig
from megaopd.config_layouts import check_model, check_ranks
from megaopd.models.arch import ModelArch
from megaopd.models.families import EMBEDDING, OUTPUT_LAYER, param_mappings
from megaopd.models.freeze import is_frozen
from megaopd.models.lora_spec import adapter_mappings
from megaopd.models.mapping import Layout, Partition, padded_vocab_size
from megaopd.parallel.layout import Layout as RankLayout


def expert_tensor(parallel: ParallelConfig) -> int:
    """Tensor-parallel size inside an expert."""
    return parallel.tensor if parallel.expert_tensor is None else parallel.expert_tensor


def num_copies(parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Ranks that hold the same shard of a weight, and of an expert's."""
    stage_ranks = world_size // parallel.pipeline
    dense = stage_ranks // parallel.tensor
    return dense, stage_ranks // (parallel.expert * expert_tensor(parallel))


def check_layout(
    arch: ModelArch, parallel: ParallelConfig, world_size: int, where: str, role: str
) -> None:
    """Checks that a layout can hold a model on `world_size` ranks.

    Args:
        where: the key of the layout, for errors.
        role: `student`, which is trained, or `teacher`.

    Raises:
        ConfigError: the first rule that does not hold, with its arithmetic.
    """
    check_ranks(where, role, parallel, world_size)
    check_model(where, role, parallel, arch, trained=role == "student")


@dataclass(frozen=True)
class Chunk:
    """Layers that a rank holds in one piece: a stage, or a virtual stage of it."""

    layers: tuple[int, ...]
    has_embedding: bool
    has_head: bool


def chunks_of(parallel: ParallelConfig, num_layers: int, stage: int) -> tuple[Chunk, ...]:
    """The chunks of a pipeline rank; chunk c of stage s is the (c x PP + s)-th of the network."""
    pp, num_chunks = parallel.pipeline, parallel.pipeline * parallel.virtual_pipeline
    sizes = RankLayout(parallel, parallel.pipeline).layers_per_stage(num_layers)
    starts = [sum(sizes[:i]) for i in range(num_chunks)]
    return tuple(
        Chunk(
            tuple(range(starts[i], starts[i] + sizes[i])),
            has_embedding=i == 0,
            has_head=i == num_chunks - 1,
        )
        for i in range(stage, num_chunks, pp)
    )


@dataclass(frozen=True)
class Bucket:
    """A run of Megatron's parameter and gradient buffer, sharded over `group_size` ranks.

    Attributes:
        numel: elements, padding included; a multiple of group_size.
    """

    numel: int
    group_size: int

    @property
    def shard(self) -> int:
        """Elements whose optimizer state a rank keeps (padding included)."""
        return self.numel // self.group_size


@dataclass(frozen=True)
class RankParameters:
    """What a rank holds of a model.

    Attributes:
        numel: elements without padding between parameters.
        trainable: the part of them that is trained.
        expert: the part of them that belongs to experts.
        buckets: the trained ones as Megatron's DDP with the distributed optimizer stores them:
            weights of the model's dtype, and gradients beside them in fp32.
    """

    numel: int
    trainable: int
    expert: int
    buckets: tuple[Bucket, ...]

    @property
    def stored(self) -> int:
        """Elements of memory for weights in training: padded buffers and frozen parameters."""
        return self.numel - self.trainable + sum(b.numel for b in self.buckets)

    @property
    def gradients(self) -> int:
        return sum(bucket.numel for bucket in self.buckets)

    @property
    def optimizer_shard(self) -> int:
        """Elements of main weights, and of each moment, that one rank keeps."""
        return sum(bucket.shard for bucket in self.buckets)


@lru_cache(maxsize=64)
def total_parameters(arch: ModelArch) -> int:
    """Parameters of the whole model, as published: without padding, a tied head counted once."""
    return sum(
        math.prod(shape)
        for mapping in param_mappings(arch).values()
        for shape in mapping.layout.hf_shapes()
    )


@lru_cache(maxsize=64)
def active_parameters(arch: ModelArch) -> tuple[float, ...]:
    """Parameters of every decoder layer that one token is multiplied with."""

    def share(part: _Part) -> float:
        return arch.moe.top_k / arch.moe.num_experts if arch.moe and part.expert else 1.0

    return tuple(
        sum(
            count * share(part) * _shard_numel(cast(Hashable, part.layout), 1, 0)
            for part, count in kind.items()
        )
        for kind in _layer_kinds(arch, (), None)
    )


@lru_cache(maxsize=4096)
def rank_parameters(
    arch: ModelArch,
    parallel: ParallelConfig,
    world_size: int,
    stage: int,
    freeze: tuple[str, ...] = (),
    lora: LoraConfig | None = None,
) -> RankParameters:
    """Counts the parameters of a rank of pipeline stage `stage`.

    Megatron's buffers (megatron/core/distributed/param_and_grad_buffer.py): every parameter starts
    at a multiple of 64 elements and every bucket ends at one of lcm(128, ranks that share it);
    without overlap of the reduction there is one bucket a chunk, one more for its experts, and one
    for an embedding that another stage shares.
    """
    tp, rows = parallel.tensor, padded_vocab_size(arch.vocab_size, parallel.tensor)
    etp = expert_tensor(parallel)
    copies, expert_copies = num_copies(parallel, world_size)
    kinds = _layer_kinds(arch, freeze, lora)
    ends = _end_parts(arch, freeze if lora is None else ("*",))
    numel = trainable = expert = 0
    buckets: list[Bucket] = []
    for chunk in chunks_of(parallel, arch.num_layers, stage):
        parts: Counter[_Part] = Counter()
        for layer in chunk.layers:
            parts.update(kinds[layer])
        if chunk.has_embedding:
            parts[ends[EMBEDDING]] += 1
        if chunk.has_head:
            parts[ends["decoder.final_layernorm.weight"]] += 1
            if not arch.tied:
                parts[ends[OUTPUT_LAYER]] += 1
            elif parallel.pipeline > 1:
                parts[ends[EMBEDDING]] += 1  # the last stage's copy of the tied embedding
        padded: dict[str, int] = defaultdict(int)
        for part, count in parts.items():
            size = _shard_numel(cast(Hashable, part.layout), etp if part.expert else tp, rows)
            count //= parallel.expert if part.expert else 1
            numel += count * size
            expert += count * size * part.expert
            if part.frozen:
                continue
            trainable += count * size
            alone = part == ends[EMBEDDING] and arch.tied and parallel.pipeline > 1
            kind = "shared" if alone else ("expert" if part.expert else "dense")
            padded[kind] += count * _up(size, 64)
        for kind, size in padded.items():
            ranks = expert_copies if kind == "expert" else copies
            buckets.append(Bucket(_up(size, math.lcm(ranks, 128)), ranks))
    return RankParameters(numel, trainable, expert, tuple(buckets))


@dataclass(frozen=True)
class _Part:
    """Parameters of one shape and fate; how many there are is counted beside it."""

    layout: Layout
    expert: bool
    frozen: bool


@lru_cache(maxsize=64)
def _layer_kinds(
    arch: ModelArch, freeze: tuple[str, ...], lora: LoraConfig | None
) -> tuple[Counter[_Part], ...]:
    """The parts of every decoder layer; with LoRA adapters these alone are trained."""
    layers: list[Counter[_Part]] = [Counter() for _ in range(arch.num_layers)]
    adapters = {} if lora is None else adapter_mappings(arch, lora)
    for name, mapping in {**param_mappings(arch), **adapters}.items():
        if name.startswith("decoder.layers."):
            trained = name in adapters if lora else not is_frozen(mapping, freeze)
            part = _Part(mapping.layout, mapping.expert is not None, not trained)
            layers[int(name.split(".")[2])][part] += 1
    return tuple(layers)


@lru_cache(maxsize=64)
def _end_parts(arch: ModelArch, freeze: tuple[str, ...]) -> dict[str, _Part]:
    """The parts outside the decoder layers, by name."""
    return {
        name: _Part(mapping.layout, False, is_frozen(mapping, freeze))
        for name, mapping in param_mappings(arch).items()
        if not name.startswith("decoder.layers.")
    }


@lru_cache(maxsize=4096)
def _shard_numel(layout: Hashable, tp_size: int, padded_rows: int) -> int:
    """Elements of a rank's shard: what the layout's own `load` makes of tensors without memory."""
    mapping = cast(Layout, layout)
    shapes = mapping.hf_shapes()

    def read(index: int, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        whole = torch.empty(shapes[index], device="meta")
        whole = whole if rows is None else whole[rows]
        return whole if cols is None else whole[:, cols]

    return mapping.load(read, Partition(0, tp_size, padded_rows)).numel()


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
