"""Where the parameters of a model lie in Megatron's distributed checkpoints.

Megatron-Core stores global tensors, whatever layout saved them: a shard of a rank is a part of one.
Layers that are all alike may be stacked in one tensor, [layers, ...], or have tensors of their own;
likewise the experts of a layer; and the norm before a linear layer is called as TransformerEngine
has it, inside that layer, or by its own name. `stored_params` says what
`GPTModel.sharded_state_dict` of our models writes, `locate_params` reads every way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megaopd.errors import CheckpointError
from megaopd.models.arch import ModelArch
from megaopd.models.families import param_mappings
from megaopd.models.mapping import (
    ParamMapping,
    Partition,
    Shape,
    canonical_name,
    padded_vocab_size,
)

_LAYER = re.compile(r"^decoder\.layers\.(?:(?P<layer>\d+)\.)?(?P<rest>\D.*)$")
_EXPERT = re.compile(r"^mlp\.experts\.experts\.(?:(?P<expert>\d+)\.)?(?P<rest>\D.*)$")
_CANONICAL_EXPERT = re.compile(r"^mlp\.experts\.(?P<expert>\d+)\.(?P<rest>.+)$")
# What a checkpoint of a training holds besides the model.
_NOT_THE_MODEL = re.compile(
    r"(^|\.)(optimizer|rng_state|rerun_state_machine_state)([./]|$)|^(adapter|ema_teacher)\."
)

# The layer's own name of a norm -> the one it is stored by, that of the linear layer behind it. The
# norm before a mixture of experts has no such layer.
_STORED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True)
class StoredParam:
    """A parameter's place: the block of a stored tensor that begins at `offset`.

    Attributes:
        key: of the stored tensor.
        global_shape: the stored tensor's.
        offset: one index per dim of the stored tensor.
        shape: of the block, of as many dims. The first `num_axes`, of size 1, say which layer or
            expert it is; the others are the parameter's own.
        num_axes: dims that the parameter itself does not have.
    """

    key: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    num_axes: int = 0

    @property
    def param_shape(self) -> Shape:
        return self.shape[self.num_axes :]

    @property
    def axes(self) -> Shape:
        """Which layer and expert."""
        return self.offset[: self.num_axes]


def is_model_key(key: str) -> bool:
    """Whether the stored tensor belongs to the model: not to an optimizer or a generator."""
    return _NOT_THE_MODEL.search(key) is None


def param_shape(mapping: ParamMapping, vocab_rows: int) -> Shape:
    """Shape of the whole parameter, unsharded.

    Args:
        vocab_rows: rows of embedding and head, padding included.
    """
    hf_shapes = mapping.layout.hf_shapes()

    def read(index: int, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        tensor = torch.empty(hf_shapes[index], device="meta")
        if cols is not None:
            return tensor[rows or slice(None), cols]
        return tensor[rows or slice(None)]

    return tuple(mapping.layout.load(read, Partition(0, 1, vocab_rows)).shape)


def stored_params(arch: ModelArch) -> dict[str, StoredParam]:
    """Where each parameter goes, by canonical name, in the order of the network.

    Embedding and head have `padded_vocab_size(vocab_size, 1)` rows; Megatron-Core loads them into
    a model with another padding.
    """
    vocab_rows = padded_vocab_size(arch.vocab_size, 1)
    return {
        name: _stored(name, param_shape(mapping, vocab_rows), arch)
        for name, mapping in param_mappings(arch).items()
    }


def _stored(name: str, shape: Shape, arch: ModelArch) -> StoredParam:
    match = _LAYER.match(name)
    if match is None:
        return _block(name, [], shape)
    layer, rest = int(match["layer"]), match["rest"]
    axes: list[tuple[int, int]] = []
    prefix = f"decoder.layers.{layer}"
    if arch.moe is None:  # else Megatron-Core takes the layers for different ones
        prefix = "decoder.layers"
        axes.append((layer, arch.num_layers))
    if expert := _CANONICAL_EXPERT.match(rest):
        assert arch.moe is not None
        rest = f"mlp.experts.experts.{expert['rest']}"
        axes.append((int(expert["expert"]), arch.moe.num_experts))
    if not (arch.is_moe_layer(layer) and rest.startswith("pre_mlp_layernorm.")):
        rest = _STORED_NORMS.get(rest, rest)
    return _block(f"{prefix}.{rest}", axes, shape)


def _block(key: str, axes: list[tuple[int, int]], shape: Shape) -> StoredParam:
    return StoredParam(
        key,
        (*(size for _, size in axes), *shape),
        (*(index for index, _ in axes), *(0 for _ in shape)),
        (*(1 for _ in axes), *shape),
        len(axes),
    )


def locate_params(
    arch: ModelArch, stored: Mapping[str, Shape], where: str
) -> tuple[dict[str, StoredParam], list[str]]:
    """Finds the parameters in a checkpoint, by whichever names it has.

    Args:
        stored: shape of every stored tensor of the model, by key.
        where: the checkpoint, for an error message.

    Returns:
        The place of every parameter that is there, by canonical name, and the keys that are no
        parameter's. Shapes are those of the checkpoint.

    Raises:
        CheckpointError: a parameter is there twice.
    """
    known = param_mappings(arch)
    located: dict[str, StoredParam] = {}
    unexpected = []
    for key, shape in stored.items():
        places = _places(arch, key, shape, where)
        if not places.keys() <= known.keys():
            unexpected.append(key)
            continue
        for name, place in places.items():
            if name in located:
                raise CheckpointError(
                    f"{where}: {key}",
                    f"holds {name}, which {located[name].key} holds too",
                    "convert or save the checkpoint again",
                )
            located[name] = place
    return located, unexpected


def _places(arch: ModelArch, key: str, shape: Shape, where: str) -> dict[str, StoredParam]:
    """Parameters that a stored tensor of this name holds, whether the model has them or not."""
    layer = _LAYER.match(key)
    if layer is None:
        return {key: _block(key, [], shape)}
    layers, rest = _Axis.of(layer["layer"], arch.num_layers), layer["rest"]
    experts = None
    if expert := _EXPERT.match(rest):
        experts = _Axis.of(expert["expert"], arch.moe.num_experts if arch.moe else 0)
        rest = expert["rest"]
    stacked = [axis for axis in (layers, experts) if axis is not None and axis.stacked]
    sizes = tuple(len(axis.indices) for axis in stacked)
    if shape[: len(sizes)] != sizes:
        raise CheckpointError(
            f"{where}: {key}",
            f"has shape {list(shape)}, config.json says that it begins with {list(sizes)}",
            "check that config.json belongs to these weights",
        )
    places = {}
    for i in layers.indices:
        for e in experts.indices if experts is not None else (None,):
            part = rest if e is None else f"mlp.experts.local_experts.{e}.{rest}"
            name = canonical_name(f"decoder.layers.{i}.{part}", range(max(layers.indices) + 1))
            index = ((layers, i), (experts, e))
            axes = [(n or 0, len(a.indices)) for a, n in index if a is not None and a.stacked]
            places[name] = _block(key, axes, shape[len(axes) :])
    return places


@dataclass(frozen=True)
class _Axis:
    """Layers or experts that a stored tensor is of: all, stacked, or the one in its key."""

    indices: tuple[int, ...]
    stacked: bool

    @classmethod
    def of(cls, index: str | None, size: int) -> _Axis:
        return cls(tuple(range(size)), True) if index is None else cls((int(index),), False)
