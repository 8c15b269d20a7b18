"""A mixture of experts in Megatron's terms: configuration, layers, marks, load-balancing loss.

Experts are computed by TransformerEngine's grouped linear layers where it is there, else one after
another. Megatron-Core has no grouped path without TransformerEngine or a CUDA-only package.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megaopd.batch import PackedBatch
from megaopd.config import ParallelConfig
from megaopd.errors import ConfigError
from megaopd.models.arch import ModelArch
from megaopd.parallel.groups import ParallelGroups

# The router asks whether TransformerEngine's matrix product is there by a name that Megatron-Core
# 0.16 defines only where it is.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


def moe_config(
    arch: ModelArch, parallel: ParallelConfig, router_aux_loss_coef: float, grouped: bool = False
) -> dict[str, Any]:
    """The arguments of `TransformerConfig` that a mixture of experts needs; none without one.

    The router is that of transformers: softmax in fp32 over all experts, the top k of it, divided
    by their sum where the model says so (which is the softmax over the top k logits).

    Args:
        router_aux_loss_coef: weight of the load-balancing loss; 0 leaves it out.
        grouped: whether all experts of a rank are computed by one grouped product.

    Raises:
        ConfigError: the expert-parallel ranks do not divide the experts.
    """
    moe = arch.moe
    if moe is None:
        return {}
    if moe.num_experts % parallel.expert:
        raise ConfigError(
            "parallel.expert",
            f"{parallel.expert} ranks do not divide {moe.num_experts} experts",
            "choose an expert-parallel size that does",
        )
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(arch.is_moe_layer(i)) for i in range(arch.num_layers)],
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not moe.normalize_top_k,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if router_aux_loss_coef > 0 else "none",
        "moe_aux_loss_coeff": router_aux_loss_coef,
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor or parallel.tensor,
    }


def layer_specs(
    config: TransformerConfig, layers: Sequence[int], layer: Callable[[int | None], ModuleSpec]
) -> list[ModuleSpec]:
    """The specs of a chunk's layers.

    Args:
        layers: their global indices.
        layer: makes the spec of a layer with that many experts; None is a plain MLP.
    """
    if config.num_moe_experts is None:
        return [layer(None)] * len(layers)
    plain, mixture = layer(None), layer(config.num_moe_experts)
    return [mixture if config.moe_layer_freq[i] else plain for i in layers]


def mark_experts(model: torch.nn.Module) -> None:
    """Marks the experts' weights for the reduction of gradients and for the gradient norm.

    Megatron reduces an expert's gradient over the ranks that hold the same expert only where
    expert parallelism is above 1. They are other ranks than the data-parallel ones as soon as the
    tensor parallelism inside experts differs from that outside, so the mark is set there too.
    """
    for module in model.modules():
        if not isinstance(module, MoELayer):
            continue
        config = module.config
        apart = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for name, param in module.experts.named_parameters():
            param.allreduce = not apart
            if not hasattr(param, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(param, True, int("linear_fc2" in name), 1)


# Which version began to is not on record in any signature; 0.16.1 does not, 0.19.2 does.
_MEGATRON_COUNTS_SHARERS = "self.tp_cp_group.size()" in inspect.getsource(
    TopKRouter.attach_and_log_load_balancing_loss
)


def weigh_aux_loss(
    chunks: Sequence[torch.nn.Module],
    router_aux_loss_coef: float,
    micro_batches: Sequence[PackedBatch],
    groups: ParallelGroups,
) -> None:
    """Sets the weight of the load-balancing loss for one step; collective over `groups.dp_cp`.

    A layer's loss on a micro-batch is E sum_i f_i P_i (arXiv 2101.03961): E experts, f_i the
    fraction of the T routed tokens x top k that go to expert i, P_i its mean probability. What is
    added to the training loss is router_aux_loss_coef times the sum over layers of its mean over
    the global batch, each micro-batch weighted by T.

    Megatron adds, on each of the tensor- and context-parallel ranks that share a micro-batch, the
    weight times the rank's summand times the tokens of that rank (newer versions: times the number
    of those ranks); later all gradients are divided by the global number of loss tokens. The weight
    undoes both.
    """
    lengths = [batch.tokens_T.numel() for batch in micro_batches]
    if len(chunks) > 1:  # the interleaved schedule computes all with the length of the longest
        lengths = [max(lengths)] * len(lengths)
    num_mine = [sum(int(batch.loss_mask_T.sum()) for batch in micro_batches), sum(lengths)]
    counts = torch.tensor(num_mine, dtype=torch.float64, device=groups.device)
    dist.all_reduce(counts, group=groups.dp_cp)
    num_loss_tokens, num_tokens = counts.tolist()
    sharers = 1 if _MEGATRON_COUNTS_SHARERS else groups.tp.size() * groups.cp.size()
    weight = router_aux_loss_coef * sharers * num_loss_tokens / max(num_tokens, 1.0)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.config.moe_aux_loss_coeff = weight
