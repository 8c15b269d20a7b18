"""Rules of a layout: what divides what, between its sizes, the world's ranks and a model.

Each error shows its arithmetic. `check_ranks` needs the number of ranks alone, `check_model` what a
model's config.json says; both are for one layout and one model, student's or teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from megaopd.errors import ConfigError

if TYPE_CHECKING:
    from megaopd.config import ParallelConfig


class Experts(Protocol):
    """What the rules ask of a mixture of experts."""

    @property
    def num_experts(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def layers(self) -> Sequence[int]: ...


class Architecture(Protocol):
    """What the rules ask of a model, read from its config.json."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def moe(self) -> Experts | None: ...


_SIZES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")


def check_ranks(where: str, role: str, parallel: ParallelConfig, world_size: int) -> None:
    """Checks a layout in itself and against the ranks of the run.

    Args:
        where: the key of the layout, e.g. ``teacher.parallel``.
        role: whose it is, e.g. ``student``.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    p = parallel
    for name in _SIZES:
        size = getattr(p, name)
        if size is not None and size <= 0:
            raise ConfigError(f"{where}.{name}", f"found {size}", "expected a positive number")
    if p.sequence_parallel and p.tensor == 1:
        raise ConfigError(
            f"{where}.sequence_parallel",
            f"true with {where}.tensor 1: there is no group to share the sequence",
            f"set it to false, or {where}.tensor above 1",
        )
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        raise ConfigError(
            f"{where}.virtual_pipeline",
            f"{p.virtual_pipeline} with {where}.pipeline 1: there are no stages to interleave",
            f"set it to 1, or {where}.pipeline above 1",
        )
    _check_layers_per_stage(where, p)
    model_size = p.tensor * p.pipeline * p.context
    if world_size % model_size:
        raise ConfigError(
            where,
            f"the {role}'s tensor {p.tensor} x pipeline {p.pipeline} x context {p.context} = "
            f"{model_size} does not divide the world size {world_size}"
            + ("" if role == "student" else ", the ranks that teacher and student share"),
            f"start a multiple of {model_size} ranks or change the layout",
        )
    expert_tensor = p.expert_tensor or p.tensor
    expert_size, stage_size = p.expert * expert_tensor, world_size // p.pipeline
    if stage_size % expert_size:
        raise ConfigError(
            f"{where}.expert",
            f"the {role}'s expert {p.expert} x expert_tensor {expert_tensor} = {expert_size} does "
            f"not divide the {stage_size} ranks of a pipeline stage (tensor {p.tensor} x context "
            f"{p.context} x data {world_size // model_size})",
            "lower expert or expert_tensor, or start more ranks",
        )


def _check_layers_per_stage(where: str, parallel: ParallelConfig) -> None:
    layers, num_stages = parallel.layers_per_stage, parallel.pipeline * parallel.virtual_pipeline
    if not layers:
        return
    if len(layers) != num_stages:
        raise ConfigError(
            f"{where}.layers_per_stage",
            f"{len(layers)} numbers for pipeline {parallel.pipeline} x virtual_pipeline "
            f"{parallel.virtual_pipeline} = {num_stages} stages",
            f"give {num_stages} numbers, or none",
        )
    if min(layers) < 1:
        raise ConfigError(
            f"{where}.layers_per_stage",
            f"{min(layers)} layers in stage {layers.index(min(layers))}",
            "give every stage at least 1",
        )


def check_model(
    where: str, role: str, parallel: ParallelConfig, arch: Architecture, *, trained: bool
) -> None:
    """Checks a layout against the model that is laid out.

    Args:
        where, role: as for `check_ranks`.
        trained: whether the model is trained, or only run forward.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    p = parallel
    _check_divides(where, role, "tensor", p.tensor, arch.num_heads, "attention heads")
    _check_divides(where, role, "tensor", p.tensor, arch.num_kv_heads, "KV heads")
    _check_depth(where, role, p, arch.num_layers)
    if arch.moe is None or len(arch.moe.layers) < arch.num_layers:
        _check_divides(where, role, "tensor", p.tensor, arch.ffn_hidden_size, "MLP features")
    if arch.moe is not None:
        _check_experts(where, role, p, arch.moe, trained)
        return
    for name, unused in (("expert", 1), ("expert_tensor", None)):
        size = getattr(p, name)
        if size != unused:
            found = f"{size}, and the {role} is not a mixture of experts"
            raise _error(where, role, name, found, f"set it to {unused or 'null'}")


def _check_experts(
    where: str, role: str, parallel: ParallelConfig, moe: Experts, trained: bool
) -> None:
    tensor, expert_tensor = parallel.tensor, parallel.expert_tensor or parallel.tensor
    features = (moe.ffn_hidden_size, "features of an expert")
    _check_divides(where, role, "expert", parallel.expert, moe.num_experts, "experts")
    _check_divides(where, role, "expert_tensor", expert_tensor, *features)
    if trained and tensor > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"{where}.sequence_parallel",
            f"false with {where}.tensor {tensor}: Megatron trains a mixture of experts under "
            "tensor parallelism with sequence parallelism only",
            "set it to true",
        )


def _check_depth(where: str, role: str, parallel: ParallelConfig, num_layers: int) -> None:
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    num_stages = pipeline * virtual
    stages = f"pipeline {pipeline} x virtual_pipeline {virtual} = {num_stages} stages"
    if num_stages > num_layers:
        found = f"{stages} are more than the {role}'s {num_layers} layers"
        raise _error(where, role, "pipeline", found, f"choose at most {num_layers} stages")
    if parallel.layers_per_stage:
        total = sum(parallel.layers_per_stage)
        if total != num_layers:
            terms = " + ".join(map(str, parallel.layers_per_stage))
            found = f"{terms} = {total}, and the {role} has {num_layers} layers"
            remedy = f"give {num_stages} numbers that sum to {num_layers}"
            raise _error(where, role, "layers_per_stage", found, remedy)
    elif num_layers % num_stages:
        found = (
            f"{stages} do not divide the {role}'s {num_layers} layers ({num_layers} = "
            f"{num_layers // num_stages} x {num_stages} + {num_layers % num_stages})"
        )
        remedy = f"choose one of {_divisors(num_layers)} stages, or set layers_per_stage"
        raise _error(where, role, "pipeline", found, remedy)


def _check_divides(where: str, role: str, name: str, size: int, count: int, what: str) -> None:
    if count % size:
        found = (
            f"{size} does not divide the {role}'s {count} {what} "
            f"({count} = {count // size} x {size} + {count % size})"
        )
        raise _error(where, role, name, found, f"choose one of {_divisors(count)}")


def _error(where: str, role: str, name: str, found: str, remedy: str) -> ConfigError:
    if role != "student" and where == "parallel":
        remedy += f", or give the {role} a layout of its own"
    return ConfigError(f"{where}.{name}", found, remedy)


def _divisors(count: int) -> str:
    """Those up to 64; a greater layout has other limits."""
    return ", ".join(str(d) for d in range(1, min(count, 64) + 1) if count % d == 0)
