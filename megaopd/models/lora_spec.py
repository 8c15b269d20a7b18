"""Which parameters LoRA adapts, and how an adapter corresponds to PEFT's tensors.

Hugging Face has a linear layer for each of query, key, value, gate and up, Megatron one for all of
them. An adapter here has a part for each Hugging Face layer, with an A and a B of its own: what is
computed, trained and stored is what PEFT would, and any choice of layers is possible. Knows torch,
not Megatron or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megaopd.config_lora import LoraConfig
from megaopd.errors import ConfigError
from megaopd.models.arch import ModelArch
from megaopd.models.families import param_mappings
from megaopd.models.mapping import (
    QKV,
    ColumnParallel,
    GatedMLP,
    Layout,
    ParamMapping,
    Replicated,
    RowParallel,
)


@dataclass(frozen=True)
class AdapterPart:
    """One Hugging Face linear layer inside a parameter.

    Attributes:
        hf: the layer's name, e.g. model.layers.0.self_attn.q_proj.
        lora_A: layout of A, [r, in].
        lora_B: layout of B, [out, r].
        adapted: whether it has an A and a B at all.
    """

    hf: str
    lora_A: Layout
    lora_B: Layout
    adapted: bool

    @property
    def name(self) -> str:
        """The last part of the layer's name, e.g. q_proj."""
        return self.hf.rpartition(".")[2]


@dataclass(frozen=True)
class AdapterSpec:
    """The adapter of one Megatron parameter.

    Attributes:
        base: the parameter.
        parts: its Hugging Face layers in order, adapted or not.
        group_rows: rows of each part in one of the groups that the parameter's rows consist of; on
            a rank they follow each other group after group. Empty is one group.
        splits_input: the ranks share the input features (RowParallel), not the output's.
    """

    base: ParamMapping
    parts: tuple[AdapterPart, ...]
    group_rows: tuple[int, ...] = ()
    splits_input: bool = False

    def mappings(self) -> Iterator[ParamMapping]:
        """Of every A and B, under the names that PEFT gives them inside the model."""
        prefix = self.base.megatron.removesuffix(".weight")
        for part in self.parts:
            for kind, layout in (("lora_A", part.lora_A), ("lora_B", part.lora_B)):
                if part.adapted:
                    name = adapter_name(prefix, kind, part.name)
                    hf = (f"{part.hf}.{kind}.weight",)
                    yield ParamMapping(name, hf, layout, self.base.expert)


def adapter_name(prefix: str, kind: str, part: str) -> str:
    """Canonical name of an A or B: the linear layer's, kind (lora_A, lora_B), the part's name."""
    return f"{prefix}.{kind}.{part}"


def adapter_specs(arch: ModelArch, lora: LoraConfig) -> dict[str, AdapterSpec]:
    """The adapters of the whole model by the canonical name of the parameter that they adapt."""
    specs = {}
    for name, mapping in param_mappings(arch).items():
        spec = adapter_spec(mapping, lora)
        if spec is not None and any(part.adapted for part in spec.parts):
            specs[name] = spec
    return specs


def adapter_mappings(arch: ModelArch, lora: LoraConfig) -> dict[str, ParamMapping]:
    """Every A and B of the whole model by canonical name, in the order of the network."""
    found = (m for spec in adapter_specs(arch, lora).values() for m in spec.mappings())
    return {mapping.megatron: mapping for mapping in found}


def linear_layers(arch: ModelArch) -> tuple[str, ...]:
    """What `student.lora.targets` may name: the last parts of the linear layers' names."""
    specs = (adapter_spec(mapping, LoraConfig()) for mapping in param_mappings(arch).values())
    names = (part.name for spec in specs if spec is not None for part in spec.parts)
    return tuple(dict.fromkeys(names))


def targets(arch: ModelArch, lora: LoraConfig) -> tuple[str, ...]:
    """The layers that get an adapter, by the last parts of their names."""
    return lora.targets or linear_layers(arch)


def check_lora(arch: ModelArch, lora: LoraConfig) -> None:
    """Checks `student.lora` before a model is built.

    Raises:
        ConfigError: a target that the model has no layer of.
    """
    known = linear_layers(arch)
    for target in lora.targets:
        if target not in known:
            raise ConfigError(
                "student.lora.targets",
                f"{arch.family} has no linear layer {target!r}",
                f"choose among {', '.join(known)}",
            )


def adapter_spec(mapping: ParamMapping, lora: LoraConfig) -> AdapterSpec | None:
    """None where the parameter is no linear layer's weight: a norm, a bias, router, embedding."""
    r, layout = lora.rank, mapping.layout
    group_rows: tuple[int, ...] = ()
    splits_input = False
    pairs: list[tuple[Layout, Layout]]
    match layout:
        case QKV(cols=int(cols)):
            group_rows = layout.group_rows
            shapes = [(shape[0], r) for shape in layout.hf_shapes()]
            pairs = [(Replicated((r, cols)), ColumnParallel(*shape)) for shape in shapes]
        case GatedMLP(fused=True):
            pairs = [(Replicated((r, layout.cols)), GatedMLP(layout.ffn_size, r, fused=True))]
        case GatedMLP():
            pairs = [(Replicated((r, layout.cols)), ColumnParallel(layout.ffn_size, r))] * 2
        case ColumnParallel():
            pairs = [(Replicated((r, layout.cols)), ColumnParallel(layout.rows, r))]
        case RowParallel():
            pairs = [(RowParallel(r, layout.cols), Replicated((layout.rows, r)))]
            splits_input = True
        case _:
            return None
    parts = []
    for hf, (lora_A, lora_B) in zip(mapping.hf, pairs, strict=True):
        layer = hf.removesuffix(".weight")
        adapted = not lora.targets or layer.rpartition(".")[2] in lora.targets
        parts.append(AdapterPart(layer, lora_A, lora_B, adapted))
    return AdapterSpec(mapping, tuple(parts), group_rows, splits_input)
