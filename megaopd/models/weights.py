"""Moves weights between Hugging Face tensors and the shards of a running model.

Loading: every rank reads the slices it holds. Export: the tensor-parallel ranks of the stage that
owns a parameter gather its shards, one parameter at a time; both use the family's one mapping
table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.models.arch import ModelArch
from megaopd.models.build import HiddenGPTModel
from megaopd.models.families import param_mappings
from megaopd.models.freeze import check_freeze, is_frozen
from megaopd.models.hf_io import HFReader, load_into
from megaopd.models.mapping import canonical_name
from megaopd.parallel.groups import ParallelGroups

_TIED_HEAD, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


def named_parameters(model: HiddenGPTModel, arch: ModelArch) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by canonical global name (a tied head has the embedding's)."""
    layers = model.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    named = {}
    for name, param in model.named_parameters():
        name = canonical_name(name, offset)
        named[_EMBEDDING if arch.tied and name == _TIED_HEAD else name] = param
    return named


def load_weights(model: HiddenGPTModel, arch: ModelArch, path: str | Path) -> None:
    """Fills the model from a Hugging Face directory; each rank reads only its slices.

    Raises:
        CheckpointError: a file or tensor is missing, truncated, unexpected or of another shape.
    """
    tp = model.pg_collection.tp
    with torch.no_grad():
        load_into(
            named_parameters(model, arch),
            arch,
            HFReader(path),
            tp.rank(),
            tp.size(),
            padded_vocab_size=model.vocab_size,
        )


def freeze(model: HiddenGPTModel, arch: ModelArch, patterns: tuple[str, ...]) -> None:
    """Takes the parameters whose Hugging Face names match a pattern out of training.

    Raises:
        ConfigError: see `check_freeze`.
    """
    check_freeze(arch, patterns)
    mappings = param_mappings(arch)
    for name, param in named_parameters(model, arch).items():
        if is_frozen(mappings[name], patterns):
            param.requires_grad_(False)


def export_weights(
    model: HiddenGPTModel,
    arch: ModelArch,
    groups: ParallelGroups,
    frozen: tuple[str, ...] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, full tensor on this rank's device) on every rank; collective.

    Only one parameter exists in full at a time.

    Args:
        frozen: patterns of tensors to leave out, as in `freeze`.
    """
    params = named_parameters(model, arch)
    owners = _owning_stages(params, groups)
    for name, mapping in param_mappings(arch).items():
        if is_frozen(mapping, frozen):
            continue
        owner = owners[name]
        if groups.pp.rank() == owner:
            tensors = mapping.layout.export(_gather_shards(params[name].detach(), groups.tp))
        else:
            tensors = tuple(
                torch.empty(shape, dtype=model.config.params_dtype, device=groups.device)
                for shape in mapping.layout.hf_shapes()
            )
        for hf_name, tensor in zip(mapping.hf, tensors, strict=True):
            if groups.pp.size() > 1:
                tensor = tensor.contiguous()
                dist.broadcast(tensor, group=groups.pp, group_src=owner)
            yield hf_name, tensor


def _gather_shards(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def _owning_stages(params: dict[str, torch.nn.Parameter], groups: ParallelGroups) -> dict[str, int]:
    """Parameter name -> the first pipeline stage that holds it."""
    held: list[list[str]] = [[] for _ in range(groups.pp.size())]
    if groups.pp.size() == 1:
        held = [list(params)]
    else:
        dist.all_gather_object(held, list(params), group=groups.pp)
    owners: dict[str, int] = {}
    for stage, names in enumerate(held):
        for name in names:
            owners.setdefault(name, stage)
    return owners
