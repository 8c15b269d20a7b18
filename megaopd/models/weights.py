"""Moves weights between Hugging Face tensors and the shards of a running model.

Loading: every rank reads the slices it holds. Export: the ranks of the stage that share a parameter
gather its shards, one parameter at a time, and hand it to the others; both use the family's one
mapping table. A rank's model is a list of chunks, one per virtual pipeline stage. Of a model with
LoRA adapters these are the weights with the adapters merged into them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.models.arch import ModelArch
from megaopd.models.build import HiddenGPTModel
from megaopd.models.families import EMBEDDING, OUTPUT_LAYER, param_mappings
from megaopd.models.freeze import check_freeze, is_frozen
from megaopd.models.hf_io import HFReader, load_into
from megaopd.models.hf_io.source import WeightSource
from megaopd.models.lora_layers import ADAPTERS, adapters_of
from megaopd.models.mapping import ParamMapping, Partition, canonical_name
from megaopd.parallel.groups import ParallelGroups

_LAYER = re.compile(r"^decoder\.layers\.\d+\.")


def named_parameters(
    chunks: Sequence[HiddenGPTModel], arch: ModelArch
) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by canonical global name (a tied head has the embedding's), without
    those of LoRA adapters."""
    named = {}
    for chunk in chunks:
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        first_expert = 0
        if arch.moe is not None:
            ep = chunk.pg_collection.ep
            first_expert = ep.rank() * (arch.moe.num_experts // ep.size())
        for name, param in chunk.named_parameters():
            if ADAPTERS in name:
                continue
            name = canonical_name(name, layers, first_expert)
            named[EMBEDDING if arch.tied and name == OUTPUT_LAYER else name] = param
    return named


def load_weights(
    chunks: Sequence[HiddenGPTModel], arch: ModelArch, source: WeightSource | str | Path
) -> None:
    """Fills the model; each rank reads only its slices.

    Args:
        source: open weights of any format, or a Hugging Face directory.

    Raises:
        CheckpointError: a file or tensor is missing, truncated, unexpected or of another shape.
        ConfigError: tensor parallelism does not divide a dimension.
    """
    part, expert_part = partitions(chunks, arch)
    if isinstance(source, str | Path):
        source = HFReader(source)
    load_into(named_parameters(chunks, arch), arch, source, part, expert_part)


def partitions(chunks: Sequence[HiddenGPTModel], arch: ModelArch) -> tuple[Partition, Partition]:
    """This rank's place among those that share a layer's parameter, and an expert's."""
    groups = chunks[0].pg_collection
    part = expert_part = Partition(groups.tp.rank(), groups.tp.size(), chunks[0].vocab_size)
    if arch.moe is not None:
        rank, size = groups.expt_tp.rank(), groups.expt_tp.size()
        expert_part = Partition(rank, size, chunks[0].vocab_size, "parallel.expert_tensor")
    return part, expert_part


class MergedShards(Mapping[str, Tensor]):
    """This rank's shards of all weights by canonical global name: views, and of a weight that has a
    LoRA adapter the sum of the two, made when it is asked for."""

    def __init__(self, chunks: Sequence[HiddenGPTModel], arch: ModelArch) -> None:
        self._params = named_parameters(chunks, arch)
        self._adapters = adapters_of(chunks)

    def __getitem__(self, name: str) -> Tensor:
        param = self._params[name]
        return self._adapters[name].merged() if name in self._adapters else param.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def freeze(chunks: Sequence[HiddenGPTModel], arch: ModelArch, patterns: tuple[str, ...]) -> None:
    """Takes the parameters whose Hugging Face names match a pattern out of training.

    Raises:
        ConfigError: see `check_freeze`.
    """
    check_freeze(arch, patterns)
    mappings = param_mappings(arch)
    for name, param in named_parameters(chunks, arch).items():
        if is_frozen(mappings[name], patterns):
            param.requires_grad_(False)


def export_weights(
    chunks: Sequence[HiddenGPTModel],
    arch: ModelArch,
    groups: ParallelGroups,
    frozen: tuple[str, ...] = (),
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, full tensor on this rank's device) on every rank; collective.

    Only one parameter exists in full at a time.

    Args:
        frozen: patterns of tensors to leave out, as in `freeze`.
        only: canonical names of the parameters to export; None exports all.
    """
    wanted = {
        name: mapping
        for name, mapping in param_mappings(arch).items()
        if (only is None or name in only) and not is_frozen(mapping, frozen)
    }
    yield from gathered(wanted, MergedShards(chunks, arch), chunks, arch, groups)


def gathered(
    mappings: Mapping[str, ParamMapping],
    shards: Mapping[str, Tensor],
    chunks: Sequence[HiddenGPTModel],
    arch: ModelArch,
    groups: ParallelGroups,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, full tensor) for every mapping in order, on every rank.

    Args:
        mappings: of what is wanted, the same on all ranks.
        shards: what this rank holds, by canonical name.
    """
    stages = _stages(shards, groups)
    dtype = chunks[0].config.params_dtype
    for name, mapping in mappings.items():
        stage, owner = stages[_place(name)], 0
        if mapping.expert is not None:
            assert arch.moe is not None
            owner = mapping.expert // (arch.moe.num_experts // groups.ep.size())
        if name in shards and stage == groups.pp.rank():
            sharers = groups.tp if mapping.expert is None else groups.expt_tp
            tensors = mapping.layout.export(_gather_shards(shards[name], sharers))
        else:
            tensors = tuple(
                torch.empty(shape, dtype=dtype, device=groups.device)
                for shape in mapping.layout.hf_shapes()
            )
        for hf_name, tensor in zip(mapping.hf, tensors, strict=True):
            # First every rank of the stage gets it, then every stage.
            if mapping.expert is not None and stage == groups.pp.rank():
                tensor = _broadcast(tensor, groups.ep, owner)
            yield hf_name, _broadcast(tensor, groups.pp, stage)


def _gather_shards(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def _broadcast(tensor: Tensor, group: dist.ProcessGroup, source: int) -> Tensor:
    if group.size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=group, group_src=source)
    return tensor


def _place(name: str) -> str:
    """What lies on one pipeline stage as a whole: the parameter's layer, or the parameter."""
    layer = _LAYER.match(name)
    return layer[0] if layer else name


def _stages(params: Collection[str], groups: ParallelGroups) -> dict[str, int]:
    """`_place` of this rank's parameters and others' -> the first pipeline stage that holds it.

    Expert-parallel ranks hold different experts, but the same layers.
    """
    mine = sorted({_place(name) for name in params})
    held = [mine] * groups.pp.size()
    if groups.pp.size() > 1:
        dist.all_gather_object(held, mine, group=groups.pp)
    stages: dict[str, int] = {}
    for stage, places in enumerate(held):
        for place in places:
            stages.setdefault(place, stage)
    return stages
