"""The divergences as they stand in the papers, in fp64 over the whole vocabulary, with autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# One setting per kind that is not at the end of its range.
SETTINGS = {"beta": 0.3, "alpha": 0.2}


def reference(
    kind: str, z: Tensor, u: Tensor, temperature: float = 1.0, beta: float = 0.3, alpha: float = 0.2
) -> Tensor:
    """[T, V] logits of any dtype, without padding -> [T] fp64."""
    log_p = F.log_softmax(z.double() / temperature, dim=-1)
    log_q = F.log_softmax(u.double() / temperature, dim=-1)
    return from_logprobs(kind, log_p, log_q, beta, alpha)


def from_logprobs(kind: str, log_p: Tensor, log_q: Tensor, beta: float, alpha: float) -> Tensor:
    p, q = log_p.exp(), log_q.exp()

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        # A token without probability adds nothing, whatever its log-ratio.
        return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)

    def log_mix(weight_of_q: float) -> Tensor:
        return (weight_of_q * q + (1 - weight_of_q) * p).clamp(min=1e-300).log()

    if kind == "reverse_kl":
        return kl(p, log_p, log_q)
    if kind == "forward_kl":
        return kl(q, log_q, log_p)
    if kind == "mixed":
        return beta * kl(p, log_p, log_q) + (1 - beta) * kl(q, log_q, log_p)
    if kind == "jsd":
        m = log_mix(beta)
        return beta * kl(q, log_q, m) + (1 - beta) * kl(p, log_p, m)
    if kind == "skew_forward_kl":
        return kl(q, log_q, log_mix(alpha))
    if kind == "skew_reverse_kl":
        return kl(p, log_p, log_mix(1 - alpha))
    if kind == "alpha":
        mean = (alpha * log_p + (1 - alpha) * log_q).exp().sum(-1)
        return (mean - 1) / (alpha * (alpha - 1))
    if kind == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    raise KeyError(kind)


def reference_gradient(
    kind: str, z: Tensor, u: Tensor, weights: Tensor, temperature: float = 1.0, **settings: float
) -> tuple[Tensor, Tensor]:
    """Value [T] and gradient [T, V] of sum(weights * D), fp64."""
    leaf = z.detach().double().requires_grad_()
    loss = reference(kind, leaf, u, temperature, **settings)
    (grad,) = torch.autograd.grad((loss * weights.double()).sum(), leaf)
    return loss.detach(), grad


def random_logits(
    num_tokens: int, width: int, gap: float, seed: int = 0, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits `gap` apart, and token weights that are not uniform; fp32."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_tokens, width, generator=generator) * spread
    u = z + torch.randn(num_tokens, width, generator=generator) * gap
    return z, u, torch.rand(num_tokens, generator=generator) + 0.1


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())
