"""LoRA on a running model: adding adapters, filling them, and giving them to others as PEFT's
tensors. What an adapter computes is in `megaopd.models.lora_layers`."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megaopd.config_lora import LoraConfig
from megaopd.errors import CheckpointError
from megaopd.models import weights
from megaopd.models.arch import ModelArch
from megaopd.models.build import HiddenGPTModel
from megaopd.models.hf_io.adapter import AdapterReader
from megaopd.models.lora_layers import Adapter, adapt, adapters_of
from megaopd.models.lora_spec import adapter_mappings, adapter_specs
from megaopd.models.mapping import ParamMapping, Read
from megaopd.parallel.groups import ParallelGroups

# A layer's own weight, or those of a grouped layer's experts.
_WEIGHT = re.compile(r"^weight(\d*)$")


def add_adapters(
    chunks: Sequence[HiddenGPTModel],
    arch: ModelArch,
    groups: ParallelGroups,
    lora: LoraConfig,
    seed: int,
) -> None:
    """Freezes the model and adds adapters to it; before it is wrapped for data parallelism.

    A is drawn uniformly from +-1/sqrt(in) and B is 0, as PEFT begins, whatever the layout; or both
    are read from `lora.adapter`.

    Raises:
        CheckpointError: the adapter cannot be read, or is of another shape.
    """
    specs = adapter_specs(arch, lora)
    names = {id(p): name for name, p in weights.named_parameters(chunks, arch).items()}
    for chunk in chunks:
        chunk.requires_grad_(False)
        for layer in list(chunk.modules()):
            found: dict[str, Adapter] = {}
            for own, param in layer.named_parameters(recurse=False):
                spec = specs.get(names.get(id(param), ""))
                if spec is not None and _WEIGHT.match(own):
                    group = groups.tp if spec.base.expert is None else groups.expt_tp
                    found[own] = Adapter(spec, param, lora.rank, lora.scale, chunk.config, group)
            if found:
                adapt(layer, found)
    missing = (specs.keys() & set(names.values())) - adapters_of(chunks).keys()
    assert not missing, f"no adapter on {sorted(missing)}: how does their layer call its weight?"
    reader = AdapterReader(lora.adapter) if lora.adapter else None
    if reader is not None:
        reader.check(lora, adapter_mappings(arch, lora))
    _fill(chunks, arch, lora, reader, seed)


@torch.no_grad()
def _fill(
    chunks: Sequence[HiddenGPTModel],
    arch: ModelArch,
    lora: LoraConfig,
    reader: AdapterReader | None,
    seed: int,
) -> None:
    mappings = adapter_mappings(arch, lora)
    part, expert_part = weights.partitions(chunks, arch)
    for name, param in adapter_shards(chunks).items():
        mapping = mappings[name]
        read = _drawn(mapping, seed) if reader is None else reader.reader_of(mapping)
        shard = mapping.layout.load(read, part if mapping.expert is None else expert_part)
        if shard.shape != param.shape:
            raise CheckpointError(
                mapping.hf[0],
                f"gives a shard {list(shard.shape)} for {list(param.shape)}",
                "check the layout of its linear layer in megaopd.models.families",
            )
        param.copy_(shard)


def _drawn(mapping: ParamMapping, seed: int) -> Read:
    """The whole A or B at the start, determined by seed and name."""
    (name,), (shape,) = mapping.hf, mapping.layout.hf_shapes()
    value = torch.zeros(shape)
    if name.endswith(".lora_A.weight"):
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        bound = shape[1] ** -0.5
        value.uniform_(-bound, bound, generator=generator)

    def read(index: int, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        return value[rows or slice(None), cols or slice(None)]

    return read


def adapter_shards(chunks: Sequence[HiddenGPTModel]) -> dict[str, torch.nn.Parameter]:
    """This rank's shard of every A and B by canonical name; the parameters in training."""
    return dict(shard for a in adapters_of(chunks).values() for shard in a.named_shards())


def export_adapter(
    chunks: Sequence[HiddenGPTModel], arch: ModelArch, groups: ParallelGroups, lora: LoraConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face layer.lora_A.weight or .lora_B.weight, full tensor) on every rank, in
    the order of the network; collective."""
    shards = {name: param.detach() for name, param in adapter_shards(chunks).items()}
    yield from weights.gathered(adapter_mappings(arch, lora), shards, chunks, arch, groups)


def adapted_layers(chunks: Sequence[HiddenGPTModel]) -> dict[str, int]:
    """Parts by the last part of their names, on this rank: what an adapter is on."""
    counts: dict[str, int] = defaultdict(int)
    for adapter in adapters_of(chunks).values():
        for part in adapter.lora_A:
            counts[part] += 1
    return dict(counts)
