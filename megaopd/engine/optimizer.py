"""Megatron's optimizer and learning-rate schedule from our configuration."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megaopd.config import OptimizerConfig
from megaopd.models.build import DTYPES
from megaopd.parallel.groups import ParallelGroups


def build_optimizer(
    config: OptimizerConfig,
    dtype: str,
    chunks: Sequence[DistributedDataParallel],
    groups: ParallelGroups,
) -> MegatronOptimizer:
    """AdamW with state sharded over the ranks that hold the same weights (data- and
    context-parallel) and fp32 main weights."""
    with groups.active():
        return get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                bf16=dtype == "bf16",
                params_dtype=DTYPES[dtype],
                use_distributed_optimizer=True,
            ),
            list(chunks),
            use_gloo_process_groups=False,
            pg_collection=groups.collection,
        )


def build_scheduler(
    config: OptimizerConfig, optimizer: MegatronOptimizer, num_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then the configured decay until `num_steps`.

    `step(1)` is called before each optimizer step, so the first step already has a rate above 0.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(num_steps, config.warmup_steps + 1),
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
