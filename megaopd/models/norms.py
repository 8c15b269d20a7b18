"""Norms for Megatron's layers: the local spec's RMSNorm, and a norm behind attention and MLP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as Megatron builds one, usable with sequence parallelism, which Megatron's
    `WrappedTorchNorm` is not.

    Under sequence parallelism a rank norms only its slice of the tokens, so its weight gradient is
    partial; the mark on the weight makes `finalize_model_grads` sum it over the tensor-parallel
    group.

    With `layernorm_zero_centered_gamma` it multiplies by 1 + weight, in fp32 or better, and rounds
    only the product.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_centered:
            return super().forward(x)
        exact = torch.promote_types(x.dtype, torch.float32)
        weight = 1.0 + self.weight.to(exact)
        return F.rms_norm(x.to(exact), self.normalized_shape, weight, self.eps).to(x.dtype)


class NormedResidual(MegatronModule):
    """A layer's `bias_dropout_add` that norms what it adds to the residual stream.

    With it as `self_attn_bda` and `mlp_bda`, and the norms before attention and MLP, a layer has
    "sandwich" norms. It gets the output of attention, MLP or mixture of experts as a whole: reduced
    over the tensor-parallel ranks, the experts' parts put together. Megatron-Core has no such norm.

    Args:
        norm: a norm's class, called with config, hidden_size and eps.
        tp_group: the layer's; its ranks hold the same norm, which Megatron's `sharded_state_dict`
            then says of it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        norm: Callable[..., torch.nn.Module],
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.norm = norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Returns what `get_bias_dropout_add` does, a function of the output with its bias, the
        residual and the dropout probability."""
        add = get_bias_dropout_add(training, fused)

        def add_normed(
            output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
        ) -> Tensor:
            output, bias = output_with_bias
            assert bias is None  # no family's output projection has one
            return add((self.norm(output), None), residual, prob)

        return add_normed


def keep_grad_mode(layers: Iterable[torch.nn.Module]) -> None:
    """Lets layers add to the residual stream under the caller's grad mode.

    Megatron enables gradients there, under `torch.no_grad` too. A sum keeps no tensors, but the
    norm of a `NormedResidual` would keep its input, layer after layer, until the end of a forward
    pass that has no backward.
    """
    for layer in layers:
        layer.bias_dropout_add_exec_handler = nullcontext  # type: ignore[assignment]
