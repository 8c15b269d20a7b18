"""The table of divergences: each entered once, as two elementwise functions.

Notation: student p, teacher q, d = log p - log q, all of one shape and one dtype. For a divergence
D(p, q) the table holds

    value(p, q, d)   the summand: D = sum_j value_j
    pull(p, q, d)    p * phi with phi = dD/dp up to a constant: the gradient with respect to the
                     logits z, p = softmax(z / tau), is (pull - p * sum_i pull_i) / tau

Everything else (chunks, tensor parallelism, top-k, heads, temperature, tests) is derived from
these. Both are written so that near p = q nothing cancels: multiples of sum_j (p_j - q_j) = 0 are
added to `value` until it is of second order in d, and phi is shifted to vanish at p = q. A small
error of the normalisers then changes the value in second order only. Nothing here may overflow for
|d| up to 1e5 as long as the result does not: p and q may be 0 where d is large.

Sources: GKD's JSD(beta), arXiv 2306.13649; skewed KL, arXiv 2402.03898; the alpha family is
(sum_j p^a q^(1-a) - 1) / (a (a - 1)) with its limits KL(q||p) at a = 0 and KL(p||q) at a = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from megaopd.losses import fast_math
from megaopd.losses.validation import require

ElementFn = Callable[[Tensor, Tensor, Tensor], Tensor]

# Below this |d| the closed forms lose digits to cancellation and the series take over; at it both
# are good to 1e-6.
NEAR = 0.25


def _exp_remainder(y: Tensor) -> Tensor:
    """expm1(-y) + y for |y| <= NEAR, to 1e-8 relative."""
    s = y * (-1 / 5040) + 1 / 720
    s = s * y - 1 / 120
    s = s * y + 1 / 24
    s = s * y - 1 / 6
    s = s * y + 1 / 2
    return s * (y * y)


def _atanh_tail(s: Tensor) -> Tensor:
    """atanh(s) - s for |s| <= 0.125, to 1e-9 of s."""
    s2 = s * s
    t = s2 * (1 / 9) + 1 / 7
    t = t * s2 + 1 / 5
    t = t * s2 + 1 / 3
    return t * s2 * s


def _psi(x: Tensor) -> Tensor:
    """(1 + x) log(1 + x) - x for x in [-0.222, 0], by log(1 + x) = 2 atanh(s), s = x / (2 + x)."""
    s = x / (x + 2)
    return 2 * (s * s + (1 + s) * _atanh_tail(s)) / (1 - s)


def _chi(x: Tensor) -> Tensor:
    """x - log(1 + x) for x in [-0.222, 0]."""
    s = x / (x + 2)
    return 2 * (s * s / (1 - s) - _atanh_tail(s))


def _mixture(p: Tensor, q: Tensor, d: Tensor, teacher_weight: float) -> tuple[Tensor, ...]:
    """The mixture m = w q + (1 - w) p, seen from the larger of p and q so that nothing overflows.

    Returns:
        (larger, e, b, log_m): larger = max(p, q), e = smaller / larger - 1, b = the smaller one's
        weight in m, log_m = log(m / larger) = log1p(b e).
    """
    ahead = d >= 0
    larger = torch.where(ahead, p, q)
    e = fast_math.expm1(-d.abs())
    b = torch.where(ahead, teacher_weight, 1 - teacher_weight).to(d.dtype)
    return larger, e, b, fast_math.log1p(b * e)


def reverse_kl_value(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p log(p/q) - p + q."""
    return torch.where(d.abs() < NEAR, p * _exp_remainder(d), q - p + p * d)


def reverse_kl_pull(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """phi = d."""
    return p * d


def reverse_kl_excess(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """q - p from terms that the value has computed already."""
    return reverse_kl_value(p, q, d) - p * d


def forward_kl_value(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """q log(q/p) - q + p."""
    return reverse_kl_value(q, p, -d)


def forward_kl_pull(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """phi = 1 - q/p, hence pull = p - q."""
    return torch.where(d.abs() < NEAR, p * (d - _exp_remainder(d)), p - q)


def forward_kl_excess(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """q - p, likewise."""
    return -forward_kl_value(p, q, d) - q * d


def jsd_value(p: Tensor, q: Tensor, d: Tensor, beta: float) -> Tensor:
    """beta q log(q/m) + (1 - beta) p log(p/m), m = beta q + (1 - beta) p."""
    larger, e, b, log_m = _mixture(p, q, d, beta)
    far = -b * (1 + e) * d.abs() - (1 + b * e) * log_m
    return larger * torch.where(d.abs() < NEAR, b * _psi(e) - _psi(b * e), far)


def jsd_pull(p: Tensor, q: Tensor, d: Tensor, beta: float) -> Tensor:
    """phi = (1 - beta) log(p/m)."""
    _, _, _, log_m = _mixture(p, q, d, beta)
    return (beta - 1) * p * (log_m + torch.relu(-d))


def skew_forward_kl_value(p: Tensor, q: Tensor, d: Tensor, alpha: float) -> Tensor:
    """q log(q/m) - q + m, m = alpha q + (1 - alpha) p."""
    larger, e, b, log_m = _mixture(p, q, d, alpha)
    x = b * e
    ahead = d >= 0
    near = torch.where(ahead, _psi(e) - _psi(x) - (1 - alpha) * e * log_m, _chi(x))
    far = torch.where(ahead, (1 + e) * (-d.abs() - log_m) - (1 - alpha) * e, x - log_m)
    return larger * torch.where(d.abs() < NEAR, near, far)


def skew_forward_kl_pull(p: Tensor, q: Tensor, d: Tensor, alpha: float) -> Tensor:
    """phi = (1 - alpha) (1 - q/m) = (1 - alpha)^2 (p - q) / m."""
    _, e, b, _ = _mixture(p, q, d, alpha)
    return (1 - alpha) ** 2 * p * torch.where(d >= 0, -e, e) / (1 + b * e)


def skew_reverse_kl_value(p: Tensor, q: Tensor, d: Tensor, alpha: float) -> Tensor:
    """p log(p/m) - p + m, m = alpha p + (1 - alpha) q."""
    return skew_forward_kl_value(q, p, -d, alpha)


def skew_reverse_kl_pull(p: Tensor, q: Tensor, d: Tensor, alpha: float) -> Tensor:
    """phi = log(p/m) - alpha (p/m - 1), p/m - 1 = (1 - alpha) (p - q) / m."""
    _, e, b, log_m = _mixture(p, q, d, 1 - alpha)
    excess = (1 - alpha) * torch.where(d >= 0, -e, e) / (1 + b * e)
    return p * (-torch.relu(-d) - log_m - alpha * excess)


def _alpha_mean(p: Tensor, q: Tensor, d: Tensor, alpha: float) -> Tensor:
    """p^alpha q^(1 - alpha)."""
    ahead = d >= 0
    rate = torch.where(ahead, 1 - alpha, alpha).to(d.dtype)
    return torch.where(ahead, p, q) * fast_math.exp(-rate * d.abs())


def alpha_value(p: Tensor, q: Tensor, d: Tensor, alpha: float) -> Tensor:
    """(p^a q^(1-a) - a p - (1 - a) q) / (a (a - 1))."""
    scale = 1 / (alpha * (alpha - 1))
    near = p * (_exp_remainder((1 - alpha) * d) - (1 - alpha) * _exp_remainder(d))
    far = _alpha_mean(p, q, d, alpha) - alpha * p - (1 - alpha) * q
    return scale * torch.where(d.abs() * max(1.0, abs(1 - alpha)) < NEAR, near, far)


def alpha_pull(p: Tensor, q: Tensor, d: Tensor, alpha: float) -> Tensor:
    """phi = ((p/q)^(a-1) - 1) / (a - 1)."""
    y = (1 - alpha) * d
    near = p * (_exp_remainder(y) - y)
    return torch.where(y.abs() < NEAR, near, _alpha_mean(p, q, d, alpha) - p) * (1 / (alpha - 1))


def tvd_value(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """|p - q| / 2."""
    return -0.5 * torch.where(d >= 0, p, q) * fast_math.expm1(-d.abs())


def tvd_pull(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """phi = sign(p - q) / 2; 0 at p = q."""
    return 0.5 * p * torch.sign(d)


@dataclass(frozen=True)
class Part:
    """A weighted term of a divergence.

    Attributes:
        weight: what the term is multiplied with.
        value: elementwise summand.
        pull: elementwise p * phi.
        order: a where the term is the alpha divergence of order a (KL(p||q) is 1, KL(q||p) is 0),
            else None. Such a term obeys a chain rule: over a partition of the vocabulary into
            shards with masses w_r and v_r, D = sum_r w_r^a v_r^(1-a) D_r + D(w, v), so it needs
            one pass and one collective, and sum_j pull_j = a D.
        excess: elementwise q - p, made of what `value` computes anyway, if there is such a form.
    """

    weight: float
    value: ElementFn
    pull: ElementFn
    order: float | None = None
    excess: ElementFn | None = None


@dataclass(frozen=True)
class Divergence:
    """An entry of the table.

    Attributes:
        formula: for people.
        parts: (beta, alpha) -> the terms; raises `LossArgumentError` for a parameter out of range.
    """

    formula: str
    parts: Callable[[float, float], tuple[Part, ...]]


_REVERSE = Part(1.0, reverse_kl_value, reverse_kl_pull, 1.0, reverse_kl_excess)
_FORWARD = Part(1.0, forward_kl_value, forward_kl_pull, 0.0, forward_kl_excess)
_TVD = Part(1.0, tvd_value, tvd_pull)


def _jsd(beta: float, alpha: float) -> tuple[Part, ...]:
    require(0 <= beta <= 1, "loss.beta", f"{beta} for jsd", "choose a value in [0, 1]")
    if beta in (0, 1):
        return (_REVERSE if beta else _FORWARD,)
    return (Part(1.0, partial(jsd_value, beta=beta), partial(jsd_pull, beta=beta)),)


def _mixed(beta: float, alpha: float) -> tuple[Part, ...]:
    require(0 <= beta <= 1, "loss.beta", f"{beta} for mixed", "choose a value in [0, 1]")
    weighted = (replace(_REVERSE, weight=beta), replace(_FORWARD, weight=1 - beta))
    return tuple(part for part in weighted if part.weight > 0)


def _skewed(name: str, value: Callable, pull: Callable, limit: Part) -> Divergence:
    def parts(beta: float, alpha: float) -> tuple[Part, ...]:
        require(
            0 <= alpha < 1,
            "loss.alpha",
            f"{alpha} for {name}",
            "choose a value in [0, 1); 1 is zero",
        )
        if alpha == 0:
            return (limit,)
        return (Part(1.0, partial(value, alpha=alpha), partial(pull, alpha=alpha)),)

    mixture = {"skew_forward_kl": "KL(q || alpha q + (1 - alpha) p)"}
    return Divergence(mixture.get(name, "KL(p || alpha p + (1 - alpha) q)"), parts)


def _alpha(beta: float, alpha: float) -> tuple[Part, ...]:
    require(math.isfinite(alpha), "loss.alpha", f"{alpha} for alpha", "choose a finite order")
    if alpha in (0, 1):
        return (_REVERSE if alpha else _FORWARD,)
    value, pull = partial(alpha_value, alpha=alpha), partial(alpha_pull, alpha=alpha)
    return (Part(1.0, value, pull, order=alpha),)


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": Divergence("KL(p || q)", lambda beta, alpha: (_REVERSE,)),
    "forward_kl": Divergence("KL(q || p)", lambda beta, alpha: (_FORWARD,)),
    "jsd": Divergence("beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p", _jsd),
    "skew_forward_kl": _skewed(
        "skew_forward_kl", skew_forward_kl_value, skew_forward_kl_pull, _FORWARD
    ),
    "skew_reverse_kl": _skewed(
        "skew_reverse_kl", skew_reverse_kl_value, skew_reverse_kl_pull, _REVERSE
    ),
    "alpha": Divergence("(sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1))", _alpha),
    "tvd": Divergence("sum |p - q| / 2", lambda beta, alpha: (_TVD,)),
    "mixed": Divergence("beta KL(p || q) + (1 - beta) KL(q || p)", _mixed),
}


@lru_cache(maxsize=64)
def parts_of(kind: str, beta: float, alpha: float) -> tuple[Part, ...]:
    """The terms of divergence `kind`, the same objects for the same arguments.

    Raises:
        LossArgumentError: an unknown kind, or a parameter out of its range.
    """
    known = ", ".join(DIVERGENCES)
    require(kind in DIVERGENCES, "loss.kind", f"no divergence {kind!r}", f"choose one of {known}")
    return DIVERGENCES[kind].parts(beta, alpha)
