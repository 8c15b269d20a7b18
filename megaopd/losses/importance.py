"""Importance correction of sampled-token objectives, for tokens that other weights sampled.

The gradient of a divergence is an expectation over y ~ p, the weights in training. A token that the
sampler drew with another probability stands for p(y) / p_sampler(y) tokens of theirs. That ratio is
unbiased but for what is cut off it here, so that a single token cannot outweigh all others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megaopd.config import LossConfig


def truncated(ratio: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """min(ratio, cap): truncated importance sampling (Ionides 2008, 10.1198/106186008X320456)."""
    return ratio.clamp(max=config.importance_cap), ratio > config.importance_cap


def icepop(ratio: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """The ratio inside [low, high], 0 outside: IcePop, arXiv 2510.18855."""
    kept = (ratio >= config.icepop_low) & (ratio <= config.icepop_high)
    return torch.where(kept, ratio, 0.0), ~kept


# By loss.importance: (p / p_sampler of each token, configuration) -> (its weight, whether the ratio
# was cut or the token left out). "none" has no entry: every token counts once.
IMPORTANCE: dict[str, Callable[[Tensor, LossConfig], tuple[Tensor, Tensor]]] = {
    "truncated": truncated,
    "icepop": icepop,
}


def importance(log_ratio: Tensor, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """(weights [C] of tokens whose log(p / p_sampler) is given, [C] metrics of them)."""
    correct = IMPORTANCE.get(config.importance)
    if correct is None:
        return torch.ones_like(log_ratio), {}
    counts, clipped = correct(torch.exp(log_ratio), config)
    return counts, {"loss/importance_clip_fraction": clipped.to(log_ratio.dtype)}
