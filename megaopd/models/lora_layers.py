"""LoRA on Megatron's linear layers: what an adapter computes and how its gradients are summed.

The linear layer stays as it is, under its own name; a hook adds the adapter's output to its. So
Megatron's local layers and TransformerEngine's are adapted alike, the layers that norm their input
first and the grouped experts too.

Communication is over r features, not over the layer's. With x the layer's input, h = s A x:

| layer | A | B | forward | what the backward sums |
|-|-|-|-|-|
| column parallel | whole | out features | h as it is | gradient of h, over the ranks |
| with sequence parallelism | whole | out features | h gathered over the sequence | the gather's \
own backward; A's gradient, in finalize_model_grads |
| row parallel | in features | whole | h summed over the ranks | nothing |
| with sequence parallelism | in features | whole | h summed and scattered over the sequence | \
B's gradient, in finalize_model_grads |
| an expert | as above | as above | nothing: the dispatcher sums outputs and input gradients | \
the gradient of whichever is whole |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaopd.models.lora_spec import AdapterSpec, adapter_name

# Where a linear layer keeps its adapters; part of their names in the model, and in no other name.
ADAPTERS = "lora_adapters"


class _SumGradient(torch.autograd.Function):
    """x forward, the sum over the group's gradients backward. Megatron's own loses the sum of a
    gradient that is not contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        total = upstream[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Adapter(torch.nn.Module):
    """The adapter of one parameter: y += s B A x, part by part.

    Args:
        spec: the parameter and its Hugging Face layers.
        weight: this rank's shard of it, [out, in].
        rank, scale: r and s.
        config: of the model.
        group: the tensor-parallel group that shares the parameter, an expert's or the layers'.

    Attributes:
        enabled: without it the layer is the base model's.
        weight: the adapted shard; no parameter of this module.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        weight: torch.nn.Parameter,
        rank: int,
        scale: float,
        config: TransformerConfig,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.spec, self.scale, self.group, self.enabled = spec, scale, group, True
        self._weight = (weight,)  # in a tuple, so that it is not registered here too
        self.is_expert = spec.base.expert is not None
        self.sequence_parallel = (
            config.sequence_parallel and group.size() > 1 and not self.is_expert
        )
        out_features, in_features = weight.shape
        whole = sum(part.lora_B.hf_shapes()[0][0] for part in spec.parts)
        adapted = [part for part in spec.parts if part.adapted]
        self.rows = {
            # Ranks share every part evenly, or hold all of it.
            part.name: part.lora_B.hf_shapes()[0][0] * out_features // whole
            for part in spec.parts
        }

        def zeros(rows: int, cols: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(weight.detach().new_zeros(rows, cols))

        self.lora_A = torch.nn.ParameterDict({p.name: zeros(rank, in_features) for p in adapted})
        self.lora_B = torch.nn.ParameterDict(
            {p.name: zeros(self.rows[p.name], rank) for p in adapted}
        )
        for part in adapted:
            self._mark(self.lora_A[part.name], dim=1 if spec.splits_input else None)
            self._mark(self.lora_B[part.name], dim=None if spec.splits_input else 0)

    @property
    def weight(self) -> torch.nn.Parameter:
        return self._weight[0]

    def named_shards(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's shard of every A and B by canonical name."""
        prefix = self.spec.base.megatron.removesuffix(".weight")
        for name in self.lora_A:
            yield adapter_name(prefix, "lora_A", name), self.lora_A[name]
            yield adapter_name(prefix, "lora_B", name), self.lora_B[name]

    def forward(self, x: Tensor) -> Tensor:
        """s B A x as the layer gives its own output: [.., out] of this rank."""
        lora_A = torch.cat(
            [self._summed(a, whole=not self.spec.splits_input) for a in self.lora_A.values()]
        )
        # As matrices: a part of h is not contiguous, and without a gradient torch multiplies what
        # has more dims and is not contiguous row by row.
        h_TR = self._communicated(F.linear(x.flatten(0, -2), lora_A) * self.scale)
        by_part = iter(h_TR.split(h_TR.shape[1] // len(self.lora_A), dim=1))
        outputs = {
            name: F.linear(next(by_part), self._summed(b, whole=self.spec.splits_input))
            for name, b in self.lora_B.items()
        }
        return self._assembled(outputs, h_TR).unflatten(0, (-1, *x.shape[1:-1]))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + s B A of this rank, [out, in]: computed in fp32, rounded to the weight's dtype."""
        deltas = {
            name: (self.lora_A[name].float().t() @ b.float().t()) * self.scale  # [in, rows]
            for name, b in self.lora_B.items()
        }
        delta = self._assembled(deltas, next(iter(deltas.values()))).t()
        return (self.weight.float() + delta).to(self.weight.dtype)

    def _communicated(self, h: Tensor) -> Tensor:
        """h = s A x for the tokens of the output, complete."""
        if self.is_expert or self.group.size() == 1:
            return h
        if self.spec.splits_input:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(h, group=self.group)
            return reduce_from_tensor_model_parallel_region(h, group=self.group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(h, group=self.group)
        summed: Tensor = _SumGradient.apply(h, self.group)
        return summed

    def _summed(self, param: Tensor, whole: bool) -> Tensor:
        """The parameter; the gradient of an expert's that is whole on every rank is summed over
        them, for each sees a part of it."""
        if self.is_expert and whole and self.group.size() > 1:
            param = _SumGradient.apply(param, self.group)
        return param

    def _assembled(self, outputs: dict[str, Tensor], like: Tensor) -> Tensor:
        """Puts the parts' features [.., rows] into the layer's order; the rest is 0."""
        parts = [
            outputs.get(p.name, like.new_zeros(()).expand(*like.shape[:-1], self.rows[p.name]))
            for p in self.spec.parts
        ]
        if len(parts) == 1:
            return parts[0]
        if not self.spec.group_rows:
            return torch.cat(parts, dim=-1)
        grouped = [
            x.unflatten(-1, (-1, rows)) for x, rows in zip(parts, self.spec.group_rows, strict=True)
        ]
        return torch.cat(grouped, dim=-1).flatten(-2)

    def _mark(self, param: torch.nn.Parameter, dim: int | None) -> None:
        """Tells Megatron who shares a parameter, for its gradient and the gradient norm.

        Args:
            dim: the one that the ranks share; None says that all hold the whole.
        """
        marks: Any = param
        marks.allreduce = getattr(self.weight, "allreduce", True)
        if dim is not None:
            set_tensor_model_parallel_attributes(param, True, dim, 1)
        elif not self.is_expert:
            marks.sequence_parallel = self.sequence_parallel
        elif self.group.rank() == 0:
            # Ranks of an expert's group may differ from the layers' in number: the norm, which
            # otherwise counts what rank 0 of the layers' group holds, is told whom to count.
            set_tensor_model_parallel_attributes(param, True, 0, 1)
        else:
            marks.shared = True


def adapt(layer: torch.nn.Module, adapters: dict[str, Adapter]) -> None:
    """Adds adapters to a linear layer.

    Args:
        adapters: by the name of the layer's own parameter: `weight`, or one for each of a grouped
            layer's experts, in order.
    """
    layer.add_module(ADAPTERS, torch.nn.ModuleDict(adapters))
    layer.register_forward_hook(_add_output, with_kwargs=True)


def _add_output(
    layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    adapters: list[Adapter] = list(getattr(layer, ADAPTERS).values())
    if not adapters[0].enabled:
        return output
    y, bias = output  # as all of Megatron's linear layers give it
    given = (*args, *kwargs.values())
    x = normed_input(layer, given[0])
    if len(adapters) == 1:
        return y + adapters[0](x), bias
    # A grouped layer: the tokens of its experts one after another, and their numbers.
    counts = given[1].tolist() if isinstance(given[1], Tensor) else list(given[1])
    parts = [a(part) for a, part in zip(adapters, x.split(counts), strict=True)]
    return y + torch.cat(parts), bias


def normed_input(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """What the layer multiplies: TransformerEngine's LayerNormLinear norms its input first.

    The norm is computed once more here, on this rank's part of the sequence: what the layer can
    return of it differs between versions of TransformerEngine.
    """
    weight = getattr(layer, "layer_norm_weight", None)
    if weight is None:
        return x
    layer_any: Any = layer
    given = x
    if layer_any.zero_centered_gamma:
        # 1 + weight is no number of a narrow dtype; otherwise x, which the layer keeps for its own
        # backward, serves this one too.
        exact = torch.promote_types(x.dtype, torch.float32)
        given, weight = x.to(exact), 1.0 + weight.to(exact)
    return F.rms_norm(given, (x.shape[-1],), weight, layer_any.eps).to(x.dtype)


def adapters_of(chunks: Iterable[torch.nn.Module]) -> dict[str, Adapter]:
    """A model's adapters on this rank by the canonical name of the parameter that they adapt."""
    modules = (module for chunk in chunks for module in chunk.modules())
    found = (module for module in modules if isinstance(module, Adapter))
    return {adapter.spec.base.megatron: adapter for adapter in found}


@contextmanager
def base_only(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside the block the model is the one that was adapted."""
    adapters = adapters_of(chunks).values()
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True
